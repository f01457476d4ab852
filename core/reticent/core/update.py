"""The flat vector that travels: a model's parameters, or a change of them, as one float32 array."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .errors import DataError

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the parameters that a flat vector holds, in order.

    Only parameters are part of a layout: buffers (running statistics, observers) can hold
    statistics of private data and are denied by construction.

    Attributes:
        names: Parameter names as in ``nn.Module.named_parameters``.
        shapes: Their shapes.
        kept: Bit-packed mask (``numpy.packbits`` over all coordinates, 1 = kept), or ``b""`` when
            every coordinate is kept. Only kept coordinates are trained, noised and sent.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    kept: bytes = b""

    @staticmethod
    def of(model: nn.Module, mask: NDArray[np.bool_] | None = None) -> Layout:
        """Return the layout of ``model``; ``mask`` has one entry per coordinate, in order."""
        named = list(model.named_parameters())
        layout = Layout(tuple(n for n, _ in named), tuple(tuple(p.shape) for _, p in named))
        if mask is None or bool(mask.all()):
            return layout
        if mask.shape != (layout.total,):
            raise DataError(f"mask has shape {mask.shape}: must be ({layout.total},)")
        return Layout(layout.names, layout.shapes, np.packbits(mask).tobytes())

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of coordinates of each parameter before masking."""
        return tuple(int(np.prod(s, dtype=np.int64)) for s in self.shapes)

    @cached_property
    def total(self) -> int:
        """Number of coordinates before masking."""
        return sum(self.sizes)

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """Boolean mask over all coordinates, shape ``(total,)``."""
        if not self.kept:
            return np.ones(self.total, dtype=bool)
        bits = np.unpackbits(np.frombuffer(self.kept, dtype=np.uint8))
        if len(bits) < self.total:
            raise DataError(f"mask holds {len(bits)} bits: must hold {self.total}")
        return bits[: self.total].astype(bool)

    @cached_property
    def index(self) -> NDArray[np.int64]:
        """Positions of the kept coordinates, ascending, shape ``(size,)``."""
        return np.flatnonzero(self.mask)

    @cached_property
    def size(self) -> int:
        """Number of kept coordinates: the length of every vector of this layout."""
        return int(self.mask.sum())

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """Number of kept coordinates of each parameter; sums to ``size``."""
        ends = np.cumsum(self.sizes)
        return tuple(int(part.sum()) for part in np.split(self.mask, ends[:-1]))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of names, shapes and mask, as hex."""
        head = json.dumps([self.names, self.shapes]).encode()
        return hashlib.sha256(head + b"\0" + self.kept).hexdigest()

    def gather(self, parts: list[torch.Tensor]) -> Vector:
        """Return the kept coordinates of ``parts`` (one tensor a parameter) as one vector."""
        flat = torch.cat([p.detach().reshape(-1) for p in parts]).to(torch.float32).numpy()
        return flat[self.index] if self.kept else flat.copy()

    def read(self, model: nn.Module) -> Vector:
        """Return the kept parameters of ``model``, shape ``(size,)``, float32."""
        return self.gather(list(model.parameters()))

    def write(self, model: nn.Module, vector: Vector) -> None:
        """Set ``model``'s parameters from ``vector``; coordinates not kept become zero.

        Raises:
            DataError: If the vector's length is not ``size``.
        """
        if vector.shape != (self.size,):
            raise DataError(f"vector has shape {vector.shape}: must be ({self.size},)")
        flat = np.ascontiguousarray(vector, dtype=np.float32)
        if self.kept:
            flat = np.zeros(self.total, dtype=np.float32)
            flat[self.index] = vector
        parts = torch.tensor(flat).split(list(self.sizes))
        with torch.no_grad():
            for p, part in zip(model.parameters(), parts, strict=True):
                p.copy_(part.view_as(p))


def vector_digest(vector: Vector) -> str:
    """Return the SHA-256 of a vector's little-endian bytes, as hex: a model's identity."""
    return hashlib.sha256(np.ascontiguousarray(vector, dtype="<f4").tobytes()).hexdigest()
