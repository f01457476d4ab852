"""Random sparsification: coordinates drawn by a seed, scaled so that the expectation is exact."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reticent.core.errors import PayloadError
from reticent.core.update import Vector

from .base import LARGEST, Blocks, Coded, Dependence, no_flags, peak_of, to_float32
from .plain import floats_from, kept_of
from .seeded import SEED_BYTES, words_of


@dataclass(frozen=True)
class RandomK:
    """``k`` of ``n`` coordinates, all sets equally likely, as float32; decoded times n / k.

    Unbiased: a coordinate is kept with probability k / n. The variance of coordinate x is
    x**2 (n / k - 1): the error depends on the value.
    """

    fraction: float = 0.1
    code: int = 18
    alphabet: int = 256
    unbiased: bool = True
    error: Dependence = "dependent"
    sums: bool = False
    contracts: bool = False

    def count(self, n: int) -> int:
        """Four symbols for each kept coordinate: positions follow from the seed."""
        return 4 * kept_of(n, self.fraction)

    def expansion(self, n: int) -> float:
        """What is kept is multiplied by n / k, and may be all that there is."""
        return n / max(1, kept_of(n, self.fraction))

    def encode(
        self, vector: Vector, blocks: Blocks, generator: np.random.Generator, step: float | None
    ) -> Coded:
        """Return the drawn coordinates; ``step`` is not used.

        Raises:
            PayloadError: If a value is above 2**127 k / n in magnitude: it would not fit float32.
        """
        k = kept_of(len(vector), self.fraction)
        peak_of(vector, LARGEST * k / max(1, len(vector)))
        seed = generator.bytes(SEED_BYTES)
        values = vector[_drawn(seed, len(vector), k)]
        return Coded(values.astype("<f4").view(np.uint8), seed)

    def decode(self, coded: Coded, blocks: Blocks) -> Vector:
        """Return the drawn values times n / k and 0 elsewhere, float32 ``(n,)``."""
        no_flags(coded)
        if len(coded.side) != SEED_BYTES:
            raise PayloadError(f"payload has {len(coded.side)} side bytes: must have {SEED_BYTES}")
        n = sum(blocks)
        k = kept_of(n, self.fraction)
        vector = np.zeros(n)
        values = floats_from(coded.symbols.tobytes()).astype(np.float64)
        vector[_drawn(coded.side, n, k)] = values * (n / max(1, k))
        return to_float32(vector)


def _drawn(seed: bytes, n: int, k: int) -> NDArray[np.int64]:
    """Return ``k`` positions below ``n``, ascending: those of the smallest words of the seed."""
    return np.sort(np.argsort(words_of(seed, n), kind="stable")[:k])
