"""Renyi divergences of one step of the sampled Gaussian, under both neighbouring relations."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

_WHOLE = [*range(2, 65), *(round(64 * 2 ** (k / 4)) for k in range(1, 25))]
_BETWEEN = [*(1 + 10 ** (k / 8 - 4) for k in range(32)), *(k / 8 for k in range(9, 80) if k % 8)]
ORDERS: NDArray[np.float64] = np.array(sorted([*_WHOLE, *_BETWEEN]))
MOST_POINTS = 200_000  # of one quadrature; beyond, the closed bound alone is used


@lru_cache(maxsize=4096)
def renyi(
    sampling_rate: float, noise_multiplier: float, relation: str = "add-or-remove-one"
) -> NDArray[np.float64]:
    """Return the Renyi divergences of one step at :data:`ORDERS`, in nats; read-only.

    ``add-or-remove-one`` takes the larger of both directions, which is that of the mixture from
    the plain Gaussian (Mironov, Talwar and Zhang 2019, section 3).
    ``replace-one`` is the divergence of the pair of :mod:`.mixtures`, the same both ways because
    the pair is its own mirror image. That pair dominates every neighbouring pair in hockey-stick
    divergence at every order, and a Renyi divergence is an increasing function of an integral of
    those with weights >= 0 (Sason and Verdu 2016, "f-divergence inequalities"), so it dominates
    here too.
    """
    values = _renyi(sampling_rate, noise_multiplier, relation)
    values.setflags(write=False)  # every caller gets the same array
    return values


def _renyi(q: float, s: float, relation: str) -> NDArray[np.float64]:
    if relation == "replace-one":
        if q == 1:
            return _renyi(1.0, s / 2, "add-or-remove-one")
        return np.array([_log_moment_replace(q, s, a) / (a - 1) for a in ORDERS.tolist()])
    if q == 1:
        return ORDERS / (2 * s**2)
    return np.array([_log_moment(q, s, order) / (order - 1) for order in ORDERS.tolist()])


def _log_moment(q: float, s: float, order: float) -> float:
    """Return log E[((1 - q) + q exp((2x - 1) / 2s^2))^order] for x ~ N(0, s^2), or more."""
    # Minkowski's inequality in L^order: never less than the moment, and tight for little noise.
    bound = order * _log_mix(q, (order - 1) / (2 * s**2))
    if order == int(order):
        return _rounded_up(min(bound, _log_moment_whole(q, s, int(order))))
    if s < 0.1:
        return _rounded_up(bound)
    return _rounded_up(min(bound, _log_moment_between(q, s, order)))


def _log_moment_replace(q: float, s: float, order: float) -> float:
    """Return log of the integral of P^order Q^(1-order), or more.

    P = (1 - q) N(0, s^2) + q N(1, s^2) and Q its mirror image about 0.
    """
    # The integral is jointly convex in (P, Q), and its value for N(1, s^2), N(-1, s^2) is known.
    bound = _log_mix(q, 2 * order * (order - 1) / s**2)
    # The derivative of the integrand's logarithm times s^2 is -x + order w + (order - 1) v with
    # w and v in [0, 1]: beyond [0, 2 order - 1] it falls at least like a Gaussian tail.
    width, start, end = min(s / 16, s**2 / 3), -12 * s, 2 * order - 1 + 12 * s
    if (end - start) / width > MOST_POINTS:
        return _rounded_up(bound)
    x = np.arange(start, end, width)
    log_p = np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * s**2))
    log_q = np.logaddexp(math.log1p(-q), math.log(q) - (2 * x + 1) / (2 * s**2))
    density = -((x / s) ** 2) / 2 - math.log(s * math.sqrt(2 * math.pi))
    moment = _log_sum(order * log_p + (1 - order) * log_q + density) + math.log(width)
    return _rounded_up(min(bound, moment))


def _rounded_up(moment: float) -> float:
    # A margin for quadrature and cancellation: relative, and for rounding near 0, where it is tiny
    # beside the logarithm of delta that is added to the divergence.
    return max(0.0, moment) * (1 + 1e-9) + 1e-13


def _log_mix(q: float, exponent: float) -> float:
    return float(np.logaddexp(math.log1p(-q), math.log(q) + exponent))


def _log_moment_whole(q: float, s: float, order: int) -> float:
    k = np.arange(order + 1, dtype=float)
    binomial = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    terms = binomial + k * math.log(q) + (order - k) * math.log1p(-q) + k * (k - 1) / (2 * s**2)
    return _log_sum(terms)


def _log_moment_between(q: float, s: float, order: float) -> float:
    # The trapezoid rule converges exponentially for integrands analytic in a strip; the nearest
    # singularity lies pi s^2 off the real line.
    width = min(s / 16, s**2 / 3)
    x = np.arange(-12 * s, order + 12 * s, width)
    ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * s**2))
    density = -((x / s) ** 2) / 2 - math.log(s * math.sqrt(2 * math.pi))
    return _log_sum(order * ratio + density) + math.log(width)


def _log_sum(terms: NDArray[np.float64]) -> float:
    top = terms.max()
    return float(top + np.log(np.exp(terms - top).sum()))
