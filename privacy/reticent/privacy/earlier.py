"""Weights that learned from the clients' data before a run: their event, and the noise after it."""

from __future__ import annotations

import math
from dataclasses import replace

from reticent.core.errors import PrivacyError
from reticent.core.plan import Plan, Privacy

from .accounting import epsilon
from .calibrate import LARGEST, MOST_STEPS, TOLERANCE, max_rounds, noise_multiplier_that_fits
from .events import Event, PoissonGaussian
from .ledger import Budget
from .ledger.afford import Afford, text_of


def earlier_event(plan: Plan) -> PoissonGaussian | None:
    """Return the event that a plan declares for the weights its models begin with; None if none."""
    trained = plan.teacher.trained
    if trained is None:
        return None
    return PoissonGaussian(
        trained.sampling_rate,
        trained.noise_multiplier,
        trained.steps,
        trained.relation,
        trained.unit,
    )


def noise_after(
    earlier: PoissonGaussian, step: PoissonGaussian, rounds: int, privacy: Privacy
) -> float:
    """Return the smallest noise multiplier that ``rounds`` of ``step`` may have after ``earlier``.

    Guarantee: ``earlier`` and the rounds compose to at most the target by ``pld``, and a device
    whose only history they are accepts all of them under the plan's hard stop, unless that lies
    below the target. A device may have seen ``earlier`` before it is asked for anything, so its
    ledger decides the rounds by a Renyi filter (:class:`~.ledger.afford.Afford`), which is stricter
    than ``pld``: where the stop equals the target, it decides.

    Raises:
        PrivacyError: If ``earlier`` alone spends the target, or no noise meets it.
    """
    target, delta = privacy.epsilon, privacy.delta
    if target is None:  # excluded by the caller
        raise ValueError("privacy has no epsilon")
    spent = epsilon([earlier], delta)
    if spent >= target:
        raise PrivacyError(
            f"teacher.trained: its own epsilon is {spent:.4g} at delta={delta:g}: must be below "
            f"privacy.epsilon={target:g}, which it is a part of"
        )

    def rounds_at(noise: float) -> list[Event]:
        return [earlier, replace(step, noise_multiplier=noise).times(rounds)]

    noise = noise_multiplier_that_fits(rounds_at, target, delta)
    stop = Budget(privacy.budget or target, delta)
    if stop.epsilon < target:
        return noise
    return _accepted(earlier, step, rounds, stop, noise)


def _accepted(
    earlier: PoissonGaussian, step: PoissonGaussian, rounds: int, stop: Budget, least: float
) -> float:
    """Return a noise, within TOLERANCE of the smallest from ``least`` on, that ledgers accept."""

    def accepts(noise: float) -> bool:
        return fits_after(earlier, replace(step, noise_multiplier=noise), rounds, stop)

    if accepts(least):
        return least
    if not accepts(LARGEST):
        raise PrivacyError(
            f"teacher.trained: leaves no room for {rounds} rounds in {stop.describe()} as ledgers "
            "count: must be weights that cost less, or privacy.budget above privacy.epsilon"
        )
    low, high = least, LARGEST
    while high > low * (1 + TOLERANCE):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if accepts(middle) else (middle, high)
    return high


def fits_after(earlier: Event, event: Event, rounds: int, stop: Budget) -> bool:
    """Return whether a ledger with nothing but ``earlier`` accepts ``rounds`` of ``event``."""
    before = ((text_of(earlier), 1),)
    if not Afford(earlier, stop).fits((), ()):
        return False
    history = before if rounds == 1 else (*before, (text_of(event), rounds - 1))
    return rounds < 1 or Afford(event, stop).fits(history, history)


def rounds_that_fit(earlier: Event | None, event: Event, limit: float, delta: float) -> int:
    """Return how many rounds of ``event`` a device's budget allows, after ``earlier`` if any.

    Raises:
        PrivacyError: If an argument is out of range.
    """
    most = max_rounds(limit, delta, event)
    if earlier is None or most in (0, MOST_STEPS):
        return most
    stop = Budget(limit, delta)
    fit, over = 0, most + 1
    while over - fit > 1:
        middle = (fit + over) // 2
        fit, over = (middle, over) if fits_after(earlier, event, middle, stop) else (fit, middle)
    return fit
