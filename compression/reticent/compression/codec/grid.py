"""What rounding to a uniform grid needs: steps, and symbols for integers of any size."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from reticent.core.errors import PayloadError
from reticent.core.update import Vector

from .base import LARGEST, Blocks, Symbols
from .escape import Integers, pack_escapes, unpack_escapes

STEP_FROM_DATA = 1
"""Header flag: the step was taken from the vector's largest magnitude."""

OTHER_SCALES = 2
"""Header flag: one step where this quantizer usually has one per block, or the other way round."""

MOST = 2**31 - 1
Scales = NDArray[np.float32]


def levels_of(bits: int) -> int:
    """Return the largest integer that ``bits`` bits hold beside its negative and one symbol more.

    >>> [levels_of(bits) for bits in (1, 2, 4, 8)]
    [0, 1, 7, 127]
    """
    return 2 ** (bits - 1) - 1


def checked_step(step: float) -> float:
    """Return ``step``; PayloadError unless it is above 0 and at most ``LARGEST``."""
    if not 0 < step <= LARGEST:
        raise PayloadError(f"step={step}: must be above 0 and at most {LARGEST:.4g}")
    return float(step)


def step_for(peak: float, levels: int, step: float | None) -> float:
    """Return ``step``, or peak / levels when it is None (0 for a vector of zeros).

    Raises:
        PayloadError: If the step is not acceptable or ``peak`` is above 2**31 steps.
    """
    width = peak / levels if step is None else checked_step(step)
    if width and peak / width > MOST - 1:
        raise PayloadError(
            f"step={width}: too small for a value of magnitude {peak}; no value may be above "
            f"{MOST - 1} steps"
        )
    return width


def split(integers: Integers, levels: int) -> tuple[Symbols, bytes]:
    """Return symbols of integers in [-levels, levels], and the bytes of those outside it.

    Symbol ``2 * levels + 1`` announces an integer outside, which is stored exactly.
    """
    size = np.abs(integers)
    far = np.flatnonzero(size > levels)
    symbols = (integers + levels).astype(np.uint8)
    symbols[far] = 2 * levels + 1
    excess = 2 * (size[far] - levels - 1) + (integers[far] < 0)
    return symbols, pack_escapes(excess)


def join(symbols: Symbols, escapes: bytes, levels: int) -> Integers:
    """Undo :func:`split`; PayloadError on anything that it cannot make."""
    escape = 2 * levels + 1
    check_symbols(symbols, escape)
    far = np.flatnonzero(symbols == escape)
    excess = unpack_escapes(escapes, len(far))
    integers = symbols.astype(np.int64) - levels
    integers[far] = np.where(excess & 1, -1, 1) * (excess // 2 + levels + 1)
    return integers


def check_symbols(symbols: Symbols, most: int) -> None:
    """Raise PayloadError if a symbol is above ``most``."""
    if len(symbols) and symbols.max() > most:
        raise PayloadError(f"payload has symbol {symbols.max()}: must be at most {most}")


def scales_for(peaks: NDArray[np.float64], levels: float) -> Scales:
    """Return float32 scales of which ``levels`` reach ``peaks``, one per block."""
    scales = (peaks / levels).astype(np.float32)
    # Rounded down, a scale would leave the largest value above the top level: a biased clip.
    low = scales.astype(np.float64) * levels < peaks
    scales[low] = np.nextafter(scales[low], np.float32(np.inf))
    return scales


def block_peaks(vector: Vector, blocks: Blocks) -> NDArray[np.float64]:
    """Return the largest magnitude in each block, float64 ``(len(blocks),)``; 0 where empty."""
    return _reduced(np.maximum, np.abs(vector), blocks)


def block_sums(values: NDArray[np.float64], blocks: Blocks) -> NDArray[np.float64]:
    """Return the sum of each block, float64 ``(len(blocks),)``."""
    return _reduced(np.add, values, blocks)


def read_scales(side: bytes, blocks: Blocks) -> NDArray[np.float64]:
    """Return one scale for each block, float64; PayloadError unless finite and at least 0."""
    if len(side) != 4 * len(blocks):
        raise PayloadError(
            f"payload has {len(side)} bytes of scales: must have {4 * len(blocks)}, "
            f"4 for each of {len(blocks)} blocks"
        )
    scales = np.frombuffer(side, dtype="<f4")
    # Before any conversion: that of a signalling NaN is a warning of its own.
    if not (np.isfinite(scales) & (scales >= 0)).all():
        raise PayloadError("payload has a scale that is negative or not finite")
    return scales.astype(np.float64)


def _reduced(reduce: np.ufunc, values: NDArray[np.floating], blocks: Blocks) -> NDArray[np.float64]:
    sizes = np.asarray(blocks, dtype=np.int64)
    starts = (np.cumsum(sizes) - sizes)[sizes > 0]
    reduced = np.zeros(len(sizes))
    if len(starts):
        reduced[sizes > 0] = reduce.reduceat(values, starts)
    return reduced
