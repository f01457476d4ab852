"""From a budget to a schedule: the noise that meets it, or the rounds that fit in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache

from reticent.core.errors import PrivacyError

from .accounting import epsilon as epsilon_of
from .accounting import require_delta
from .events import Event, PoissonGaussian, merge

SMALLEST, LARGEST = 0.1, 1000.0
TOLERANCE = 1e-3
MOST_STEPS = 10**7


def noise_multiplier_for(
    epsilon: float,
    delta: float,
    sampling_rate: float,
    steps: int,
    relation: str = "add-or-remove-one",
) -> float:
    """Return the smallest noise multiplier in [0.1, 1000] that meets a budget, by ``pld``.

    The result lies at most a relative 1e-3 above the smallest, never below it: its own epsilon is
    at most ``epsilon``. A budget that 0.1 already meets gives 0.1.

    Raises:
        PrivacyError: If an argument is out of range, or no noise multiplier meets the budget.
    """
    _require_budget(epsilon, delta)

    def events(noise: float) -> list[Event]:
        return [PoissonGaussian(sampling_rate, noise, steps, relation)]

    noise, least = _smallest_noise(events, epsilon, delta)
    if noise is None:
        raise PrivacyError(
            f"epsilon={epsilon:g} at delta={delta:g} is a budget no schedule of {steps} steps at "
            f"sampling_rate={sampling_rate:g} can meet: even noise_multiplier={LARGEST:g} gives "
            f"{least:.4g}; use fewer rounds or steps, a lower sampling_rate, or a larger epsilon"
        )
    return noise


def noise_multiplier_that_fits(
    make_events: Callable[[float], Iterable[Event]], epsilon: float, delta: float
) -> float:
    """Return the smallest noise multiplier in [0.1, 1000] for which made events meet a budget.

    As :func:`noise_multiplier_for`, for any schedule: rounds of several events, or events of
    which only some depend on the noise.

    Args:
        make_events: The events of the whole schedule for a noise multiplier; more noise must not
            raise their epsilon.
        epsilon: The budget, > 0.
        delta: In (0, 1).

    Raises:
        PrivacyError: If an argument is out of range, or no noise multiplier meets the budget.
    """
    _require_budget(epsilon, delta)
    noise, least = _smallest_noise(make_events, epsilon, delta)
    if noise is None:
        raise PrivacyError(
            f"epsilon={epsilon:g} at delta={delta:g} is a budget that these events cannot meet: "
            f"even noise_multiplier={LARGEST:g} gives {least:.4g}; use fewer rounds or steps, a "
            "lower sampling_rate, or a larger epsilon"
        )
    return noise


def max_steps(
    epsilon: float,
    delta: float,
    sampling_rate: float,
    noise_multiplier: float,
    relation: str = "add-or-remove-one",
) -> int:
    """Return the largest number of steps whose ``pld`` epsilon is at most ``epsilon``.

    0 when not even one step fits; counts above ten million are returned as ten million.

    Raises:
        PrivacyError: If an argument is out of range.
    """
    return max_rounds(epsilon, delta, PoissonGaussian(sampling_rate, noise_multiplier, 1, relation))


@lru_cache(maxsize=1024)
def max_rounds(epsilon: float, delta: float, round_event: Event) -> int:
    """Return how many times ``round_event`` fits: the most with a ``pld`` epsilon <= ``epsilon``.

    0 when not even one fits; ten million when more do, as for an event that spends nothing.

    Raises:
        PrivacyError: If an argument is out of range.
    """
    _require_budget(epsilon, delta)
    if not merge([round_event]):
        return MOST_STEPS

    def fits(rounds: int, accountant: str = "pld") -> bool:
        return epsilon_of([round_event.times(rounds)], delta, accountant) <= epsilon

    # The Renyi bound is quick and never lower, so what fits by it fits.
    good = _largest(lambda rounds: fits(rounds, "rdp"), 0, 1)
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


def _smallest_noise(
    make_events: Callable[[float], Iterable[Event]], epsilon: float, delta: float
) -> tuple[float | None, float]:
    """Return the smallest noise that meets the budget, or None and the least epsilon there is."""

    def excess(noise: float, accountant: str = "pld") -> float:
        # In logarithms, because epsilon is nearly a power of the noise.
        value = epsilon_of(make_events(noise), delta, accountant)
        return math.log(max(value, 1e-300) / epsilon) if value > 0 else -math.inf

    # The Renyi bound is quick and never lower, so what meets it is a safe upper end.
    high = _root(lambda noise: excess(noise, "rdp"), SMALLEST, LARGEST, 0.01)
    if high is None and excess(LARGEST) > 0:
        return None, epsilon_of(make_events(LARGEST), delta)
    return _root(excess, SMALLEST, high or LARGEST, TOLERANCE), 0.0


def _root(
    excess: Callable[[float], float], low: float, high: float, tolerance: float
) -> float | None:
    """Return a value of excess <= 0, within ``tolerance`` of the smallest; None if there is none.

    ``excess`` falls. Brackets the smallest downwards from ``high``, then closes in by the secant
    in logarithms, aiming a third of the tolerance to the side that was not hit last.
    """
    above = excess(high)
    if above > 0:
        return None
    stride = 0.95
    while (guess := max(low, high * stride)) < high and (below := excess(guess)) <= 0:
        high, above, stride = guess, below, stride * stride
    if guess == high:
        return low
    low, aim, tries = guess, 1.0, 0
    while high > low * (1 + tolerance):
        tries += 1
        guess = _secant(low, below, high, above) * (1 + aim * tolerance / 3)
        # The secant may creep along one side: halve every third time.
        if tries % 3 == 0 or not low < guess < high:
            guess = math.sqrt(low * high)
        value = excess(guess)
        if value > 0:
            low, below, aim = guess, value, 1.0
        else:
            high, above, aim = guess, value, -1.0
    return high


def _secant(low: float, below: float, high: float, above: float) -> float:
    share = below / (below - above) if above > -math.inf else 0.5
    return low * (high / low) ** share


def _require_budget(epsilon: float, delta: float) -> None:
    require_delta(delta)
    if not 0 < epsilon < math.inf:
        raise PrivacyError(f"epsilon={epsilon!r}: must be > 0 and finite")
