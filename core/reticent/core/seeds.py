"""Random generators derived from names, so that no result depends on order or on processes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
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

    return torch.Generator().manual_seed(_number(derive_key(seed, *path)))


@contextmanager
def layers_draw(key: bytes, device: str = "cpu") -> Iterator[None]:
    """Key torch's global generators, and leave them as they were.

    Layers that draw in training, such as dropout, know no others.

    Args:
        key: What is drawn depends on its first 8 bytes, and on nothing else.
        device: Name of the torch device where layers draw; the CPU's generator is keyed too.
    """
    import torch

    number = _number(key)
    # Where there is no such device, as with meta, nothing draws on it.
    others = [device] if torch.device(device).type == "cuda" and torch.cuda.is_available() else []
    with torch.random.fork_rng(others):
        # torch.manual_seed would key every GPU, and those that are not forked would stay so.
        torch.default_generator.manual_seed(number)
        if others:
            torch.cuda.manual_seed(number)
        yield


def _number(key: bytes) -> int:
    return int.from_bytes(key[:8], "big") >> 1
