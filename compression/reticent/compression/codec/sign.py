"""One bit a coordinate: its sign, and the mean magnitude of its block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from reticent.core.update import Vector

from .base import Blocks, Coded, Dependence, no_flags, peak_of, to_float32
from .grid import block_sums, read_scales


@dataclass(frozen=True)
class ScaledSign:
    """``sign(x)`` times the mean of ``|x|`` over the block (Karimireddy et al. 2019, scaled sign).

    Biased: the expectation of a decoded value is its own decoded value, whatever ``x`` is. The
    error of a block of ``d`` numbers has the squared length |x|_2**2 - |x|_1**2 / d, so it is
    shorter than ``x``: error feedback converges with it. Zero counts as positive.
    """

    code: int = 17
    alphabet: int = 2
    unbiased: bool = False
    error: Dependence = "dependent"
    sums: bool = False
    contracts: bool = True

    def count(self, n: int) -> int:
        """One symbol a coordinate."""
        return n

    def expansion(self, n: int) -> float:
        """A mean magnitude is at most the root of the mean square."""
        return 1.0

    def encode(
        self, vector: Vector, blocks: Blocks, generator: np.random.Generator, step: float | None
    ) -> Coded:
        """Return signs and means; no randomness, no step."""
        peak_of(vector)
        sums = block_sums(np.abs(vector).astype(np.float64), blocks)
        scales = sums / np.maximum(1, np.asarray(blocks, dtype=np.int64))
        return Coded((vector >= 0).astype(np.uint8), scales.astype("<f4").tobytes())

    def decode(self, coded: Coded, blocks: Blocks) -> Vector:
        """Return signs times means, float32 ``(n,)``."""
        no_flags(coded)
        scales = np.repeat(read_scales(coded.side, blocks), blocks)
        return to_float32((2.0 * coded.symbols - 1.0) * scales)
