"""What a person who owns several examples, or several clients, may expect."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from scipy.integrate import quad
from scipy.stats import binom, norm

from reticent.core.errors import PrivacyError
from reticent.privacy.accounting import epsilon
from reticent.privacy.events import (
    Composed,
    DeclaredPublic,
    Event,
    NonPrivate,
    PoissonGaussian,
    gaussian,
)
from reticent.privacy.groups import group_epsilon, pair_distribution
from reticent.privacy.mixtures import pair_pmf, sampled

DELTA = 1e-5
RELATIONS = ["add-or-remove-one", "replace-one"]


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_group_of_one_costs_exactly_epsilon(relation: str) -> None:
    events: list[Event] = [
        PoissonGaussian(0.1, 1.0, 20, relation),
        gaussian(5.0, 3, relation),
        DeclaredPublic("the layout"),
    ]
    assert group_epsilon(events, DELTA, 1) == epsilon(events, DELTA)


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize(("q", "sigma", "steps"), [(0.1, 1.0, 50), (0.5, 0.4, 5), (1.0, 2.0, 10)])
def test_mixtures_of_one_agree_with_the_library_for_one(
    q: float, sigma: float, steps: int, relation: str
) -> None:
    event = PoissonGaussian(q, sigma, steps, relation)
    own = pair_distribution((event,), 1, 1e-3).get_epsilon_for_delta(DELTA)
    assert own == pytest.approx(epsilon([event], DELTA), rel=1e-4)


@pytest.mark.parametrize(("size", "expected"), [(2, 11.6), (5, 36.1), (10, 92.6)])
def test_groups_agree_with_a_second_implementation(size: int, expected: float) -> None:
    event = PoissonGaussian(0.1, 1.0, 50)
    got = group_epsilon([event], DELTA, size)
    assert got == pytest.approx(expected, abs=0.06)
    assert group_epsilon([PoissonGaussian(0.1, 2 / 3, 50)], DELTA, size) > 1.3 * got
    if size > 2:
        return  # the other one is slow
    shifts = np.arange(size + 1.0)
    other = privacy_loss_distribution.from_mixture_gaussian_mechanism(
        1.0, shifts, binom.pmf(shifts, size, 0.1), value_discretization_interval=size**2 / 2000
    )
    assert got == pytest.approx(other.self_compose(50).get_epsilon_for_delta(DELTA), rel=1e-3)


def test_a_group_costs_less_than_by_the_conversion_for_any_mechanism() -> None:
    event, size = PoissonGaussian(0.1, 1.0, 50), 2
    converted = math.inf
    for exponent in np.arange(-11, -6, 0.25).tolist():
        one = epsilon([event], 10**exponent)
        if size * math.exp((size - 1) * one) * 10**exponent <= DELTA:
            converted = min(converted, size * one)
    assert epsilon([event], DELTA) * 1.5 < group_epsilon([event], DELTA, size) < 0.9 * converted
    assert converted < 30


@pytest.mark.parametrize("relation", RELATIONS)
def test_without_sampling_a_group_is_the_gaussian_of_its_size(relation: str) -> None:
    for size in (2, 7):
        apart = gaussian(8.0 / size, 4, relation)
        got = group_epsilon([gaussian(8.0, 4, relation)], DELTA, size)
        assert got == pytest.approx(epsilon([apart], DELTA), rel=1e-3)


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("size", [2, 3])
def test_one_step_is_never_below_exact_integrals(relation: str, size: int) -> None:
    q, sigma = 0.3, 0.8
    weights = binom.pmf(np.arange(size + 1), size, q)

    def mix(x: float, sign: int) -> float:
        return float(weights @ norm.pdf(x, sign * np.arange(size + 1), sigma))

    def upper(x: float) -> float:
        return mix(x, -1)

    def lower(x: float) -> float:
        return mix(x, 1) if relation == "replace-one" else float(norm.pdf(x, 0, sigma))

    event = PoissonGaussian(q, sigma, 1, relation)
    other = pair_distribution((event,), size, 1e-3)
    for eps in (0.0, 1.0, 3.0):

        def excess(x: float, eps: float = eps) -> float:
            return max(0.0, upper(x) - math.exp(eps) * lower(x))

        edges = pairwise(np.arange(-9, 6, 0.25).tolist())
        exact = sum(quad(excess, *ends, epsabs=1e-13, limit=200)[0] for ends in edges)
        got = float(other.get_delta_for_epsilon(eps))
        assert exact * (1 - 1e-6) <= got <= exact * 1.001 + 1e-12


def test_no_vectors_of_norm_one_do_worse_than_opposite_ones() -> None:
    # The proof says that the pair on a line, in opposite directions, is the worst there is.
    generator = np.random.Generator(np.random.Philox(key=3))
    q, sigma, order = 0.4, 0.7, 1.5
    z = generator.standard_normal((200_000, 2))
    length = sigma**-1

    def divergence(angle: float, reach: float) -> float:
        u = np.array([1.0, 0.0]) * length
        v = reach * length * np.array([math.cos(angle), math.sin(angle)])
        up = (1 - q) + q * np.exp(z @ u - u @ u / 2)
        down = (1 - q) + q * np.exp(z @ v - v @ v / 2)
        return float(np.maximum(up - order * down, 0).mean())

    worst = divergence(math.pi, 1.0)
    event = PoissonGaussian(q, sigma, 1, "replace-one")
    exact = float(pair_distribution((event,), 1, 1e-3).get_delta_for_epsilon(math.log(order)))
    assert worst == pytest.approx(exact, rel=0.02)
    for angle in (0.0, math.pi / 2, 2.0, 2.8):
        for reach in (0.0, 0.5, 1.0):
            assert divergence(angle, reach) < worst
    assert divergence(math.pi, 0.7) < worst


@pytest.mark.parametrize("relation", RELATIONS)
def test_larger_groups_cost_more_and_mixed_rounds_compose(relation: str) -> None:
    mixed = Composed((PoissonGaussian(0.1, 1.5, 5, relation), gaussian(9.0, 5, relation)))
    costs = [group_epsilon([mixed], DELTA, size) for size in (1, 2, 3, 8)]
    assert costs == sorted(costs)
    assert costs[1] > 1.3 * costs[0]
    half = Composed(mixed.events[:1])
    assert costs[1] > group_epsilon([half], DELTA, 2)


def test_large_groups_and_little_noise_stay_finite_and_bounded() -> None:
    for q, sigma, size in ((0.01, 1.5, 60), (1.0, 0.5, 200)):
        event = PoissonGaussian(q, sigma, 20)
        got = group_epsilon([event], DELTA, size)
        assert epsilon([event], DELTA) < got
        # Sampling only helps: the plain Gaussian of the whole group bounds every rate.
        assert got <= epsilon([gaussian(sigma / size, 20)], DELTA) * (1 + 1e-3)


def test_very_large_groups_fall_back_to_a_looser_bound() -> None:
    event = PoissonGaussian(0.1, 100.0, 2)
    got = group_epsilon([event], DELTA, 1001)
    assert group_epsilon([event], DELTA, 1000) < got
    assert got == epsilon([gaussian(100.0 / 1001, 2)], DELTA, "rdp")


@pytest.mark.parametrize("relation", RELATIONS)
def test_noise_too_little_for_a_grid_falls_back_to_a_looser_bound(relation: str) -> None:
    event = PoissonGaussian(0.1, 1e-4, 2, relation)
    assert group_epsilon([event], DELTA, 2) == epsilon([gaussian(5e-5, 2, relation)], DELTA, "rdp")


def test_a_tiny_delta_falls_back_to_a_looser_bound() -> None:
    event = PoissonGaussian(0.1, 1.0, 50)
    got = group_epsilon([event], 1e-14, 2)
    assert got == epsilon([gaussian(0.5, 50)], 1e-14, "rdp")
    assert got > group_epsilon([event], 1e-9, 2)


def test_rare_outcomes_move_to_the_far_end_not_away() -> None:
    few = sampled(1e-3, 1.0, 400, -1)
    assert few.weights.sum() == pytest.approx(1.0, abs=1e-15)
    assert len(few.weights) < 60
    assert few.means.min() == -400
    assert pair_pmf(few, sampled(1.0, 1.0, 0, 1), 0.05).to_dense_pmf().size > 10


def test_group_refusals_and_ends() -> None:
    event = PoissonGaussian(0.1, 1.0, 1)
    for size in (0, -1, 2.0, True):
        with pytest.raises(PrivacyError, match="size="):
            group_epsilon([event], DELTA, size)  # pyright: ignore[reportArgumentType]
    with pytest.raises(PrivacyError, match="delta="):
        group_epsilon([event], 0.0, 2)
    with pytest.raises(PrivacyError, match="unit"):
        group_epsilon([event, gaussian(1.0, unit="client")], DELTA, 2)
    assert group_epsilon([], DELTA, 2) == group_epsilon([DeclaredPublic("x")], DELTA, 2) == 0.0
    assert group_epsilon([event, NonPrivate()], DELTA, 2) == math.inf
