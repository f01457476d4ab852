"""Using the model that is installed on a device."""

from __future__ import annotations

from dataclasses import dataclass

from reticent.compression.artifact import Artifact, load_artifact
from reticent.core.errors import ArtifactError

from .folder import Device
from .models import Models


@dataclass(frozen=True)
class Installed:
    """A model that is ready to predict.

    Attributes:
        version: Its version.
        artifact: It was verified, and has passed its self-test in this process.
        problem: Why the current model is not used but the one before; nothing if it is.
    """

    version: int
    artifact: Artifact
    problem: str = ""


def load_installed(device: Device) -> Installed:
    """Load the current model or, if it does not verify or work any more, the last good one.

    Raises:
        ArtifactError: If there is none that does.
    """
    models, key, problem = Models(device.models), device.key("artifacts"), ""
    for slot in models.state().slots:
        try:
            artifact = load_artifact(models.path(slot.version), key)
        except (ArtifactError, OSError) as error:
            problem = problem or f"model {slot.version}: {error}"
        else:
            return Installed(slot.version, artifact, problem)
    none = f"{device.folder}: holds no model: `reticent server deliver` brings one"
    raise ArtifactError(problem or none)
