"""How long to wait before another try."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import SystemRandom


@dataclass
class Backoff:
    """Exponential back-off with full jitter in the upper half, so that devices spread out.

    The n-th wait in a row is uniform in [d/2, d], d = min(most, first * growth^(n-1)). A child that
    lived for ``settled`` seconds starts the row anew.

    Attributes:
        first: Longest first wait in seconds.
        growth: Of the waits; small, because a SuperLink that cannot be told that a SuperNode was
            killed turns its successor away until that has missed its heartbeats, for a minute.
        most: Longest wait.
        settled: Seconds of life that count as success: who is turned away ends sooner.
        draw: Returns a number from U[0, 1).
    """

    first: float = 5.0
    growth: float = 1.5
    most: float = 300.0
    settled: float = 30.0
    draw: Callable[[], float] = SystemRandom().random
    failures: int = 0

    def after(self, lived: float) -> float:
        """Return the seconds to wait after a child that lived so long."""
        self.failures = 1 if lived >= self.settled else self.failures + 1
        # The exponent is bounded: a device may fail for years.
        longest = min(self.most, self.first * self.growth ** min(self.failures - 1, 30))
        return longest * (0.5 + 0.5 * self.draw())
