"""From a test of a claim to a lower bound on epsilon: the claim's family with less noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..accounting import epsilon, require_delta
from ..events import Event
from .tradeoff import TradeOff, scaled_noise, trade_off

_FINENESS = 32
_REACH = 4 * _FINENESS
"""The noise is searched from 1/16 to 16 times the claimed one."""

_FARTHEST = 10 * _FINENESS
"""Up to 1,024 times where that is not enough: few canaries show little of a very large claim."""

_LARGEST = 100.0


@dataclass(frozen=True)
class FamilyBound:
    """A lower bound on epsilon within a family of mechanisms.

    The search ends where epsilon is far above what canaries can show, so a bound may be too low.

    Attributes:
        epsilon: Members of the family of at most this epsilon are rejected; 0 if none is.
        noise: The noise of that member, as a multiple of the claimed noise.
    """

    epsilon: float
    noise: float


Test = Callable[[TradeOff], bool]


class Family:
    """A claim, and what it would be with all of its noise multiplied by 2^(step / 32)."""

    def __init__(self, events: Iterable[Event]) -> None:
        """Take the claimed events; step 0 is the claim itself."""
        self.events = tuple(events)

    def member(self, step: int) -> TradeOff:
        """Return the trade-off function of one member; the less noise, the longer it takes."""
        return trade_off(self.events, 2.0 ** (step / _FINENESS))

    def least_rejected(self, rejects: Test, below: int | None = None) -> int | None:
        """Return the step of least noise that a test rejects; None if none under ``below`` is."""
        rejected, stride = _REACH if below is None else below - 1, 4
        while not rejects(self.member(rejected)):
            if below is not None or rejected >= _FARTHEST:
                return None
            rejected += 2 * _FINENESS
        while not self._ends(rejected) and rejects(self.member(max(rejected - stride, -_REACH))):
            rejected, stride = max(rejected - stride, -_REACH), min(2 * stride, 16)
        if self._ends(rejected):
            return rejected
        kept = max(rejected - stride, -_REACH - 1)
        while rejected - kept > 1:
            middle = (rejected + kept) // 2
            kept, rejected = (kept, middle) if rejects(self.member(middle)) else (middle, rejected)
        return rejected

    def _ends(self, step: int) -> bool:
        """Return whether to look no further: members beyond take long and say nothing new."""
        return step <= -_REACH or self.member(step).epsilons[-1] > _LARGEST


def family_bound(rejects: Test, events: Iterable[Event], delta: float) -> FamilyBound:
    """Return the largest epsilon that a test rejects among mechanisms of the claimed kind.

    The family is the claimed events with all their noise multiplied by one factor. The bound is at
    least the claim's epsilon exactly if the claim itself is rejected. For a mechanism of the family
    it holds with the confidence of the test: to be too large, the test must reject the true
    mechanism. A mechanism outside the family (another sampling rate, say) is measured by the member
    that it is not told apart from.

    Args:
        rejects: A test of one trade-off function; what it rejects, it rejects with more noise too.
        events: The claim.
        delta: Where epsilon is stated.
    """
    require_delta(delta)
    family = Family(events)
    step = family.least_rejected(rejects)
    if step is None:
        return FamilyBound(0.0, math.inf)
    noise = 2.0 ** (step / _FINENESS)
    return FamilyBound(epsilon(scaled_noise(family.events, noise), delta), noise)
