"""Stochastic rounding to a few levels with one scale per block (Gupta et al. 2015)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reticent.core.errors import PayloadError
from reticent.core.update import Vector

from .base import Blocks, Coded, Dependence, no_flags, peak_of, to_float32

Scales = NDArray[np.float32]


@dataclass(frozen=True)
class StochasticInt:
    """Integers in [-levels, levels] times the block's scale, max|x| / levels; unbiased.

    A value between two levels goes to either with probabilities that make the expectation exact
    (up to float64 arithmetic). The error of a value that lies on a level is 0 and that of one in
    the middle is half a scale: it depends on the value, and the scale depends on the block.
    """

    levels: int
    code: int
    alphabet: int
    unbiased: bool = True
    error: Dependence = "dependent"

    def count(self, n: int) -> int:
        """One symbol a coordinate."""
        return n

    def encode(
        self, vector: Vector, blocks: Blocks, generator: np.random.Generator, step: float | None
    ) -> Coded:
        """Round ``vector``; ``step`` is not used, the scales come from the data."""
        peak_of(vector)
        scales = _scales(vector, blocks, self.levels)
        each = np.repeat(np.where(scales > 0, scales, np.float32(1)).astype(np.float64), blocks)
        rounded = np.floor(vector / each + generator.random(len(vector)))
        # levels + u can round up to levels + 1 in float64, once in about 2**46 draws.
        symbols = (np.minimum(rounded, self.levels) + self.levels).astype(np.uint8)
        return Coded(symbols, scales.astype("<f4").tobytes())

    def decode(self, coded: Coded, blocks: Blocks) -> Vector:
        """Return integers times scales, float32 ``(n,)``."""
        no_flags(coded)
        if len(coded.side) != 4 * len(blocks):
            raise PayloadError(
                f"payload has {len(coded.side)} bytes of scales: must have {4 * len(blocks)}, "
                f"4 for each of {len(blocks)} blocks"
            )
        if len(coded.symbols) and coded.symbols.max() > 2 * self.levels:
            raise PayloadError(
                f"payload has symbol {coded.symbols.max()}: must be at most {2 * self.levels}"
            )
        scales = np.frombuffer(coded.side, dtype="<f4")
        # Before any conversion: that of a signalling NaN is a warning of its own.
        if not (np.isfinite(scales) & (scales >= 0)).all():
            raise PayloadError("payload has a scale that is negative or not finite")
        integers = coded.symbols.astype(np.float64) - self.levels
        return to_float32(integers * np.repeat(scales.astype(np.float64), blocks))


def _scales(vector: Vector, blocks: Blocks, levels: int) -> Scales:
    sizes = np.asarray(blocks, dtype=np.int64)
    starts = (np.cumsum(sizes) - sizes)[sizes > 0]
    peaks = np.zeros(len(sizes))
    if len(starts):
        peaks[sizes > 0] = np.maximum.reduceat(np.abs(vector), starts)
    scales = (peaks / levels).astype(np.float32)
    # Rounded down, a scale would leave the largest value above the top level: a biased clip.
    low = scales.astype(np.float64) * levels < peaks
    scales[low] = np.nextafter(scales[low], np.float32(np.inf))
    return scales
