"""Epsilon agrees with published tables, with closed forms and with other implementations."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.rdp import RdpAccountant
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import norm

from reticent.core.errors import PrivacyError
from reticent.privacy.accounting import ORDERS, describe, epsilon, epsilon_curve, renyi
from reticent.privacy.events import NonPrivate, PoissonGaussian

DELTA = 1e-5
# q, sigma, steps: pld (dp-accounting 0.6), prv (Opacus 1.6, error 0.01), rdp (Opacus 1.6)
TABLE = [
    (0.001, 0.5, 1, 0.338, 0.347, 2.84),
    (0.01, 0.5, 100, 6.48, 6.49, 8.03),
    (0.1, 1.0, 100, 7.05, 7.06, 7.90),
    (0.1, 2.0, 1000, 8.28, 8.29, 8.94),
    (0.3, 0.5, 100, 83.3, 83.3, 90.3),
    (1.0, 1.0, 10, 17.86, 17.87, 19.05),
    (1.0, 4.0, 100, 13.21, 13.22, 14.13),
]
SETTINGS = [
    *(row[:3] for row in TABLE),
    (0.2, 0.85, 60),
    (0.01, 2.0, 100),
    (0.05, 0.7, 30),
    (0.5, 3.0, 200),
    (0.2, 0.3, 20),
    (0.02, 1.0, 500),
]


def gaussian_delta(mu: float, eps: float) -> float:
    """Balle and Wang 2018, theorem 8, in logarithms where they are needed."""
    lower = math.exp(eps + norm.logcdf(-mu / 2 - eps / mu))
    return float(norm.cdf(mu / 2 - eps / mu)) - lower


def gaussian_epsilon(mu: float, delta: float) -> float:
    return brentq(lambda e: gaussian_delta(mu, e) - delta, 0, mu**2 / 2 + 40 * mu, xtol=1e-10)


@pytest.mark.parametrize(("q", "sigma", "steps", "pld", "prv", "rdp"), TABLE)
def test_table(q: float, sigma: float, steps: int, pld: float, prv: float, rdp: float) -> None:
    events = [PoissonGaussian(q, sigma, steps)]
    assert epsilon(events, DELTA) == pytest.approx(pld, rel=0.01)
    assert epsilon(events, DELTA, "prv") == pytest.approx(prv, rel=0.01, abs=0.01)
    assert epsilon(events, DELTA, "rdp") == pytest.approx(rdp, rel=0.01)


@pytest.mark.parametrize(("q", "sigma", "steps"), SETTINGS)
def test_accountants_agree(q: float, sigma: float, steps: int) -> None:
    events = [PoissonGaussian(q, sigma, steps)]
    pld, prv, rdp = (epsilon(events, DELTA, a) for a in ("pld", "prv", "rdp"))
    assert prv == pytest.approx(pld, rel=0.01)
    assert rdp >= pld


def test_accountants_tell_a_third_less_noise() -> None:
    right = epsilon([PoissonGaussian(0.1, 1.0, 100)], DELTA)
    wrong = epsilon([PoissonGaussian(0.1, 2 / 3, 100)], DELTA)
    assert wrong > 1.5 * right


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 10), (4.0, 100), (0.3, 5), (0.03, 300)])
def test_full_sampling_is_the_gaussian_mechanism(sigma: float, steps: int) -> None:
    exact = gaussian_epsilon(math.sqrt(steps) / sigma, DELTA)
    got = epsilon([PoissonGaussian(1.0, sigma, steps)], DELTA)
    assert exact <= got <= exact * 1.001


@lru_cache
def losses(q: float, sigma: float, steps: int) -> NDArray[np.float64]:
    """Draw 200,000 privacy losses of the removal direction."""
    generator = np.random.Generator(np.random.Philox(key=7))
    loss = np.zeros(200_000)
    for _ in range(steps):
        x = sigma * generator.standard_normal(loss.size) + (generator.random(loss.size) < q)
        loss += np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * sigma**2))
    return loss


def sampled_delta(q: float, sigma: float, steps: int, eps: float) -> float:
    """Estimate the hockey-stick divergence at ``eps`` from draws."""
    shortfall = np.minimum(eps - losses(q, sigma, steps), 0.0)
    return float(-np.expm1(shortfall).mean())


@pytest.mark.parametrize(
    ("q", "sigma", "steps"), [(0.2, 0.03, 20), (0.2, 0.03, 5), (0.5, 0.1, 20), (0.1, 0.25, 20)]
)
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_little_noise_is_bounded_from_above(
    q: float, sigma: float, steps: int, accountant: str
) -> None:
    delta = 1e-2
    got = epsilon([PoissonGaussian(q, sigma, steps)], delta, accountant)
    assert math.isfinite(got)
    assert sampled_delta(q, sigma, steps, got) <= delta * 1.05
    # The check has teeth: with half the value, the divergence is far larger than delta.
    assert sampled_delta(q, sigma, steps, got / 2) > 2 * delta
    if accountant == "pld":
        assert sampled_delta(q, sigma, steps, got * 0.9) > delta


def test_little_noise_stays_finite_over_many_steps() -> None:
    for q in (0.01, 0.2, 1.0):
        event = PoissonGaussian(q, 0.03, 300)
        gaussian = gaussian_epsilon(math.sqrt(300) / 0.03, DELTA)
        # Sampling only helps, so the plain Gaussian bounds every q; q = 1 attains it.
        assert 0 < epsilon([event], DELTA) <= gaussian * 1.001
        assert epsilon([event], DELTA) <= epsilon([event], DELTA, "rdp")


@pytest.mark.parametrize(
    ("q", "sigma", "steps"),
    [(0.1, 1e-9, 1), (1e-300, 1e-6, 1), (1.0, 0.01, 10**6), (0.1, 0.1, 10**6), (0.5, 1e9, 10**6)],
)
@pytest.mark.parametrize("relation", ["add-or-remove-one", "replace-one"])
def test_extremes_are_finite_and_never_above_the_hard_stop(
    q: float, sigma: float, steps: int, relation: str
) -> None:
    event = PoissonGaussian(q, sigma, steps, relation)
    assert 0 <= epsilon([event], DELTA) <= epsilon([event], DELTA, "rdp") < math.inf


def heterogeneous() -> list[PoissonGaussian]:
    generator = np.random.Generator(np.random.Philox(key=1))
    rates, noises = [0.01, 0.05, 0.1, 0.3, 0.5], [0.7, 1.0, 1.5, 3.0]
    return [
        PoissonGaussian(
            float(generator.choice(rates)),
            float(generator.choice(noises)),
            int(generator.integers(2, 20)),
        )
        for _ in range(50)
    ]


def test_different_events_compose_and_are_never_averaged() -> None:
    events = heterogeneous()
    total = sum(e.steps for e in events)
    average = PoissonGaussian(
        sum(e.sampling_rate * e.steps for e in events) / total,
        sum(e.noise_multiplier * e.steps for e in events) / total,
        total,
    )
    pld, rdp = epsilon(events, DELTA), epsilon(events, DELTA, "rdp")
    assert epsilon([average], DELTA) < 0.8 * pld
    assert pld <= rdp < 1.15 * pld
    assert pld < 0.5 * sum(epsilon([e], DELTA) for e in events)


def test_different_gaussians_compose_exactly() -> None:
    events = [PoissonGaussian(1.0, 1.0, 3), PoissonGaussian(1.0, 5.0, 40)]
    exact = gaussian_epsilon(math.sqrt(3 + 40 / 25), DELTA)
    assert exact <= epsilon(events, DELTA) <= exact * 1.001
    assert epsilon(events, DELTA, "prv") == pytest.approx(exact, rel=0.01)


def test_epsilon_is_a_function_of_the_multiset_of_events() -> None:
    a, b = PoissonGaussian(0.1, 1.0, 10), PoissonGaussian(0.2, 2.0, 10)
    assert epsilon([a, b], DELTA) == epsilon([b, a], DELTA)
    assert epsilon([a, a], DELTA) == epsilon([PoissonGaussian(0.1, 1.0, 20)], DELTA)


@pytest.mark.parametrize("accountant", ["pld", "rdp", "prv"])
def test_nothing_costs_nothing_and_no_privacy_costs_everything(accountant: str) -> None:
    assert epsilon([], DELTA, accountant) == 0.0
    mixed = [PoissonGaussian(0.1, 1.0, 10), NonPrivate()]
    assert epsilon(mixed, DELTA, accountant) == math.inf


def test_a_tiny_delta_falls_back_to_a_bound_that_arithmetic_can_hold() -> None:
    events = [PoissonGaussian(0.1, 1.0, 1000)]
    assert epsilon(events, 1e-13) == epsilon(events, 1e-13, "rdp")
    assert epsilon(events, 1e-10) < epsilon(events, 1e-13)


@pytest.mark.parametrize(("q", "sigma"), [(0.01, 0.6), (0.1, 1.0), (0.5, 0.3), (0.2, 8.0)])
def test_whole_orders_agree_with_a_second_implementation(q: float, sigma: float) -> None:
    for index in np.flatnonzero(ORDERS.round() == ORDERS)[::9].tolist():
        order = float(ORDERS[index])
        other = RdpAccountant(orders=[order])
        event = PoissonSampledDpEvent(q, GaussianDpEvent(sigma))
        other.compose(SelfComposedDpEvent(event, 50))
        theirs = other.get_epsilon(DELTA)
        mine = 50 * renyi(q, sigma)[index] + math.log1p(-1 / order)
        mine -= math.log(DELTA * order) / (order - 1)
        assert max(mine, 0.0) == pytest.approx(theirs, rel=2e-9)


@pytest.mark.parametrize(("q", "sigma"), [(0.01, 0.6), (0.1, 1.0), (0.5, 0.3), (0.2, 2.0)])
def test_orders_between_agree_with_adaptive_quadrature(q: float, sigma: float) -> None:
    for index in np.flatnonzero((ORDERS.round() != ORDERS) & (ORDERS < 5))[::6].tolist():
        order = float(ORDERS[index])

        def moment(x: float, order: float = order) -> float:
            ratio = 1 - q + q * math.exp((2 * x - 1) / (2 * sigma**2))
            return norm.pdf(x, scale=sigma) * ratio**order

        edges = [-12 * sigma, 0.0, 0.5, 1.0, order, order + 12 * sigma]
        pieces = pairwise(edges)
        total = sum(quad(moment, *ends, epsabs=1e-13, epsrel=1e-11)[0] for ends in pieces)
        mine = renyi(q, sigma)[index] * (order - 1)
        assert mine == pytest.approx(math.log(total), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("q", [1e-6, 1e-7])
def test_divergences_that_rounding_could_hide_are_not_below_the_truth(q: float) -> None:
    # For tiny q the moment is 1 + order (order - 1) / 2 * q^2 * (exp(1 / sigma^2) - 1) and more.
    low = ORDERS < 20
    least = ORDERS[low] / 2 * q**2 * math.expm1(1.0)
    assert (renyi(q, 1.0)[low] >= least).all()


def test_curve() -> None:
    event = PoissonGaussian(0.1, 1.0, 2)
    curve = epsilon_curve(event, [0, 1, 10, 50], DELTA)
    assert curve[0] == 0.0
    assert curve[3] == epsilon([PoissonGaussian(0.1, 1.0, 100)], DELTA)
    assert curve == sorted(curve)
    # A new accountant in every round would report the same number every time.
    assert curve[2] > 1.2 * curve[1]


def test_refusals() -> None:
    event = PoissonGaussian(0.1, 1.0, 1)
    for delta in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(PrivacyError, match="delta="):
            epsilon([event], delta)
    with pytest.raises(PrivacyError, match=r"'gdp'.*pld, rdp, prv"):
        epsilon([event], DELTA, "gdp")
    with pytest.raises(PrivacyError, match="use 'pld'"):
        epsilon([PoissonGaussian(1.0, 0.03, 100)], DELTA, "prv")
    with pytest.raises(PrivacyError, match="unit"):
        epsilon([event, PoissonGaussian(0.1, 1.0, 1, unit="client")], DELTA)


def test_description_names_library_and_version() -> None:
    assert "dp-accounting 0." in describe("pld")
    assert "interval" in describe("pld")
    assert "orders" in describe("rdp")
    assert "Opacus" in describe("prv")
    with pytest.raises(PrivacyError, match="gdp"):
        describe("gdp")
