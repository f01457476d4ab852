"""Subtractive dither: an error that is uniform and independent of what was encoded.

Guarantee. Let ``x`` be the vector, ``step`` a public number that no private data decided, ``u``
uniform on [-1/2, 1/2) in every coordinate and ``y = (round(x / step + u) - u) * step`` what the
receiver decodes. Then ``y - x`` is uniform on [-step/2, step/2] in every coordinate and independent
of ``x`` (Schuchman 1964; Gray and Stockham 1993, theorem 2). ``y`` is ``x`` plus independent
noise, so the sum of many ``y`` is a post-processing of the sum of the ``x``: what was proved of a
sum of noise shares stays true of it.

Adversary. This holds for those who see the models, that is functions of sums of decoded vectors,
and neither a payload nor its dither seed. It does not hold against the server, which sees both:
given the seed, ``y`` is a deterministic function of ``x``. Nor does it cover those who see the
length of a payload, which an entropy stage and escaped values make depend on ``x``.

Conditions. The generator given to ``encode`` must be secret and fresh (seeded by the operating
system on a device). The dither is Philox output, not a cryptographic stream. With ``step=None``
the step is taken from the largest value, so the error depends on the input through it; a payload
says so in its header. Arithmetic is float64 with a dither of 53 bits, and the result is rounded to
float32: a relative 2**-24 of ``y``, which stays far below the step while ``|x| << 2**24 * step``.
No value saturates, because saturation would tell the error from its input: values outside the
alphabet are escaped and stored exactly.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reticent.core.errors import PayloadError
from reticent.core.update import Vector

from .base import LARGEST_NORMAL, Blocks, Coded, Dependence, peak_of, to_float32
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
from .seeded import SEED_BYTES, words_of

_SIDE = struct.Struct("<16sd")


@dataclass(frozen=True)
class SubtractiveDither:
    """Symbols for integers in [-levels, levels], and one that announces an escaped integer."""

    levels: int
    code: int
    alphabet: int
    unbiased: bool = True
    error: Dependence = "independent"
    sums: bool = True
    contracts: bool = False

    def count(self, n: int) -> int:
        """One symbol a coordinate."""
        return n

    def expansion(self, n: int) -> float:
        """By at most half a step a coordinate."""
        return 1.0

    def encode(
        self, vector: Vector, blocks: Blocks, generator: np.random.Generator, step: float | None
    ) -> Coded:
        """Quantize with ``step``, or with max|x| / levels when it is None.

        Raises:
            PayloadError: If the step is not acceptable or a value is above 2**31 steps.
        """
        width = step_for(peak_of(vector), self.levels, step)
        seed = generator.bytes(SEED_BYTES)
        scaled = vector / np.float64(width or 1.0)
        integers = np.rint(scaled + dither(seed, len(vector))).astype(np.int64)
        symbols, escapes = split(integers, self.levels)
        flags = STEP_FROM_DATA if step is None else 0
        return Coded(symbols, _SIDE.pack(seed, width) + escapes, flags)

    def decode(self, coded: Coded, blocks: Blocks) -> Vector:
        """Return ``(q - u) * step``, float32 ``(n,)``."""
        if len(coded.side) < _SIDE.size or coded.flags not in (0, STEP_FROM_DATA):
            raise PayloadError(
                f"payload has {len(coded.side)} side bytes and flags {coded.flags:#04x}: must have "
                f"at least {_SIDE.size} bytes and flags 0 or 1"
            )
        seed, width = _SIDE.unpack_from(coded.side)
        # Only a vector of zeros has a step of 0, and only by a step taken from the data.
        if coded.flags == 0 or width != 0:
            checked_step(width)
        integers = join(coded.symbols, coded.side[_SIDE.size :], self.levels)
        return to_float32((integers - dither(seed, len(integers))) * width)


@dataclass(frozen=True)
class BlockDither:
    """Subtractive dither with a step for each block, 2 max|x| / (alphabet - 1) of it; unbiased.

    The steps come from the data, and the error depends on the input through them: given the steps
    it is uniform on [-step/2, step/2]. Values lie between levels, so that the alphabet holds every
    dithered value and nothing is escaped.
    """

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
        """Of one bit every value is about the largest of its block."""
        return LARGEST_NORMAL if self.alphabet == 2 else 1.0

    def encode(
        self, vector: Vector, blocks: Blocks, generator: np.random.Generator, step: float | None
    ) -> Coded:
        """Quantize ``vector``; ``step`` is not used, the scales come from the data."""
        peak_of(vector)
        scales = scales_for(block_peaks(vector, blocks), (self.alphabet - 1) / 2)
        each = np.repeat(np.where(scales > 0, scales, np.float32(1)).astype(np.float64), blocks)
        seed = generator.bytes(SEED_BYTES)
        integers = np.floor(vector / each + dither(seed, len(vector)))
        # The sum of the largest value and the largest dither can round up in float64.
        symbols = np.clip(integers + self.alphabet // 2, 0, self.alphabet - 1).astype(np.uint8)
        return Coded(symbols, seed + scales.astype("<f4").tobytes(), OTHER_SCALES)

    def decode(self, coded: Coded, blocks: Blocks) -> Vector:
        """Return ``(q + 1/2 - u) * step``, float32 ``(n,)``."""
        if coded.flags != OTHER_SCALES or len(coded.side) < SEED_BYTES:
            raise PayloadError(
                f"payload has {len(coded.side)} side bytes and flags {coded.flags:#04x}: must have "
                f"at least {SEED_BYTES} bytes and flags 2"
            )
        scales = np.repeat(read_scales(coded.side[SEED_BYTES:], blocks), blocks)
        check_symbols(coded.symbols, self.alphabet - 1)
        integers = coded.symbols.astype(np.float64) - (self.alphabet - 1) / 2
        return to_float32((integers - dither(coded.side[:SEED_BYTES], len(integers))) * scales)


def dither(seed: bytes, n: int) -> NDArray[np.float64]:
    """Return the dither of a 16-byte ``seed``: float64 ``(n,)``, uniform on [-1/2, 1/2)."""
    return (words_of(seed, n) >> np.uint64(11)).astype(np.float64) * 2.0**-53 - 0.5
