"""What a backend is: two functions and a file name.

Contract, tested for every backend: the file depends on the :class:`~..integer.IntegerSpec` and the
input's shape only; it holds the spec's own integers and steps (nothing is calibrated again); and
the loaded model maps float32 ``(n, *input_shape)`` to float32 logits that are those of the
fake-quantized student up to rounding: a value between two integers may go to either.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from reticent.core.errors import ArtifactError, DataError, DependencyError

from ..deployable import Form, Spec
from ..dynamic import DynamicSpec
from . import BackendName

Shape = tuple[int, ...]


class Runner(nn.Module):
    """A model that runs outside torch, as a module: float32 in, float32 logits out."""

    def __init__(self, run: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.run = run

    @torch.no_grad()
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return logits for inputs of any memory format.

        Raises:
            DataError: If ``inputs`` are not float32 or hold no example.
        """
        if inputs.dtype != torch.float32 or inputs.numel() == 0:
            raise DataError(
                f"inputs are {inputs.dtype} of shape {tuple(inputs.shape)}: must be float32 and "
                "hold at least one example"
            )
        return self.run(inputs.contiguous())


@dataclass(frozen=True)
class Backend:
    """One way to deploy an int8 model.

    Attributes:
        name: As in a manifest and after ``--backend``.
        runs_on: The software that a device runs the model with, in words.
        model_file: Name of the file that holds the model.
        write: Makes that file's bytes from a spec and the shape of one example. Raises
            ArtifactError, naming the layer, for an operation that the backend lacks.
        load: Makes a module from the graph and the file's bytes, which must be verified before.
            Raises ArtifactError if they are not a model.
        to_write: Python modules that ``write`` needs beyond the base install.
        to_load: The same for ``load``.
        dynamic: Whether it has a form of a model that is quantized dynamically.
    """

    name: BackendName
    runs_on: str
    model_file: str
    write: Callable[[Any, Shape], bytes]
    load: Callable[[Any, bytes], nn.Module]
    to_write: tuple[str, ...] = ()
    to_load: tuple[str, ...] = ()
    dynamic: bool = False


@dataclass(frozen=True)
class Deployed:
    """A model as one backend stores and runs it.

    Attributes:
        backend: The backend.
        graph: Layers and activation grids.
        data: Bytes of the backend's model file.
        model: Predicts from those bytes.
    """

    backend: Backend
    graph: Form
    data: bytes
    model: nn.Module


def deploy(spec: Spec, backend: Backend, input_shape: Shape) -> Deployed:
    """Write an int8 model for ``backend`` and load what was written.

    Raises:
        DependencyError: If the backend is not installed.
        ArtifactError: If the backend has no form of a layer; the message names it.
    """
    require_all(backend)
    if isinstance(spec, DynamicSpec) and not backend.dynamic:
        raise ArtifactError(
            f'backend {backend.name} has no form of a model with student.quantize.kind="dynamic": '
            "use qnnpack or x86"
        )
    data = backend.write(spec, input_shape)
    return Deployed(backend, spec.graph, data, load(backend, spec.graph, data))


def load(backend: Backend, graph: Form, data: bytes) -> nn.Module:
    """Load a model from verified bytes.

    Raises:
        DependencyError: If what runs the backend is not installed.
        ArtifactError: If the bytes are not a model of it.
    """
    _require(backend, backend.to_load)
    return backend.load(graph, data)


def require_all(backend: Backend) -> None:
    """Check that what a backend needs to write and load is installed.

    Raises:
        DependencyError: If a package is missing, with the command that installs it.
    """
    _require(backend, (*backend.to_write, *backend.to_load))


def _require(backend: Backend, modules: tuple[str, ...]) -> None:
    missing = [name for name in dict.fromkeys(modules) if not _found(name)]
    if missing:
        raise DependencyError(
            f"backend {backend.name} needs the Python packages {', '.join(missing)}: "
            f"pip install 'reticent[{backend.name}]'"
        )


def installed(backend: Backend) -> bool:
    """Return whether everything that writing and loading needs is there."""
    return all(_found(name) for name in (*backend.to_write, *backend.to_load))


def _found(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
