"""Accountants: epsilon as a pure function of events and delta.

Three independent accountants read the same events. ``pld`` (privacy loss distributions,
dp-accounting) is the value to report: nearly exact, and rounded up. ``rdp`` (a sum of Renyi
divergences) is looser, but stays valid when parameters are chosen adaptively. ``prv`` (Opacus) is
a second implementation of what ``pld`` computes, to check it against. None of them averages
parameters or composes event by event epsilon, and none returns less than the truth.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache, reduce
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from reticent.core.errors import DependencyError, PrivacyError

from .events import Event, NonPrivate, PoissonGaussian, merge

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

ACCOUNTANTS = ("pld", "rdp", "prv")
FINEST, USUAL = 1e-7, 1e-3  # discretisation intervals of the privacy loss, in nats
CELLS = 1e6  # aim for at most this many grid cells after composition
LARGEST_PRV, MOST_PRV_CELLS = 250.0, 4e6  # beyond, Opacus' PRV accountant is slow or never ends
_WHOLE = [*range(2, 65), *(round(64 * 2 ** (k / 4)) for k in range(1, 25))]
_BETWEEN = [*(1 + 10 ** (k / 8 - 4) for k in range(32)), *(k / 8 for k in range(9, 80) if k % 8)]
ORDERS: NDArray[np.float64] = np.array(sorted([*_WHOLE, *_BETWEEN]))


def epsilon(events: Iterable[Event], delta: float, accountant: str = "pld") -> float:
    """Return an upper bound on the epsilon of all ``events`` together, at ``delta``.

    No events give 0 and a :class:`NonPrivate` event gives infinity. The order of the events does
    not matter; equal calls are answered from memory.

    Args:
        events: What happened, with any mixture of parameters.
        delta: In (0, 1).
        accountant: ``pld``, ``rdp`` or ``prv``.

    Raises:
        PrivacyError: If ``delta`` or ``accountant`` is not allowed, if events of different units
            or relations are mixed, or if ``prv`` is asked for an epsilon that is out of its reach.
    """
    require_delta(delta)
    if accountant not in ACCOUNTANTS:
        raise PrivacyError(f"accountant={accountant!r}: must be one of {', '.join(ACCOUNTANTS)}")
    merged = merge(events)
    if any(isinstance(event, NonPrivate) for event in merged):
        return math.inf
    gaussians = [event for event in merged if isinstance(event, PoissonGaussian)]
    require_one_unit(gaussians)
    key = sorted(gaussians, key=lambda e: (e.sampling_rate, e.noise_multiplier))
    return _epsilon(tuple(key), float(delta), accountant) if key else 0.0


def epsilon_curve(event: PoissonGaussian, rounds: Sequence[int], delta: float) -> list[float]:
    """Return the ``pld`` epsilon after each number of rounds of one ``event`` each (0 allowed)."""
    return [
        epsilon([replace(event, steps=event.steps * count)] if count else [], delta)
        for count in rounds
    ]


def describe(accountant: str = "pld") -> str:
    """Return a line for the report: method, library and version, discretisation."""
    if accountant == "pld":
        return (
            f"privacy loss distributions, dp-accounting {version('dp-accounting')}, pessimistic "
            f"connect-the-dots, discretisation interval {USUAL:g} or finer (coarser only where "
            f"the composed distribution would need more than {CELLS:g} cells)"
        )
    if accountant == "rdp":
        return (
            f"Renyi divergences of the sampled Gaussian at {len(ORDERS)} orders from "
            f"{ORDERS[0]:g} to {ORDERS[-1]:g}, SciPy {version('scipy')}"
        )
    if accountant == "prv":
        return f"privacy random variables, Opacus {version('opacus')}, upper end of its interval"
    raise PrivacyError(f"accountant={accountant!r}: must be one of {', '.join(ACCOUNTANTS)}")


def require_delta(delta: float) -> None:
    """Raise :class:`PrivacyError` unless ``delta`` lies in (0, 1)."""
    if not 0 < delta < 1:
        raise PrivacyError(f"delta={delta!r}: must be > 0 and < 1")


def require_one_unit(events: Iterable[PoissonGaussian]) -> None:
    """Raise :class:`PrivacyError` if ``events`` are about different units or relations."""
    kinds = sorted({f"{event.unit}/{event.relation}" for event in events})
    if len(kinds) > 1:
        raise PrivacyError(
            f"events of {' and '.join(kinds)}: must agree in unit and relation, because an epsilon "
            "over different ones has no meaning"
        )


@lru_cache(maxsize=4096)
def _epsilon(events: tuple[PoissonGaussian, ...], delta: float, accountant: str) -> float:
    return {"pld": _pld, "rdp": _rdp, "prv": _prv}[accountant](events, delta)


# Privacy loss distributions (Koskela et al. 2020; Doroshenko et al. 2022)


def _pld(events: tuple[PoissonGaussian, ...], delta: float) -> float:
    # Fourier transforms leave errors of about 1e-16 a step; give that much of delta away.
    usable = delta - 1e-15 * (len(events) + sum(event.steps for event in events))
    if usable < delta / 2:
        return _rdp(events, delta)
    interval = _interval(events)
    parts = [
        _step(e.sampling_rate, e.noise_multiplier, interval).self_compose(e.steps) for e in events
    ]
    return float(reduce(lambda a, b: a.compose(b), parts).get_epsilon_for_delta(usable))


@lru_cache(maxsize=64)
def _step(rate: float, noise: float, interval: float) -> PrivacyLossDistribution:
    try:
        from dp_accounting.pld import privacy_loss_distribution
    except ImportError as error:  # pragma: no cover
        raise DependencyError(
            "dp-accounting is not installed: pip install 'reticent[server]'"
        ) from error
    return privacy_loss_distribution.from_gaussian_mechanism(
        noise, sampling_prob=rate, value_discretization_interval=interval
    )


def _interval(events: tuple[PoissonGaussian, ...]) -> float:
    """Choose the grid: fine against the spread of a step's loss, coarse enough to be quick.

    A pessimistic grid is an upper bound at every interval, so this choice is about the digits and
    the time only. Connecting the dots adds at most interval**2 / 4 to the variance of a step's
    loss; a twentieth of its standard deviation keeps the error of epsilon below about 1e-3 of it.
    With very little noise (a server that sees single shares) the loss is large, and the grid
    follows its size, which again leaves the relative error small.
    """
    q, s, steps = (
        np.array([getattr(e, name) for e in events], dtype=float)
        for name in ("sampling_rate", "noise_multiplier", "steps")
    )
    inverse = s**-2.0
    chi_square = q**2 * np.expm1(np.minimum(inverse, 50.0))
    variance = np.minimum(chi_square, q * (inverse + inverse**2 / 4))
    fine = 0.05 * math.sqrt(float(variance @ steps / steps.sum()))
    reach = float((q * inverse / 2) @ steps) + 8 * math.sqrt(float(variance @ steps))
    single = float(np.max(inverse / 2 + 10 / s))
    coarse = max(reach / CELLS, single / (CELLS / 20))
    return _round_down(max(min(fine, USUAL), coarse, FINEST))


def _round_down(value: float) -> float:
    # To 1, 2 or 5 times a power of ten, so that similar events share their distributions.
    power = 10.0 ** math.floor(math.log10(value))
    return max(m * power for m in (1, 2, 5) if m == 1 or m * power <= value)


# Renyi divergences (Mironov, Talwar and Zhang 2019, section 3.3)


def _rdp(events: tuple[PoissonGaussian, ...], delta: float) -> float:
    total = np.sum(
        [event.steps * renyi(event.sampling_rate, event.noise_multiplier) for event in events],
        axis=0,
    )
    # Canonne, Kamath and Steinke 2020, proposition 12; every order gives a valid bound.
    bounds = total + np.log1p(-1 / ORDERS) - (math.log(delta) + np.log(ORDERS)) / (ORDERS - 1)
    return max(0.0, float(bounds.min()))


@lru_cache(maxsize=4096)
def renyi(sampling_rate: float, noise_multiplier: float) -> NDArray[np.float64]:
    """Return the Renyi divergences of one step at :data:`ORDERS`, in nats; do not write to it."""
    q, s = sampling_rate, noise_multiplier
    if q == 1:
        return ORDERS / (2 * s**2)
    return np.array([_log_moment(q, s, order) / (order - 1) for order in ORDERS.tolist()])


def _log_moment(q: float, s: float, order: float) -> float:
    """Return log E[((1 - q) + q exp((2x - 1) / 2s^2))^order] for x ~ N(0, s^2), or more."""
    # Minkowski's inequality in L^order: never less than the moment, and tight for little noise.
    bound = order * _log_mix(q, (order - 1) / (2 * s**2))
    if order == int(order):
        return min(bound, _log_moment_whole(q, s, int(order)))
    if s < 0.1:
        return bound
    # A relative margin for the quadrature, far above its error (1e-12).
    return min(bound, _log_moment_between(q, s, order) * (1 + 1e-9))


def _log_mix(q: float, exponent: float) -> float:
    return float(np.logaddexp(math.log1p(-q), math.log(q) + exponent))


def _log_moment_whole(q: float, s: float, order: int) -> float:
    k = np.arange(order + 1, dtype=float)
    binomial = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    terms = binomial + k * math.log(q) + (order - k) * math.log1p(-q) + k * (k - 1) / (2 * s**2)
    # Cancellation may leave a hair less than 1: a moment of a likelihood ratio is at least 1.
    return max(0.0, _log_sum(terms))


def _log_moment_between(q: float, s: float, order: float) -> float:
    # The trapezoid rule converges exponentially for integrands analytic in a strip; the nearest
    # singularity lies pi s^2 off the real line.
    width = min(s / 16, s**2 / 3)
    x = np.arange(-12 * s, order + 12 * s, width)
    ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * s**2))
    density = -((x / s) ** 2) / 2 - math.log(s * math.sqrt(2 * math.pi))
    return max(0.0, _log_sum(order * ratio + density) + math.log(width))


def _log_sum(terms: NDArray[np.float64]) -> float:
    top = terms.max()
    return float(top + np.log(np.exp(terms - top).sum()))


# Privacy random variables (Gopi, Lee and Wutschitz 2021)


def _prv(events: tuple[PoissonGaussian, ...], delta: float) -> float:
    bound = _rdp(events, delta)
    error = min(max(bound / 1000, 1e-3), 1e-2)
    mesh = error / math.sqrt(sum(e.steps for e in events) * math.log(12e3 / delta) / 2)
    if bound > LARGEST_PRV or 2 * (bound + 3) / mesh > MOST_PRV_CELLS:
        raise PrivacyError(
            f"accountant='prv' with an epsilon of up to {bound:.4g} after "
            f"{sum(e.steps for e in events)} steps: must be at most {LARGEST_PRV:g} and fit a mesh "
            f"of {MOST_PRV_CELLS:g} cells; use 'pld'"
        )
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(e.noise_multiplier, e.sampling_rate, e.steps) for e in events]
    # Its own choice of Renyi orders and log(0) at q = 1 warn without consequence for the bound.
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta, eps_error=error))
