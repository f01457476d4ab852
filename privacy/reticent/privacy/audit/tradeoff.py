"""Trade-off functions: everything a claim says about an attacker's errors, at every delta."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, reduce

import numpy as np
from numpy.typing import NDArray

from reticent.core.errors import PrivacyError

from ..events import Event, PoissonGaussian, merge
from ..losses import interval_for, step

_POINTS = 400
_FAR = 1e-10
_COARSER = 5  # than the grid of a reported epsilon: five times as quick, and a little pessimistic
_LARGEST = 300.0  # no number of canaries tells larger epsilons apart, and exp() must not overflow


@dataclass(frozen=True, eq=False)
class TradeOff:
    """A symmetric trade-off function f: least type II error at each type I error.

    ``f(x) = max_k max(0, 1 - delta_k - e^epsilon_k x, e^-epsilon_k (1 - delta_k - x))`` (Dong, Roth
    and Su 2022, proposition 2.5), at finitely many points of the profile delta(epsilon). Fewer
    points and larger deltas only make f smaller, so a rejection of it stays valid.

    Attributes:
        epsilons: Ascending from 0, float64 ``(k,)``.
        deltas: Upper bounds of delta at each of them, float64 ``(k,)``.
    """

    epsilons: NDArray[np.float64]
    deltas: NDArray[np.float64]

    def __call__(self, x: float) -> float:
        """Return f(x) for a type I error in [0, 1]."""
        steep = 1 - self.deltas - self._growth * x
        flat = (1 - self.deltas - x) / self._growth
        return max(0.0, float(steep.max()), float(flat.max()))

    def blow_up_inverse(self, y: float) -> float:
        """Return the least probability that a neighbour gives to an event of probability ``y``.

        It is f(1 - y), computed without the cancellation in 1 - y.
        """
        steep = 1 - self.deltas - self._growth * (1 - y)
        flat = (y - self.deltas) / self._growth
        return max(0.0, float(steep.max()), float(flat.max()))

    @cached_property
    def _growth(self) -> NDArray[np.float64]:
        return np.exp(self.epsilons)


def trade_off(events: Iterable[Event], noise: float = 1.0) -> TradeOff:
    """Return the trade-off function of all ``events`` together, with their noise times ``noise``.

    From the composed privacy loss distribution (:mod:`reticent.privacy.losses`, pessimistic), so
    it is never above the true one. Both directions of a relation are in it.

    Raises:
        PrivacyError: If an event is not private, there is none, or ``noise`` is not above zero.
    """
    parts = [e for e in merge(events) if isinstance(e, PoissonGaussian)]
    if not parts or len(parts) != len(merge(events)):
        raise PrivacyError("a trade-off function needs events that all have noise, at least one")
    if not 0 < noise < math.inf:
        raise PrivacyError(f"noise={noise!r}: must be finite and > 0")
    return _trade_off(tuple(sorted(parts, key=repr)), float(noise))


@lru_cache(maxsize=512)
def _trade_off(events: tuple[PoissonGaussian, ...], noise: float) -> TradeOff:
    scaled = scaled_noise(events, noise)
    interval = _COARSER * interval_for(scaled)
    parts = [step(e, interval).self_compose(e.steps) for e in scaled]
    whole = reduce(lambda a, b: a.compose(b), parts)
    far = float(whole.get_epsilon_for_delta(_FAR))
    if not math.isfinite(far):
        raise PrivacyError(f"noise={noise:g} times the claimed noise: epsilon is out of reach")
    epsilons = np.linspace(0.0, min(max(far, 1e-3), _LARGEST), _POINTS)
    deltas = np.asarray(whole.get_delta_for_epsilon(epsilons.tolist()), dtype=np.float64)
    # What rounding of the Fourier transforms may hide.
    deltas = np.minimum(1.0, deltas + 1e-13)
    return TradeOff(epsilons, deltas)


def scaled_noise(events: Iterable[Event], noise: float) -> list[PoissonGaussian]:
    """Return what ``events`` spend with all their noise multiplied by ``noise``."""
    parts = [e for e in merge(events) if isinstance(e, PoissonGaussian)]
    return [replace(e, noise_multiplier=e.noise_multiplier * noise) for e in parts]
