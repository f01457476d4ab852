"""A randomized Hadamard rotation before a quantizer: every coordinate then looks normal."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reticent.core.errors import PayloadError
from reticent.core.update import Vector

from .base import LARGEST, Blocks, Coded, Dependence, Quantizer, peak_of, to_float32
from .seeded import SEED_BYTES, words_of

ROTATED = 128
"""Header flag: the values were rotated; the seed comes first among the side bytes."""

LONGEST = 1024
"""Longest piece that is rotated as one: padding then costs at most 1023 symbols."""

Wide = NDArray[np.float64]


def transform(rows: Wide) -> Wide:
    """Return the orthonormal Walsh-Hadamard transform of each row, its own inverse.

    Args:
        rows: float64 ``(count, length)``, ``length`` a power of 2.

    Takes ``length log2(length)`` additions a row (the fast transform, in Hadamard order).
    """
    count, length = rows.shape
    half = 1
    while half < length:
        pairs = rows.reshape(count, length // (2 * half), 2, half)
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        rows = np.stack([low + high, low - high], axis=2)
        half *= 2
    return rows.reshape(count, length) / math.sqrt(length)


@dataclass(frozen=True)
class Rotated:
    """``inner`` applied to H D x, in pieces of a power of 2; the last one is padded with zeros.

    D is diagonal with random signs from a seed in the payload, H the orthonormal Walsh-Hadamard
    transform. Linear and orthogonal, so the decoded vector is unbiased if that of ``inner`` is, and
    its error depends on ``x`` only if that of ``inner`` does. A rotation of its own for each
    payload does not commute with sums.
    """

    inner: Quantizer
    sums: bool = False
    contracts: bool = False

    @property
    def code(self) -> int:
        """The number of the inner quantizer; the flag tells them apart."""
        return self.inner.code

    @property
    def alphabet(self) -> int:
        """That of the inner quantizer."""
        return self.inner.alphabet

    @property
    def unbiased(self) -> bool:
        """As the inner quantizer."""
        return self.inner.unbiased

    @property
    def error(self) -> Dependence:
        """As the inner quantizer."""
        return self.inner.error

    def count(self, n: int) -> int:
        """Return the symbols of ``n`` coordinates and their padding."""
        return self.inner.count(sum(pieces_of(n)))

    def expansion(self, n: int) -> float:
        """As the inner quantizer; a rotation keeps lengths."""
        return self.inner.expansion(sum(pieces_of(n)))

    def encode(
        self, vector: Vector, blocks: Blocks, generator: np.random.Generator, step: float | None
    ) -> Coded:
        """Rotate and quantize.

        Raises:
            PayloadError: If a value is above 2**121 in magnitude, or by the inner quantizer.
        """
        peak_of(vector, LARGEST / 64)
        pieces, seed = pieces_of(len(vector)), generator.bytes(SEED_BYTES)
        padded = np.zeros(sum(pieces))
        padded[: len(vector)] = vector
        rotated = transform(_rows(padded * _signs(seed, len(padded)), pieces))
        inner = self.inner.encode(rotated.ravel().astype(np.float32), pieces, generator, step)
        return Coded(inner.symbols, seed + inner.side, inner.flags | ROTATED)

    def decode(self, coded: Coded, blocks: Blocks) -> Vector:
        """Decode and rotate back, float32 ``(n,)``."""
        if len(coded.side) < SEED_BYTES or not coded.flags & ROTATED:
            raise PayloadError(
                f"payload has {len(coded.side)} side bytes and flags {coded.flags:#04x}: must have "
                f"at least {SEED_BYTES} bytes and be rotated"
            )
        n = sum(blocks)
        pieces, seed = pieces_of(n), coded.side[:SEED_BYTES]
        bare = Coded(coded.symbols, coded.side[SEED_BYTES:], coded.flags & ~ROTATED)
        rotated = self.inner.decode(bare, pieces).astype(np.float64)
        padded = transform(_rows(rotated, pieces)).ravel() * _signs(seed, len(rotated))
        return to_float32(padded[:n])


def pieces_of(n: int) -> Blocks:
    """Return the lengths, all the same power of 2, of the pieces that ``n`` coordinates become.

    >>> pieces_of(5), pieces_of(1025)
    ((8,), (1024, 1024))
    """
    length = min(LONGEST, 1 << max(0, n - 1).bit_length())
    return (length,) * (-(-n // length))


def _rows(values: Wide, pieces: Blocks) -> Wide:
    return values.reshape(len(pieces), pieces[0] if pieces else 1)


def _signs(seed: bytes, n: int) -> Wide:
    return 1.0 - 2.0 * (words_of(seed, n) >> np.uint64(63)).astype(np.float64)
