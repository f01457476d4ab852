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

from .base import LARGEST, Blocks, Coded, Dependence, Symbols, peak_of, to_float32
from .escape import Integers, pack_escapes, unpack_escapes

STEP_FROM_DATA = 1
"""Header flag: the step was taken from the vector's largest magnitude."""

_SIDE = struct.Struct("<16sd")
_MOST = 2**31 - 1


@dataclass(frozen=True)
class SubtractiveDither:
    """Symbols for integers in [-levels, levels], and one that announces an escaped integer."""

    levels: int
    code: int
    alphabet: int
    unbiased: bool = True
    error: Dependence = "independent"

    def count(self, n: int) -> int:
        """One symbol a coordinate."""
        return n

    def encode(
        self, vector: Vector, blocks: Blocks, generator: np.random.Generator, step: float | None
    ) -> Coded:
        """Quantize with ``step``, or with max|x| / levels when it is None.

        Raises:
            PayloadError: If the step is not acceptable or a value is above 2**31 steps.
        """
        peak = peak_of(vector)
        width = peak / self.levels if step is None else _checked(step)
        if width and peak / width > _MOST - 1:
            raise PayloadError(
                f"step={width}: too small for a value of magnitude {peak}; no value may be above "
                f"{_MOST - 1} steps"
            )
        seed = generator.bytes(16)
        scaled = vector / np.float64(width or 1.0)
        integers = np.rint(scaled + dither(seed, len(vector))).astype(np.int64)
        symbols, escapes = self._split(integers)
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
            _checked(width)
        integers = self._join(coded.symbols, coded.side[_SIDE.size :])
        return to_float32((integers - dither(seed, len(integers))) * width)

    def _split(self, integers: Integers) -> tuple[Symbols, bytes]:
        size = np.abs(integers)
        far = np.flatnonzero(size > self.levels)
        symbols = (integers + self.levels).astype(np.uint8)
        symbols[far] = self._escape
        excess = 2 * (size[far] - self.levels - 1) + (integers[far] < 0)
        return symbols, pack_escapes(excess)

    def _join(self, symbols: Symbols, escapes: bytes) -> Integers:
        if len(symbols) and symbols.max() > self._escape:
            raise PayloadError(
                f"payload has symbol {symbols.max()}: must be at most {self._escape}"
            )
        far = np.flatnonzero(symbols == self._escape)
        excess = unpack_escapes(escapes, len(far))
        integers = symbols.astype(np.int64) - self.levels
        integers[far] = np.where(excess & 1, -1, 1) * (excess // 2 + self.levels + 1)
        return integers

    @property
    def _escape(self) -> int:
        return 2 * self.levels + 1


def dither(seed: bytes, n: int) -> NDArray[np.float64]:
    """Return the dither of a 16-byte ``seed``: float64 ``(n,)``, uniform on [-1/2, 1/2).

    Made from raw Philox words (Salmon et al. 2011), whose stream NumPy keeps stable between
    versions, which it does not promise for ``Generator.random``.
    """
    key = np.frombuffer(seed, dtype="<u8").astype(np.uint64)
    words = np.random.Philox(key=key).random_raw(n)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53 - 0.5


def _checked(step: float) -> float:
    if not 0 < step <= LARGEST:
        raise PayloadError(f"step={step}: must be above 0 and at most {LARGEST:.4g}")
    return float(step)
