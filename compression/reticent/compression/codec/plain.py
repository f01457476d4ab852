"""Quantizers that do not round: all coordinates, or only the largest ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from reticent.core.errors import PayloadError
from reticent.core.update import Vector

from .base import Blocks, Coded, Dependence, check_finite, no_flags
from .escape import pack_escapes, unpack_escapes

_FAR = 255
"""Symbol of a gap of at least 255, whose excess is escaped."""


@dataclass(frozen=True)
class Identity:
    """Every coordinate as little-endian float32; lossless."""

    code: int = 0
    alphabet: int = 256
    unbiased: bool = True
    error: Dependence = "none"
    sums: bool = False
    contracts: bool = False

    def count(self, n: int) -> int:
        """Four symbols a coordinate."""
        return 4 * n

    def expansion(self, n: int) -> float:
        """No more than was there."""
        return 1.0

    def encode(
        self, vector: Vector, blocks: Blocks, generator: np.random.Generator, step: float | None
    ) -> Coded:
        """Return the bytes of ``vector``; ``generator`` and ``step`` are not used."""
        check_finite(vector)
        return Coded(vector.astype("<f4").view(np.uint8), b"")

    def decode(self, coded: Coded, blocks: Blocks) -> Vector:
        """Return the stored float32 values, ``(n,)``."""
        no_flags(coded)
        if coded.side:
            raise PayloadError(f"payload has {len(coded.side)} side bytes: identity has none")
        return floats_from(coded.symbols.data)


@dataclass(frozen=True)
class TopK:
    """The ``fraction`` of coordinates that are largest in magnitude, as position and float32.

    Biased: every other coordinate becomes 0. Which ones are kept depends on the ranking of the
    whole vector, so the error depends on the input.
    """

    fraction: float = 0.1
    code: int = 3
    alphabet: int = 256
    unbiased: bool = False
    error: Dependence = "dependent"
    sums: bool = False
    contracts: bool = True

    def count(self, n: int) -> int:
        """One symbol for the gap and four for the value of each kept coordinate."""
        return 5 * kept_of(n, self.fraction)

    def expansion(self, n: int) -> float:
        """No more than was there."""
        return 1.0

    def encode(
        self, vector: Vector, blocks: Blocks, generator: np.random.Generator, step: float | None
    ) -> Coded:
        """Return gaps between kept positions, then values; no randomness, no step."""
        check_finite(vector)
        k = kept_of(len(vector), self.fraction)
        order = np.argpartition(np.abs(vector), len(vector) - k) if 0 < k < len(vector) else None
        index = np.arange(k) if order is None else np.sort(order[len(vector) - k :])
        gaps = np.diff(index.astype(np.int64), prepend=-1) - 1
        near = np.minimum(gaps, _FAR).astype(np.uint8)
        values = vector[index].astype("<f4").view(np.uint8)
        return Coded(np.concatenate([near, values]), pack_escapes(gaps[gaps >= _FAR] - _FAR))

    def decode(self, coded: Coded, blocks: Blocks) -> Vector:
        """Return the kept values at their positions and 0 elsewhere, float32 ``(n,)``."""
        no_flags(coded)
        n = sum(blocks)
        k = kept_of(n, self.fraction)
        gaps = coded.symbols[:k].astype(np.int64)
        far = np.flatnonzero(gaps == _FAR)
        gaps[far] += unpack_escapes(coded.side, len(far))
        index = np.cumsum(gaps + 1) - 1
        if k and index[-1] >= n:
            raise PayloadError(f"payload places a value at {index[-1]}: must be below {n}")
        vector = np.zeros(n, dtype=np.float32)
        vector[index] = floats_from(coded.symbols[k:].tobytes())
        return vector


def kept_of(n: int, fraction: float) -> int:
    """Return how many coordinates of ``n`` are kept: the fraction, rounded up."""
    return min(n, math.ceil(fraction * n))


def floats_from(data: bytes | memoryview) -> Vector:
    """Return little-endian float32 values; PayloadError if one is not finite."""
    values = np.frombuffer(data, dtype="<f4").astype(np.float32)
    check_finite(values)
    return values
