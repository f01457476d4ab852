"""From a budget to a schedule: the noise that meets it, or the steps that fit in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

from reticent.core.errors import PrivacyError

from .accounting import epsilon as epsilon_of
from .accounting import require_delta
from .events import PoissonGaussian

SMALLEST, LARGEST = 0.1, 1000.0
TOLERANCE = 1e-3
MOST_STEPS = 10**7


def noise_multiplier_for(epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """Return the smallest noise multiplier in [0.1, 1000] that meets a budget, by ``pld``.

    The result lies at most a relative 1e-3 above the smallest, never below it: its own epsilon is
    at most ``epsilon``. A budget that 0.1 already meets gives 0.1.

    Raises:
        PrivacyError: If an argument is out of range, or no noise multiplier meets the budget.
    """
    _require_budget(epsilon, delta)

    def meets(noise: float, accountant: str = "pld") -> bool:
        event = PoissonGaussian(sampling_rate, noise, steps)
        return epsilon_of([event], delta, accountant) <= epsilon

    # The Renyi bound is quick and never lower, so what meets it is a safe upper end.
    high = _bisect(lambda noise: meets(noise, "rdp"), SMALLEST, LARGEST, 0.05)
    if high is None:
        high = LARGEST if meets(LARGEST) else None
    if high is None:
        least = epsilon_of([PoissonGaussian(sampling_rate, LARGEST, steps)], delta)
        raise PrivacyError(
            f"epsilon={epsilon:g} at delta={delta:g} is a budget no schedule of {steps} steps at "
            f"sampling_rate={sampling_rate:g} can meet: even noise_multiplier={LARGEST:g} gives "
            f"{least:.4g}; use fewer rounds or steps, a lower sampling_rate, or a larger epsilon"
        )
    low = high
    while low > SMALLEST and meets(low):
        high, low = low, max(SMALLEST, low * 0.85)
    return _bisect(meets, low, high, TOLERANCE) or high


@lru_cache(maxsize=1024)
def max_steps(epsilon: float, delta: float, sampling_rate: float, noise_multiplier: float) -> int:
    """Return the largest number of steps whose ``pld`` epsilon is at most ``epsilon``.

    0 when not even one step fits; counts above ten million are returned as ten million.

    Raises:
        PrivacyError: If an argument is out of range.
    """
    _require_budget(epsilon, delta)

    def fits(steps: int, accountant: str = "pld") -> bool:
        event = PoissonGaussian(sampling_rate, noise_multiplier, steps)
        return epsilon_of([event], delta, accountant) <= epsilon

    good = _largest(lambda steps: fits(steps, "rdp"), 0, 1)
    return _largest(fits, good, max(1, good // 8))


def _largest(fits: Callable[[int], bool], good: int, stride: int) -> int:
    """Return the largest count from ``good`` on that fits, for a test that ends for good."""
    while good < MOST_STEPS and fits(min(good + stride, MOST_STEPS)):
        good, stride = min(good + stride, MOST_STEPS), 2 * stride
    bad = min(good + stride, MOST_STEPS + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def _bisect(
    meets: Callable[[float], bool], low: float, high: float, tolerance: float
) -> float | None:
    """Return a value that meets, within ``tolerance`` of the smallest; None if ``high`` fails."""
    if meets(low):
        return low
    if not meets(high):
        return None
    while high > low * (1 + tolerance):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if meets(middle) else (middle, high)
    return high


def _require_budget(epsilon: float, delta: float) -> None:
    require_delta(delta)
    if not 0 < epsilon < math.inf:
        raise PrivacyError(f"epsilon={epsilon!r}: must be > 0 and finite")
