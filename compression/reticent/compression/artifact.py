"""The deployable artifact: a signed folder with an int8 model and an account of its making.

Guarantee: nothing in an artifact is parsed or loaded before it is known to come from the holder of
the signing key, whole and unchanged. The Ed25519 signature over the exact bytes of
``manifest.json`` is checked first; the manifest holds the SHA-256 and the size of every other file,
and those are checked next, on the very bytes that are then used. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from torch import nn

from reticent.core.errors import ArtifactError, DataError, ReticentError
from reticent.core.plain_files import read_plain
from reticent.core.signing import SIGNATURE_BYTES, is_signed

from .backends.base import Deployed, deploy, load
from .backends.registry import BACKENDS
from .card import model_card
from .deployable import Form, Spec, parse_form
from .dynamic import DynamicGraph
from .integer import Weighted
from .manifest import (
    FORMAT_VERSION,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    SIGNATURE,
    Manifest,
    TaskInfo,
    parse_manifest,
)
from .publishing import check_target, publish


@dataclass(frozen=True)
class SelfTest:
    """A few public examples and the logits that the int8 model gave for them (float32)."""

    inputs: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True)
class Artifact:
    """A verified artifact, ready to predict.

    Attributes:
        manifest: What it is.
        graph: Layers and activation grids.
        data: Bytes of the backend's model file.
        model: Predicts from those bytes.
    """

    manifest: Manifest
    graph: Form
    data: bytes
    model: nn.Module

    def predict(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return logits, float32 ``(n, classes)``, for float32 inputs ``(n, *input_shape)``.

        Raises:
            DataError: If the inputs have another type or shape, or are not finite.
        """
        return _predict(self.model, self.manifest.task, inputs)


def write_artifact(
    folder: Path,
    spec: Spec,
    *,
    task: TaskInfo,
    plan_digest: str,
    metrics: Mapping[str, Any],
    privacy: Mapping[str, Any] | Literal["off"],
    sizes: Mapping[str, Any],
    self_test: SelfTest,
    private_key: Ed25519PrivateKey,
    deployed: Deployed | None = None,
    replace: bool = False,
) -> Path:
    """Write a signed artifact to ``folder`` and return the folder.

    The folder appears whole or not at all: everything is written and synced beside it and then
    renamed. When an artifact is replaced, a crash between the two renames leaves none; the old one
    is then found beside it under a hidden name.

    Args:
        folder: Where to write; must not exist, or be an artifact and nothing else if ``replace``.
        spec: The int8 model.
        task: What the model is for.
        plan_digest: SHA-256 of the plan as hex.
        metrics: Measured figures; anything JSON can hold.
        privacy: ``epsilon`` and ``delta`` and whatever else should be stated. ``"off"``, or an
            infinite epsilon, is spelled out as ``"infinity"``.
        sizes: Measured bytes, by name.
        self_test: Checked now, stored, and checked again whenever the artifact is loaded.
        private_key: Signs the manifest.
        deployed: ``spec`` as a backend stores and runs it; by default as ``qnnpack`` does.
        replace: Whether an artifact that is already there may be replaced.

    Raises:
        ArtifactError: If the folder is taken or cannot be written, the self test fails, or the
            account is incomplete.
    """
    check_target(folder, replace)
    deployed = deployed or deploy(spec, BACKENDS["qnnpack"], task.input_shape)
    _run_self_test(deployed.model, deployed.graph, task, self_test)
    account = {
        "metrics": _plain("metrics", metrics),
        "privacy": _privacy(privacy),
        "sizes": _plain("sizes", sizes),
    }
    contents = {
        deployed.backend.model_file: deployed.data,
        "model.json": (deployed.graph.model_dump_json(indent=1) + "\n").encode(),
        "self_test.safetensors": _pack({"inputs": self_test.inputs, "logits": self_test.logits}),
        "MODEL_CARD.md": model_card(deployed, task, plan_digest, account).encode(),
    }
    entries = {name: _entry(data) for name, data in contents.items()}
    manifest = parse_manifest(
        json.dumps(
            {
                "format_version": FORMAT_VERSION,
                "backend": deployed.backend.name,
                "created_by": _created_by(),
                "plan_digest": plan_digest,
                "task": task.model_dump(),
                **account,
                "files": entries,
            }
        ).encode()
    )
    contents[MANIFEST] = (manifest.model_dump_json(indent=1) + "\n").encode()
    contents[SIGNATURE] = private_key.sign(contents[MANIFEST])
    try:
        publish(folder, contents, replace)
    except OSError as error:
        raise ArtifactError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return folder


def verify_artifact(folder: Path, public_key: Ed25519PublicKey) -> Manifest:
    """Check an artifact's signature and every byte of it; return its manifest.

    Raises:
        ArtifactError: If a file is missing, extra, changed, too large or not a plain file, or the
            signature is not by this key.
    """
    return _verified(folder, public_key)[0]


def load_artifact(folder: Path, public_key: Ed25519PublicKey) -> Artifact:
    """Verify an artifact, assemble its model and run its self test.

    Raises:
        ArtifactError: As :func:`verify_artifact`, and if the model cannot be assembled or does not
            give the logits of the self test on this machine.
        DependencyError: If what runs the artifact's backend is not installed.
    """
    manifest, contents = _verified(folder, public_key)
    backend, graph = BACKENDS[manifest.backend], parse_form(contents["model.json"])
    data = contents[backend.model_file]
    model = load(backend, graph, data)
    tensors = _unpack("self_test.safetensors", contents)
    if tensors.keys() != {"inputs", "logits"}:
        raise ArtifactError("self_test.safetensors: must hold inputs and logits")
    _run_self_test(model, graph, manifest.task, SelfTest(**tensors))
    return Artifact(manifest, graph, data, model)


def _verified(folder: Path, public_key: Ed25519PublicKey) -> tuple[Manifest, dict[str, bytes]]:
    signature = read_plain(folder / SIGNATURE, SIGNATURE_BYTES, ArtifactError, links=False)
    text = read_plain(folder / MANIFEST, MAX_MANIFEST_BYTES, ArtifactError, links=False)
    if not is_signed(public_key, signature, text):
        raise ArtifactError(
            f"{folder}: the signature does not fit: the manifest was changed, or it was signed "
            "with another key"
        )
    manifest = parse_manifest(text)
    _check_names(folder, manifest)
    contents: dict[str, bytes] = {}
    for name, entry in manifest.files.items():
        data = read_plain(folder / name, entry.bytes, ArtifactError, links=False)
        if len(data) != entry.bytes or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise ArtifactError(f"{folder / name}: is not the file that was signed")
        contents[name] = data
    return manifest, contents


def _check_names(folder: Path, manifest: Manifest) -> None:
    present = set(os.listdir(folder))
    for name in sorted(present ^ {*manifest.files, MANIFEST, SIGNATURE}):
        problem = "is not part of an artifact" if name in present else "is missing"
        raise ArtifactError(f"{folder / name}: {problem}")


def _unpack(name: str, contents: Mapping[str, bytes]) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load(contents[name])
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(f"{name}: {error}") from error


def _pack(tensors: Mapping[str, torch.Tensor]) -> bytes:
    return safetensors.torch.save({n: t.detach().contiguous() for n, t in tensors.items()})


def _entry(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _predict(model: nn.Module, task: TaskInfo, inputs: torch.Tensor) -> torch.Tensor:
    if tuple(inputs.shape[1:]) != task.input_shape or inputs.dim() == 0:
        raise DataError(
            f"inputs have shape {tuple(inputs.shape)}: must be (n, "
            f"{', '.join(map(str, task.input_shape))})"
        )
    if not torch.isfinite(inputs).all():
        raise DataError("inputs hold values that are not finite")
    return model(inputs)


def _run_self_test(model: nn.Module, graph: Form, task: TaskInfo, test: SelfTest) -> None:
    try:
        logits = _predict(model, task, test.inputs)
    except (ReticentError, RuntimeError) as error:
        raise ArtifactError(f"self test: the model does not run: {error}") from error
    if logits.shape != (len(test.inputs), task.classes) or test.logits.shape != logits.shape:
        raise ArtifactError(
            f"self test: logits have shape {tuple(logits.shape)}: must be "
            f"({len(test.inputs)}, {task.classes}), as must the {tuple(test.logits.shape)} stored"
        )
    # Processors may round an integer differently by one; after a few layers that is a step or two
    # of the logits' grid, while a wrong memory layout or weight is many.
    allowed = 2.01 * _output_step(graph, test.logits)
    worst = float((logits - test.logits).abs().max())
    if not worst <= allowed:
        raise ArtifactError(
            f"self test: logits differ by up to {worst:.4g} from those stored: at most "
            f"{allowed:.4g} allowed"
        )


def _output_step(graph: Form, logits: torch.Tensor) -> float:
    if isinstance(graph, DynamicGraph):
        # Logits are float; 127 steps are the coarsest grid of an activation.
        return float(logits.abs().max()) / 127
    grids = [r.output for r in graph.layers if isinstance(r, Weighted)]
    return [graph.input, *grids][-1].scale


def _privacy(privacy: Mapping[str, Any] | Literal["off"]) -> dict[str, Any]:
    stated: dict[str, Any] = {"epsilon": math.inf} if isinstance(privacy, str) else dict(privacy)
    epsilon = stated.get("epsilon")
    if epsilon == math.inf:
        stated["epsilon"] = epsilon = "infinity"
    if epsilon != "infinity" and (not _number(epsilon) or not _number(stated.get("delta"))):
        raise ArtifactError(
            f"privacy={privacy!r}: must hold numbers epsilon and delta, or be 'off', which is "
            "stated as epsilon = infinity"
        )
    return _plain("privacy", stated)


def _number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return math.isfinite(value) and value >= 0


def _plain(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(values), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{name}: must be what JSON can hold, and finite: {error}") from error


def _created_by() -> str:
    try:
        return f"reticent {importlib.metadata.version('reticent')}"
    except importlib.metadata.PackageNotFoundError:
        return "reticent (not installed)"
