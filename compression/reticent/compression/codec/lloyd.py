"""Few-bit quantization to the best levels for normal values, scaled to keep the inner product."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reticent.core.update import Vector

from .base import Blocks, Coded, Dependence, no_flags, peak_of, to_float32
from .grid import block_sums, read_scales

POSITIVE_LEVELS = {
    1: (0.79788456,),
    2: (0.45278003, 1.51041761),
    3: (0.24509418, 0.75600528, 1.34390928, 2.15194570),
    4: (0.128395, 0.388048, 0.656759, 0.942340, 1.256231, 1.618046, 2.069017, 2.732590),
}
"""By bits, the levels of least mean squared error for a standard normal value (Max 1960)."""


@dataclass(frozen=True)
class NormalLevels:
    """Each value of a rotated block to one of 2**bits levels, scaled by |x|**2 / <x, Q(x)>.

    With that scale the decoded block has the inner product |x|**2 with ``x``. Were the rotation
    uniform over all rotations, the decoded vector would be unbiased (Vargaftik et al. 2021, DRIVE,
    for one bit; 2022, EDEN, for more). A randomized Hadamard rotation only comes close: with two
    coordinates (a, b), a > b > 0, DRIVE always returns (a + b**2 / a, 0). So it counts as biased.

    The error of one bit has a squared length of about (pi / 2 - 1) |x|**2; of two, three and four
    bits of about 0.133, 0.0358 and 0.0096.
    """

    bits: int
    code: int
    unbiased: bool = False
    error: Dependence = "dependent"
    sums: bool = False
    contracts: bool = False

    @property
    def alphabet(self) -> int:
        """One symbol a level."""
        return 2**self.bits

    def count(self, n: int) -> int:
        """One symbol a coordinate."""
        return n

    def expansion(self, n: int) -> float:
        """By about a quarter for one bit; less for more."""
        return 1.0

    def encode(
        self, vector: Vector, blocks: Blocks, generator: np.random.Generator, step: float | None
    ) -> Coded:
        """Return the nearest levels and one scale for each block; no randomness, no step."""
        peak_of(vector)
        wide = vector.astype(np.float64)
        squares = block_sums(wide**2, blocks)
        sizes = np.maximum(1, np.asarray(blocks, dtype=np.int64))
        deviations = np.repeat(np.sqrt(squares / sizes), blocks)
        normal = wide / np.where(deviations > 0, deviations, 1.0)
        levels = _levels(self.bits)
        symbols = np.searchsorted((levels[1:] + levels[:-1]) / 2, normal).astype(np.uint8)
        inner = block_sums(wide * levels[symbols], blocks)
        scales = squares / np.where(inner > 0, inner, 1.0)
        return Coded(symbols, scales.astype("<f4").tobytes())

    def decode(self, coded: Coded, blocks: Blocks) -> Vector:
        """Return levels times scales, float32 ``(n,)``."""
        no_flags(coded)
        scales = np.repeat(read_scales(coded.side, blocks), blocks)
        return to_float32(_levels(self.bits)[coded.symbols] * scales)


def _levels(bits: int) -> NDArray[np.float64]:
    positive = np.array(POSITIVE_LEVELS[bits])
    return np.concatenate([-positive[::-1], positive])
