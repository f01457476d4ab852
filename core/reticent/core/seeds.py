"""Random generators derived from names, so that no result depends on order or on processes."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive_key(seed: int, *path: str | int) -> bytes:
    """Return 32 bytes that depend on ``seed`` and every element of ``path``, and on nothing else.

    Elements are length-prefixed before hashing (SHA-256), so ``("ab", "c")`` and ``("a", "bc")``
    give different keys.
    """
    digest = hashlib.sha256()
    for part in (seed, *path):
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(4, "big"))
        digest.update(text)
    return digest.digest()


def numpy_generator(seed: int, *path: str | int) -> np.random.Generator:
    """Return a NumPy generator (Philox, counter-based) keyed by ``seed`` and ``path``."""
    key = int.from_bytes(derive_key(seed, *path)[:16], "big")
    return np.random.Generator(np.random.Philox(key=key))


def torch_generator(seed: int, *path: str | int) -> torch.Generator:
    """Return a CPU torch generator keyed by ``seed`` and ``path``."""
    import torch  # here, because devices refuse orders before they need it

    key = int.from_bytes(derive_key(seed, *path)[:8], "big") >> 1
    return torch.Generator().manual_seed(key)
