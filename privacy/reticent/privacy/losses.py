"""Privacy loss distributions of events, composed (Koskela et al. 2020; Doroshenko et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, reduce
from typing import TYPE_CHECKING

import numpy as np

from .events import PoissonGaussian

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

FINEST, USUAL = 1e-7, 1e-3  # discretisation intervals of the privacy loss, in nats
CELLS = 1e6  # aim for at most this many grid cells after composition
COARSEST = 500.0  # interval beyond which its exponential leaves floats
LOST = 1e-15  # of delta, to the rounding of Fourier transforms, for each step and each event


def usable_delta(events: Sequence[PoissonGaussian], delta: float) -> float | None:
    """Return ``delta`` less what rounding may hide; None if too little of it would be left."""
    usable = delta - LOST * (len(events) + sum(event.steps for event in events))
    return usable if usable >= delta / 2 else None


def compose(events: Sequence[PoissonGaussian]) -> PrivacyLossDistribution:
    """Return a distribution that dominates that of all ``events`` together, at least one."""
    interval = interval_for(events)
    parts = [step(event, interval).self_compose(event.steps) for event in events]
    return reduce(lambda a, b: a.compose(b), parts)


def step(event: PoissonGaussian, interval: float) -> PrivacyLossDistribution:
    """Return the privacy loss distribution of one step of ``event``, on a grid of ``interval``.

    Pessimistic (connect the dots): its hockey-stick divergence is at least that of any
    neighbouring pair at every order. For ``add-or-remove-one`` the pair is (1 - q) N(0, s^2) +
    q N(1, s^2) against N(0, s^2), both ways (Zhu, Dong and Wang 2022, "Optimal accounting of
    differential privacy via characteristic function", theorem 11). For ``replace-one`` it is the
    first of those against its mirror image; :mod:`.mixtures` has the proof.
    """
    if event.relation == "replace-one" and event.sampling_rate == 1:
        # Everyone takes part, so sums differ by 2C: the Gaussian mechanism at half the noise.
        return _step(1.0, event.noise_multiplier / 2, "add-or-remove-one", interval)
    return _step(event.sampling_rate, event.noise_multiplier, event.relation, interval)


@lru_cache(maxsize=64)
def _step(rate: float, noise: float, relation: str, interval: float) -> PrivacyLossDistribution:
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    relations = {
        "add-or-remove-one": NeighboringRelation.ADD_OR_REMOVE_ONE,
        "replace-one": NeighboringRelation.REPLACE_ONE,
    }
    return privacy_loss_distribution.from_gaussian_mechanism(
        noise,
        sampling_prob=rate,
        value_discretization_interval=interval,
        neighboring_relation=relations[relation],
    )


def interval_for(events: Sequence[PoissonGaussian], group: int = 1) -> float:
    """Choose the grid: fine against the spread of a step's loss, coarse enough to be quick.

    A pessimistic grid is an upper bound at every interval, so this choice is about the digits and
    the time only. Connecting the dots adds at most interval**2 / 4 to the variance of a step's
    loss; a twentieth of its standard deviation keeps the error of epsilon below about 1e-3 of it.
    With very little noise (a server that sees single shares) the loss is large, and the grid
    follows its size, which again leaves the relative error small.
    """
    q, s, steps, distance = (
        np.array(values, dtype=float)
        for values in zip(
            *((e.sampling_rate, e.noise_multiplier, e.steps, _distance(e)) for e in events),
            strict=True,
        )
    )
    inverse = (s / (distance * group)) ** -2.0
    chi_square = q**2 * np.expm1(np.minimum(inverse, 50.0))
    variance = np.minimum(chi_square, q * (inverse + inverse**2 / 4))
    fine = 0.05 * math.sqrt(float(variance @ steps / steps.sum()))
    reach = float((q * inverse / 2) @ steps) + 8 * math.sqrt(float(variance @ steps))
    single = float(np.max(inverse / 2 + 10 * np.sqrt(inverse)))
    coarse = max(reach / CELLS, single / (CELLS / 20))
    return _round_down(max(min(fine, USUAL), coarse, FINEST))


def _distance(event: PoissonGaussian) -> float:
    return 2.0 if event.relation == "replace-one" else 1.0


def _round_down(value: float) -> float:
    # To 1, 2 or 5 times a power of ten, so that similar events share their distributions.
    power = 10.0 ** math.floor(math.log10(value))
    return max(m * power for m in (1, 2, 5) if m == 1 or m * power <= value)
