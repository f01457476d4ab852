"""Range asymmetric numeral systems in plain Python, word for word what constriction writes.

constriction (0.4 and 0.5) has no wheel for Linux on aarch64, where a device would need a Rust
compiler for it. This is its ``AnsCoder`` with a ``Categorical(perfect=False)``: 32-bit words, a
64-bit state, probabilities of 24 bits. Source: ``src/stream/stack.rs`` and
``src/stream/model/categorical.rs`` there.

A state is one number that grows with each symbol and gives up its lowest word when it would
outgrow 64 bits, so no step can begin before the last one ended: there is nothing to vectorize.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

from .histogram import Probabilities

Words = NDArray[np.uint32]
Indices = NDArray[np.int32]

_BITS = 24
_TOTAL = 1 << _BITS
_WORD = (1 << 32) - 1
_COARSE = 11  # a symbol is looked up by so many bits, and searched for only where that is unclear


def starts(probabilities: Probabilities) -> list[int]:
    """Return where each symbol's share of ``2**24`` begins, the first at 0; each is at least 1.

    Every operation is one of IEEE 754 binary64, in constriction's order, so that the integers are
    the same on every machine: one unit for each symbol, and of the rest what is due, rounded down.
    """
    values: list[float] = probabilities.tolist()
    total = 0.0
    for value in values:
        total += value
    scale = float(_TOTAL - len(values)) / total
    begun: list[int] = []
    before = 0.0
    for index, value in enumerate(values):
        begun.append(int(before * scale) + index)
        before += value
    return begun


def push(indices: Indices, probabilities: Probabilities) -> Words:
    """Return the words that hold ``indices``, uint32, the last of them not 0; none for zeros alone.

    Args:
        indices: int32 ``(count,)``, each below ``len(probabilities)``.
        probabilities: float64 ``(k,)``, k from 2 to 256, all of them positive.
    """
    begun = starts(probabilities)
    widths = _widths(begun)
    table = [
        (width << 40, width, _TOTAL - width, start)
        for width, start in zip(widths, begun, strict=True)
    ]
    words: list[int] = []
    state = 0
    for full, width, rest, start in map(table.__getitem__, indices[::-1].tolist()):
        if state >= full:
            words.append(state & _WORD)
            state >>= 32
        # (state // width << 24) + start + state % width, with one division
        state += state // width * rest + start
    while state:
        words.append(state & _WORD)
        state >>= 32
    return np.array(words, dtype=np.uint32)


def pop(words: Words, count: int, probabilities: Probabilities) -> tuple[Indices, bool]:
    """Return ``count`` indices, int32, and whether ``words`` held no more than those.

    As in constriction, words that are used up too early give index 0 from then on.

    Args:
        words: uint32, the last of them not 0.
        count: How many indices to read.
        probabilities: As for :func:`push`.
    """
    begun = starts(probabilities)
    widths = _widths(begun)
    likely = _likely(begun)
    stack: list[int] = words.tolist()
    state = 0
    for _ in range(min(2, len(stack))):
        state = state << 32 | stack.pop()
    found: list[int] = []
    for _ in range(count):
        part = state & (_TOTAL - 1)
        index = likely[part >> (_BITS - _COARSE)]
        if index < 0:
            index = bisect_right(begun, part) - 1
        found.append(index)
        state = (state >> _BITS) * widths[index] + part - begun[index]
        if state <= _WORD:
            if stack:
                state = state << 32 | stack.pop()
            elif not state:
                break
    indices = np.zeros(count, dtype=np.int32)
    indices[: len(found)] = found
    return indices, state == 0


def _widths(begun: list[int]) -> list[int]:
    return [end - start for start, end in zip(begun, [*begun[1:], _TOTAL], strict=True)]


def _likely(begun: list[int]) -> list[int]:
    """Return the symbol of each coarse part of the range, or -1 where it is shared by several."""
    edges = np.arange((1 << _COARSE) + 1) << (_BITS - _COARSE)
    first = np.searchsorted(begun, edges[:-1], side="right") - 1
    last = np.searchsorted(begun, edges[1:] - 1, side="right") - 1
    return np.where(first == last, first, -1).tolist()
