"""Random numbers of many items at once, by counter: each depends on a key and the item alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_STEP, _FIRST, _SECOND = (
    np.uint64(value) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
_TURNS = 6


def mixed(key: bytes, items: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return 64 random bits for each item, uint64 of the same shape.

    SplitMix64 (Steele, Lea and Flood 2014): a Weyl sequence, of which the item is the counter, and
    a bijective mixing function; here twice, each with its own eight bytes of ``key`` (at least 16
    bytes, as :func:`reticent.core.seeds.derive_key` gives them). Not for secrets.
    """
    first, second = (np.uint64(int.from_bytes(key[i : i + 8], "big")) for i in (0, 8))
    with np.errstate(over="ignore"):
        counters = items.astype(np.uint64) * _STEP + first
        return _mix(_mix(counters) ^ second)


def uniforms(key: bytes, items: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return a draw from U(0, 1), both ends excluded, for each item."""
    return ((mixed(key, items) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def permuted(key: bytes, items: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return the place of each item in a permutation of ``range(count)``, int64 of the same shape.

    Guarantee: all ``count`` items have different places, so each is one of ``range(count)`` once.

    A Feistel network on an even number of bits, followed until it is back below ``count`` (Black
    and Rogaway 2002): a place costs a few draws, and nothing is stored. Not for secrets.

    Args:
        key: As of :func:`mixed`.
        items: From 0 to ``count`` - 1.
        count: At least 1.
    """
    half = max(1, -(-(count - 1).bit_length() // 2))
    places = items.astype(np.int64)
    left = np.ones(places.shape, dtype=bool)
    while left.any():
        places[left] = _feistel(key, places[left], half)
        left = places >= count
    return places


def _feistel(key: bytes, values: NDArray[np.int64], half: int) -> NDArray[np.int64]:
    mask = (1 << half) - 1
    high, low = values >> half, values & mask
    for turn in range(_TURNS):
        bits = mixed(key, low | (turn << half)) & np.uint64(mask)
        high, low = low, high ^ bits.astype(np.int64)
    return high << half | low


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * _FIRST
    value = (value ^ (value >> np.uint64(27))) * _SECOND
    return value ^ (value >> np.uint64(31))
