"""Random words that a payload's seed stands for, the same on every machine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SEED_BYTES = 16


def words_of(seed: bytes, n: int) -> NDArray[np.uint64]:
    """Return ``n`` words of a 16-byte ``seed``, uint64 ``(n,)``.

    They are raw Philox words (Salmon et al. 2011), whose stream NumPy keeps stable between
    versions, which it does not promise for ``Generator.random``.
    """
    key = np.frombuffer(seed, dtype="<u8").astype(np.uint64)
    return np.random.Philox(key=key).random_raw(n)
