"""Epsilon for someone who owns several of the units that a mechanism protects one by one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache, reduce
from typing import TYPE_CHECKING

import numpy as np

from reticent.core.errors import PrivacyError

from .accounting import epsilon, require_delta, spent
from .events import Event, PoissonGaussian
from .losses import CELLS, COARSEST, USUAL, interval_for, usable_delta
from .mixtures import pair_pmf, sampled, spread
from .renyi import ORDERS

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

MOST_CELLS, MOST_VALUES = 1e5, 1e6  # of one step: cells of its grid, times means of its mixture
LARGEST_GROUP = 1000


def group_epsilon(events: Iterable[Event], delta: float, size: int) -> float:
    """Return an upper bound on the epsilon, at ``delta``, of a group of ``size`` units together.

    Guarantee: the outputs of data sets that differ in at most ``size`` units (all present or all
    absent under ``add-or-remove-one``, each exchanged for any other under ``replace-one``) are
    (epsilon, delta)-indistinguishable to everyone against whom the events hold. For unit
    ``example`` it bounds what is learned about a person who owns at most ``size`` examples of one
    client; for unit ``client``, about someone who owns ``size`` clients.

    Tight: every step's privacy loss is that of the pair of mixtures that a group attains
    (:mod:`.mixtures`), composed by ``pld``. At equal delta it is below the conversion that holds
    for any mechanism (``size`` times epsilon at ``size * exp((size - 1) * epsilon)`` times delta).
    Size 1 is exactly :func:`.epsilon`. Where ``delta`` is so small that rounding could hide it,
    and for more than a thousand units, sampling is ignored and the Renyi divergences of the plain
    Gaussian with ``size`` times the sensitivity are used, which is valid and looser.

    Args:
        events: What happened; no events give 0, a :class:`.NonPrivate` one infinity.
        delta: In (0, 1).
        size: Units of one owner, >= 1.

    Raises:
        PrivacyError: If ``delta`` or ``size`` is not allowed, or units or relations are mixed.
    """
    require_delta(delta)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise PrivacyError(f"size={size!r}: must be a whole number of units >= 1")
    gaussians = spent(events)
    if gaussians is None:
        return math.inf
    if size == 1 or not gaussians:
        return epsilon(gaussians, delta)
    return _group_epsilon(gaussians, float(delta), size)


@lru_cache(maxsize=256)
def _group_epsilon(events: tuple[PoissonGaussian, ...], delta: float, size: int) -> float:
    usable = usable_delta(events, delta)
    if usable is None or size > LARGEST_GROUP:
        return _without_sampling(events, delta, size)
    interval = _interval(events, size)
    if interval > COARSEST:
        return _without_sampling(events, delta, size)
    value = float(pair_distribution(events, size, interval).get_epsilon_for_delta(usable))
    return value if interval <= USUAL else min(value, _without_sampling(events, delta, size))


def pair_distribution(
    events: Sequence[PoissonGaussian], size: int, interval: float
) -> PrivacyLossDistribution:
    """Return the composed distribution of a group of ``size`` units, rounded up, on a grid."""
    parts = [_step(event, size, interval).self_compose(event.steps) for event in events]
    return reduce(lambda a, b: a.compose(b), parts)


def _step(event: PoissonGaussian, size: int, interval: float) -> PrivacyLossDistribution:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    q, s = event.sampling_rate, event.noise_multiplier
    gone = sampled(q, s, size, -1)
    if event.relation == "replace-one":
        return PrivacyLossDistribution(pair_pmf(gone, sampled(q, s, size, 1), interval))
    none = sampled(q, s, 0, 1)
    return PrivacyLossDistribution(
        pair_pmf(gone, none, interval), pair_pmf(none, sampled(q, s, size, 1), interval)
    )


def _interval(events: Sequence[PoissonGaussian], size: int) -> float:
    """Return a grid as for single units, but coarse enough for the losses of a group."""
    mean, variance, coarse = 0.0, 0.0, 0.0
    for event in events:
        q, s = event.sampling_rate, event.noise_multiplier
        other = size if event.relation == "replace-one" else 0
        gone = sampled(q, s, size, -1)
        mean_of_step, variance_of_step, widest = spread(gone, sampled(q, s, other, 1))
        mean += event.steps * mean_of_step
        variance += event.steps * variance_of_step
        coarse = max(coarse, widest / min(MOST_CELLS, MOST_VALUES / len(gone.means)))
    return max(interval_for(events), coarse, (mean + 8 * math.sqrt(variance)) / CELLS)


def _without_sampling(events: Sequence[PoissonGaussian], delta: float, size: int) -> float:
    distance = 2 * size if events[0].relation == "replace-one" else size
    rho = sum(e.steps * (distance / e.noise_multiplier) ** 2 / 2 for e in events)
    bounds = rho * ORDERS + np.log1p(-1 / ORDERS)
    bounds -= (math.log(delta) + np.log(ORDERS)) / (ORDERS - 1)
    return max(0.0, float(bounds.min()))
