"""The whole trade-off of a mechanism in one number: Gaussian differential privacy, with its regret.

After Gomez, Kulynych, Kaissis, Calmon, Hayes, Balle and Honkela 2025, "Gaussian DP for reporting
differential privacy guarantees in machine learning" (arXiv 2503.10945). An epsilon says how well
an attacker does at one delta; mu bounds the whole curve of the two error rates of any test of who
was in the data: with false alarms at rate a, at least ``Phi(Phi^-1(1 - a) - mu)`` is missed. A
regret near 0 says that nothing was lost by stating mu alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr, ndtr, ndtri, ndtri_exp

from .accounting import spent
from .events import Event, PoissonGaussian
from .losses import COARSEST, compose, interval_for

if TYPE_CHECKING:
    from dp_accounting.pld.pld_pmf import PLDPmf

Floats = NDArray[np.float64]
FLOOR = 1e-10  # smallest probability of a hit looked at
HIDDEN = 3e-10  # the mu at which hits exceed alarms by FLOOR at best, rounded up
MOST_ORDERS = 20_000  # at which the regret is looked for


@dataclass(frozen=True)
class Gdp:
    """A summary by Gaussian differential privacy.

    Attributes:
        mu: The smallest mu for which the trade-off curve of ``N(0, 1)`` against ``N(mu, 1)`` lies
            on or below the mechanism's, wherever an attacker hits with probability 1e-10 or more.
            0 if nothing was spent; infinite if there was no privacy, or so little that an attacker
            may miss with a probability below 1e-10 and raise as few false alarms (a mu above about
            12.7).
        regret: The smallest shift D >= 0 for which ``f(a + D) - D <= g(a)`` at every rate ``a``
            of false alarms, where ``f`` is the mechanism's curve and ``g`` that of ``mu`` (the
            Delta-divergence of Kaissis, Kolek, Balle, Hayes and Rueckert 2024, "Beyond the
            calibration point"): how far mu overstates what an attacker may learn. 0 is exact.
    """

    mu: float
    regret: float


def gdp(events: Iterable[Event]) -> Gdp:
    """Return the smallest mu of all ``events`` together, and its regret.

    Rounded against the mechanism: the curve is that of the pessimistic distribution of ``pld``,
    and it is compared at its corners, between which it is straight and a Gaussian's curve is
    convex, so that nothing is missed in between. So the mechanism has at most the delta of a
    Gaussian of ``mu`` at every epsilon at which its own is 1e-10 or more. The floor is not a
    formality: if probabilities may be as small as one likes, a sampled Gaussian has no mu below
    that of its unsampled self. (The authors' package gdpnum cuts where *false alarms* fall below
    1e-10, which leaves out corners at which delta is still large; where the regret is small, as in
    its published example, both agree.)

    Raises:
        PrivacyError: If events of different units or relations are mixed.
    """
    gaussians = spent(events)
    if gaussians is None:
        return Gdp(math.inf, 0.0)
    return _gdp(gaussians) if gaussians else Gdp(0.0, 0.0)


@lru_cache(maxsize=256)
def _gdp(events: tuple[PoissonGaussian, ...]) -> Gdp:
    if interval_for(events) > COARSEST:
        return Gdp(math.inf, 0.0)
    distribution = compose(events)
    # Both directions are needed: each gives the half of the curve that is steeper than -1.
    halves = [distribution._pmf_remove, distribution._pmf_add]  # pyright: ignore
    corners = [_corners(half) for half in halves]
    mu = max(_mu(*corner) for corner in corners)
    if not mu < math.inf:
        return Gdp(mu, 0.0)
    # Beyond, the weight of the regret is below 1e-21.
    orders = np.linspace(0.0, 50.0, MOST_ORDERS)
    deltas = distribution.get_delta_for_epsilon(orders)  # pyright: ignore[reportArgumentType]
    return Gdp(mu, _regret(mu, orders, np.asarray(deltas)))


def _corners(half: PLDPmf) -> tuple[Floats, Floats]:
    """Return log of false alarms, and hits, at corners with losses > 0; float64, same shape.

    The test says "in the data" when the loss exceeds some value. It hits with the probability that
    lies above it, and raises false alarms with the same, weighed by exp(-loss).
    """
    dense = half.to_dense_pmf()
    probs = dense._probs  # pyright: ignore[reportAttributeAccessIssue]
    lowest = dense._lower_loss  # pyright: ignore[reportAttributeAccessIssue]
    losses = (lowest + np.arange(len(probs))) * dense._discretization
    hits = np.cumsum(probs[::-1])[::-1] + dense._infinity_mass
    kept = losses > 0
    with np.errstate(divide="ignore"):
        weighed = np.log(np.maximum(probs[kept], 0.0)) - losses[kept]
    # In logarithms: alarms may be far below what a float can hold where hits are not rare.
    log_alarms = np.logaddexp.accumulate(weighed[::-1])[::-1]
    # The last corner: what cannot happen but to someone in the data raises no false alarm.
    return np.append(log_alarms, -math.inf), np.append(hits[kept], dense._infinity_mass)


def _mu(log_alarms: Floats, hits: Floats) -> float:
    """Return the largest mu of a Gaussian's curve through one of the corners."""
    advantage = hits - np.exp(log_alarms)
    if not np.any(advantage > FLOOR):
        return HIDDEN
    if 1 - hits[0] < FLOOR:
        return math.inf
    seen = (hits > FLOOR) & (advantage > FLOOR)
    return max(HIDDEN, float(np.max(ndtri(hits[seen]) - ndtri_exp(log_alarms[seen]))))


def _regret(mu: float, orders: Floats, deltas: Floats) -> float:
    """Return the largest of ``(delta of mu - delta) / (1 + exp(order))`` over ``orders`` >= 0.

    The shift that brings one convex decreasing curve below another along the diagonal is measured
    on its tangents: the tangent of slope -exp(e) lies at ``1 - delta(e)``, and moving by D along
    the diagonal lowers it by ``D (1 + exp(e))``.
    """
    gaussian = ndtr(mu / 2 - orders / mu) - np.exp(orders + log_ndtr(-mu / 2 - orders / mu))
    # Dividing by 1 + exp(e), without overflow.
    return max(0.0, float(np.max((gaussian - deltas) * _weight(orders))))


def _weight(orders: Floats) -> Floats:
    """Return ``1 / (1 + exp(orders))`` for ``orders`` >= 0."""
    return np.exp(-orders) / (1 + np.exp(-orders))
