"""Privacy loss of pairs of Gaussian mixtures: what a group of units can do to a sampled sum.

Guarantee. Let a step release ``sum over sampled units + N(0, s^2 I)`` in any dimension, each unit
sampled independently and bounded by 1 in L2 norm. Let neighbouring data sets differ in ``k`` units,
and let ``w_i`` be the binomial probability that ``i`` of them are sampled. At every order the
hockey-stick divergence of neighbours is at most that of the one-dimensional pair

- ``sum_i w_i N(-i, s^2)`` against ``N(0, s^2)``, both ways, if all of them are added or all removed
  (Ganesh 2024, "Tight group-level DP guarantees for DP-SGD with sampling via mixture of Gaussians
  mechanisms"; Choquette-Choo et al. 2023, "Privacy amplification for matrix
  mechanisms", corollary 4.7);
- ``sum_i w_i N(-i, s^2)`` against ``sum_i w_i N(+i, s^2)`` if each is replaced by another unit.

Both are attained, so they are tight. For ``k = 1`` the second is the pair of ``replace-one``.

Proof of the second, which has the first as a special case. Divergences are jointly convex, so
condition on the other units sampled, whose sum shifts both sides alike. Write ``u_S`` and ``v_S``
for the sum of the sampled units of the group on each side, in units of s. The divergence at order
``a`` is ``E g(A - a B)`` with ``g = max(0, .)``, ``A = sum_S w_S exp(<u_S, Z> - |u_S|^2 / 2)``,
``B`` likewise with ``v_S``, and ``Z`` standard normal. (1) As a function of the Gaussian variables
``<u_S, Z>`` and ``<v_S, Z>``, the mixed derivatives of ``g(A - a B)`` are >= 0 within ``A`` and
within ``B`` and <= 0 across; so, with variances fixed, its mean grows with the correlations within
and falls with those across (Slepian's and Plackett's identity), and is largest when
``<u_S, Z> = |u_S| X`` and ``<v_S, Z> = -|v_S| X`` for one standard normal ``X``. (2) Raising one
``|u_S|`` then adds ``D`` to ``A``, of mean 0 and changing sign once, from - to +, as ``X`` grows.
``A - a B`` grows with ``X``, hence so does ``g'`` at it, and ``E g' D >= 0``: the mean of the
convex ``g`` does not fall. The same holds for ``|v_S|``. The norms are at most ``|S|``, which is
the pair above. Composition keeps domination, also when steps depend on earlier outputs (Zhu, Dong
and Wang 2022, theorem 10).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr, ndtr

if TYPE_CHECKING:
    from dp_accounting.pld.pld_pmf import PLDPmf

Floats = NDArray[np.float64]
REACH = 10.0  # standard deviations beyond which a tail holds less than 1e-23
NEGLIGIBLE = 1e-25  # mixture weights below this are moved to the largest shift that is kept


@dataclass(frozen=True)
class Mixture:
    """A mixture of normal distributions of one standard deviation.

    Attributes:
        means: float64, shape (components,), all >= 0 or all <= 0.
        weights: float64, shape (components,), > 0, summing to 1.
        noise: Standard deviation, > 0.
    """

    means: Floats
    weights: Floats
    noise: float

    def cdf(self, x: Floats) -> Floats:
        """Return the probability of at most ``x``; float64, shape of ``x``."""
        return ndtr((x[:, None] - self.means) / self.noise) @ self.weights

    def log_cdf(self, x: Floats) -> Floats:
        """Return the logarithm of :meth:`cdf`, exact far in the tail."""
        return _log_sum(log_ndtr((x[:, None] - self.means) / self.noise) + np.log(self.weights))

    def log_ratio(self, x: Floats) -> tuple[Floats, Floats]:
        """Return log of the density over that of N(0, noise^2), and its derivative, at ``x``."""
        slopes = self.means / self.noise**2
        terms = x[:, None] * slopes + (np.log(self.weights) - self.means * slopes / 2)
        value = _log_sum(terms)
        return value, np.exp(terms - value[:, None]) @ slopes


def sampled(rate: float, noise: float, size: int, sign: int) -> Mixture:
    """Return the law of a noised sum to which a group of ``size`` adds ``sign`` each, if sampled.

    Args:
        rate: Probability that a unit is sampled, in (0, 1].
        noise: Noise multiplier, > 0.
        size: Units in the group, >= 0; 0 gives the plain noise.
        sign: +1, or -1.
    """
    from scipy.stats import binom  # here, because it takes half a second to load

    count = np.arange(size + 1, dtype=float)
    weights = np.asarray(binom.pmf(count, size, rate), dtype=float)
    keep = weights > NEGLIGIBLE
    # Fewer means to handle; what is dropped goes to the end, where it reveals the most.
    last = len(keep) - 1 - int(np.argmax(keep[::-1]))
    if last < size:
        keep[size] = True
        weights[size] = max(float(weights[last + 1 :].sum()), NEGLIGIBLE)
    means, weights = sign * count[keep], weights[keep]
    return Mixture(means, weights / weights.sum(), noise)


def pair_pmf(upper: Mixture, lower: Mixture, interval: float) -> PLDPmf:
    """Return the privacy loss of ``upper`` against ``lower``, rounded up, on a grid.

    The loss log(upper / lower) must fall from left to right: means of ``upper`` <= 0 <= means of
    ``lower``. Connect the dots (Doroshenko et al. 2022, algorithm 1) over exact divergences at
    multiples of ``interval``; the two ends of the grid use upper bounds.
    """
    from dp_accounting.pld import pld_pmf

    left = -_tail(upper)
    right = REACH * upper.noise
    ends, _ = _loss(upper, lower, np.array([right, left]))
    first, last = math.floor(ends[0] / interval), math.ceil(ends[1] / interval)
    orders = np.arange(first, last + 1) * interval
    x = _inverse(upper, lower, orders, left, right)
    deltas = upper.cdf(x) - np.exp(orders + lower.log_cdf(x))
    # Beyond the grid's ends: no more than all of upper's tail, and no less of lower than there is.
    deltas[-1] = upper.cdf(np.array([left]))[0]
    deltas[0] = 1 - math.exp(orders[0] + lower.log_cdf(np.array([right]))[0])
    deltas = np.maximum.accumulate(np.clip(deltas, 0.0, 1.0)[::-1])[::-1]
    return pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(interval, first, last, deltas)


def spread(upper: Mixture, lower: Mixture) -> tuple[float, float, float]:
    """Return mean and variance of the loss under ``upper``, and the range that it covers.

    Good to about a percent; for choosing a grid.
    """
    x = np.linspace(-_tail(upper), REACH * upper.noise, 2001)
    mass, (loss, _) = np.diff(upper.cdf(x)), _loss(upper, lower, (x[1:] + x[:-1]) / 2)
    mean = float(mass @ loss)
    return mean, float(mass @ (loss - mean) ** 2), float(loss[0] - loss[-1])


def _tail(upper: Mixture) -> float:
    # The least reach to the left that leaves out less than 1e-22 of the mixture.
    near, far = 0.0, REACH * upper.noise - float(upper.means.min())
    while far - near > 1e-3 * upper.noise:
        middle = (near + far) / 2
        enough = upper.cdf(np.array([-middle]))[0] < 1e-22
        near, far = (near, middle) if enough else (middle, far)
    return far


def _loss(upper: Mixture, lower: Mixture, x: Floats) -> tuple[Floats, Floats]:
    (above, rising), (below, falling) = upper.log_ratio(x), lower.log_ratio(x)
    return above - below, rising - falling


def _inverse(upper: Mixture, lower: Mixture, orders: Floats, left: float, right: float) -> Floats:
    """Return where the loss equals each of ``orders``, kept within [left, right]."""
    knots = np.linspace(left, right, 2001)
    losses, _ = _loss(upper, lower, knots)
    place = np.searchsorted(-losses, -orders)  # losses fall
    low = knots[np.clip(place - 1, 0, len(knots) - 1)]
    high = knots[np.clip(place, 0, len(knots) - 1)]
    x = (low + high) / 2
    # Newton's method, and bisection wherever it would leave the bracket.
    for _ in range(60):
        value, slope = _loss(upper, lower, x)
        above = value > orders
        low, high = np.where(above, x, low), np.where(above, high, x)
        with np.errstate(divide="ignore", invalid="ignore"):
            step = x + (orders - value) / slope
        new = np.where((step > low) & (step < high), step, (low + high) / 2)
        moved = float(np.abs(new - x).max())
        x = new
        # The divergence is largest at the exact place, so an error enters it squared.
        if moved < 1e-10 * upper.noise:
            break
    return x


def _log_sum(terms: Floats) -> Floats:
    top = terms.max(axis=1)
    return top + np.log(np.exp(terms - top[:, None]).sum(axis=1))
