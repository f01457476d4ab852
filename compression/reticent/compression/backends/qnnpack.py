"""The backend ``qnnpack``: int8 arrays in safetensors, run by torch's own integer kernels."""

from __future__ import annotations

import safetensors
import safetensors.torch

from reticent.core.errors import ArtifactError

from ..integer import Graph, IntegerModel, IntegerSpec, build
from .base import Backend, Shape

FILE = "model.safetensors"


def _write(spec: IntegerSpec, _: Shape) -> bytes:
    return safetensors.torch.save({n: t.detach().contiguous() for n, t in spec.arrays.items()})


def _load(graph: Graph, data: bytes) -> IntegerModel:
    try:
        arrays = safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(f"{FILE}: {error}") from error
    return build(IntegerSpec(graph, arrays))


QNNPACK = Backend("qnnpack", "QNNPACK, in torch", FILE, _write, _load)
