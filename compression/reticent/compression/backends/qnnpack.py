"""The backends ``qnnpack`` and ``x86``: packed integer arrays, run by torch's own kernels."""

from __future__ import annotations

from collections.abc import Callable

import safetensors
import safetensors.torch

from reticent.core.errors import ArtifactError
from reticent.core.plan import Backend as Engine

from ..deployable import Form, Model, Spec, assemble
from ..dynamic import DynamicGraph, DynamicSpec
from ..integer import IntegerSpec
from ..packing import pack, unpack
from .base import Backend, Shape

FILE = "model.safetensors"


def _write(spec: Spec, _: Shape) -> bytes:
    packed = pack(spec.arrays)
    return safetensors.torch.save({name: array.contiguous() for name, array in packed.items()})


def _loader(engine: Engine) -> Callable[[Form, bytes], Model]:
    def load(graph: Form, data: bytes) -> Model:
        try:
            arrays = unpack(safetensors.torch.load(data))
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise ArtifactError(f"{FILE}: {error}") from error
        dynamic = isinstance(graph, DynamicGraph)
        spec = DynamicSpec(graph, arrays) if dynamic else IntegerSpec(graph, arrays)
        return assemble(spec, engine)

    return load


QNNPACK = Backend("qnnpack", "QNNPACK, in torch", FILE, _write, _loader("qnnpack"), dynamic=True)
X86 = Backend("x86", "the x86 engine of torch", FILE, _write, _loader("x86"), dynamic=True)
