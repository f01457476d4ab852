"""Stochastic rounding to a uniform grid (Gupta et al. 2015): unbiased, its error dependent.

A value between two levels goes to either with probabilities that make the expectation exact (up to
float64 arithmetic). At ``p`` of a step above a level the error has variance p (1 - p) step**2: none
on a level, a quarter of step**2 in the middle. The error depends on the value.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from reticent.core.errors import PayloadError
from reticent.core.update import Vector

from .base import LARGEST_NORMAL, Blocks, Coded, Dependence, no_flags, peak_of, to_float32
from .grid import (
    OTHER_SCALES,
    STEP_FROM_DATA,
    block_peaks,
    check_symbols,
    checked_step,
    join,
    read_scales,
    scales_for,
    split,
    step_for,
)

_WIDTH = struct.Struct("<d")


@dataclass(frozen=True)
class StochasticInt:
    """Integers in [-levels, levels] times the block's scale, max|x| / levels; unbiased.

    With ``levels=0`` there are two values, plus and minus max|x| of the block (one bit); the
    variance of a value x is then max|x|**2 - x**2.
    """

    levels: int
    code: int
    alphabet: int
    unbiased: bool = True
    error: Dependence = "dependent"
    sums: bool = False
    contracts: bool = False

    def count(self, n: int) -> int:
        """One symbol a coordinate."""
        return n

    def expansion(self, n: int) -> float:
        """Of one bit every value becomes the largest of its block."""
        return LARGEST_NORMAL if self.levels == 0 else 1.0

    def encode(
        self, vector: Vector, blocks: Blocks, generator: np.random.Generator, step: float | None
    ) -> Coded:
        """Round ``vector``; ``step`` is not used, the scales come from the data."""
        peak_of(vector)
        scales = scales_for(block_peaks(vector, blocks), self.levels or 0.5)
        each = np.repeat(np.where(scales > 0, scales, np.float32(1)).astype(np.float64), blocks)
        rounded = np.floor(vector / each + self._shift + generator.random(len(vector)))
        # levels + u can round up to levels + 1 in float64, once in about 2**46 draws.
        symbols = np.minimum(rounded + self.levels, self._top).astype(np.uint8)
        return Coded(symbols, scales.astype("<f4").tobytes())

    def decode(self, coded: Coded, blocks: Blocks) -> Vector:
        """Return integers times scales, float32 ``(n,)``."""
        no_flags(coded)
        scales = read_scales(coded.side, blocks)
        check_symbols(coded.symbols, self._top)
        integers = coded.symbols.astype(np.float64) - self.levels - self._shift
        return to_float32(integers * np.repeat(scales, blocks))

    @property
    def _shift(self) -> float:
        return 0.0 if self.levels else 0.5

    @property
    def _top(self) -> int:
        return 2 * self.levels or 1


@dataclass(frozen=True)
class SharedInt:
    """Integers times one step for the whole vector, a public one or max|x| / levels; unbiased.

    Integers outside [-levels, levels] are escaped, so nothing saturates. With a public step the
    integers of several clients may be added, in any modulus that holds their sum: the sum of the
    decoded vectors is the sum of the integers times the step.
    """

    levels: int
    code: int
    alphabet: int
    unbiased: bool = True
    error: Dependence = "dependent"
    sums: bool = True
    contracts: bool = False

    def count(self, n: int) -> int:
        """One symbol a coordinate."""
        return n

    def expansion(self, n: int) -> float:
        """By less than one step a coordinate."""
        return 1.0

    def encode(
        self, vector: Vector, blocks: Blocks, generator: np.random.Generator, step: float | None
    ) -> Coded:
        """Round to multiples of ``step``, or of max|x| / levels when it is None.

        Raises:
            PayloadError: If the step is not acceptable or a value is above 2**31 steps.
        """
        width = step_for(peak_of(vector), self.levels, step)
        scaled = vector / np.float64(width or 1.0)
        integers = np.floor(scaled + generator.random(len(vector))).astype(np.int64)
        symbols, escapes = split(integers, self.levels)
        flags = OTHER_SCALES + (STEP_FROM_DATA if step is None else 0)
        return Coded(symbols, _WIDTH.pack(width) + escapes, flags)

    def decode(self, coded: Coded, blocks: Blocks) -> Vector:
        """Return integers times the step, float32 ``(n,)``."""
        from_data = coded.flags == OTHER_SCALES + STEP_FROM_DATA
        if len(coded.side) < _WIDTH.size or not (from_data or coded.flags == OTHER_SCALES):
            raise PayloadError(
                f"payload has {len(coded.side)} side bytes and flags {coded.flags:#04x}: must have "
                f"at least {_WIDTH.size} bytes and flags 2 or 3"
            )
        (width,) = _WIDTH.unpack_from(coded.side)
        # Only a vector of zeros has a step of 0, and only by a step taken from the data.
        if not from_data or width != 0:
            checked_step(width)
        integers = join(coded.symbols, coded.side[_WIDTH.size :], self.levels)
        return to_float32(integers.astype(np.float64) * width)
