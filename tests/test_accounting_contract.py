"""What every accountant keeps to, under every relation and for every unit."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reticent.core.errors import PrivacyError
from reticent.privacy.accounting import ORDERS, epsilon, epsilon_curve, renyi, require_one_unit
from reticent.privacy.events import (
    Composed,
    DeclaredPublic,
    Event,
    NonPrivate,
    PoissonGaussian,
    gaussian,
)
from reticent.privacy.groups import group_epsilon

DELTA = 1e-5
ADD, REPLACE = "add-or-remove-one", "replace-one"
READERS = [("pld", ADD), ("pld", REPLACE), ("rdp", ADD), ("rdp", REPLACE), ("prv", ADD)]
every_reader = pytest.mark.parametrize(("accountant", "relation"), READERS)


@every_reader
def test_the_unit_does_not_change_the_arithmetic(accountant: str, relation: str) -> None:
    if accountant == "prv":
        return  # slow, and it is handed no unit
    events = [PoissonGaussian(0.1, 1.5, 8, relation, unit) for unit in ("example", "client")]
    assert len({epsilon([event], DELTA, accountant) for event in events}) == 1


@every_reader
def test_more_steps_more_sampling_less_noise_and_less_delta_cost_more(
    accountant: str, relation: str
) -> None:
    def cost(q: float, sigma: float, steps: int, delta: float = DELTA) -> float:
        return epsilon([PoissonGaussian(q, sigma, steps, relation)], delta, accountant)

    middle = cost(0.1, 1.5, 30)
    assert 0 < middle < math.inf
    assert cost(0.1, 1.5, 31) > middle > cost(0.1, 1.5, 29)
    assert cost(0.11, 1.5, 30) > middle > cost(0.09, 1.5, 30)
    assert cost(0.1, 1.4, 30) > middle > cost(0.1, 1.6, 30)
    assert cost(0.1, 1.5, 30, 1e-6) > middle > cost(0.1, 1.5, 30, 1e-4)
    assert cost(0.1, 1.0, 30) > 1.4 * middle


@every_reader
def test_order_does_not_matter_and_composed_events_equal_their_parts(
    accountant: str, relation: str
) -> None:
    a, b = (PoissonGaussian(0.1, s, n, relation) for s, n in ((1.5, 4), (3.0, 2)))
    apart = epsilon([a, b, a, b], DELTA, accountant)
    assert epsilon([b, b, a, a], DELTA, accountant) == apart
    assert epsilon([Composed((a, b), 2)], DELTA, accountant) == apart
    assert epsilon([Composed((a, b)), b, a], DELTA, accountant) == apart
    nested = Composed((Composed((a,), 2), Composed((Composed((b,)),)).times(2)))
    assert epsilon([nested], DELTA, accountant) == apart
    assert epsilon([Composed((a, b), 3)], DELTA, accountant) > apart


@every_reader
def test_public_adds_nothing_and_no_privacy_costs_everything(
    accountant: str, relation: str
) -> None:
    event, free = PoissonGaussian(0.1, 1.5, 4, relation), DeclaredPublic("the model's layout")
    assert epsilon([free], DELTA, accountant) == 0.0
    alone = epsilon([event], DELTA, accountant)
    assert epsilon([free, event, free], DELTA, accountant) == alone
    assert epsilon([Composed((event, free))], DELTA, accountant) == alone
    assert epsilon([event, NonPrivate()], DELTA, accountant) == math.inf
    assert epsilon([Composed((free, Composed((NonPrivate(),))))], DELTA, accountant) == math.inf


@every_reader
def test_what_is_not_an_event_is_refused_by_name(accountant: str, relation: str) -> None:
    with pytest.raises(PrivacyError, match="Laplace"):
        epsilon([type("Laplace", (), {})()], DELTA, accountant)
    other = ADD if relation == REPLACE else REPLACE
    mixed: list[Event] = [gaussian(1.0, relation=relation), gaussian(1.0, relation=other)]
    for events in (mixed, [Composed(tuple(mixed))]):
        with pytest.raises(PrivacyError, match="must agree in unit and relation"):
            epsilon(events, DELTA, accountant)
        with pytest.raises(PrivacyError, match="must agree in unit and relation"):
            require_one_unit(events)


def test_prv_refuses_the_relation_that_it_does_not_know() -> None:
    with pytest.raises(PrivacyError, match=r"prv.*relation='replace-one'.*use 'pld'"):
        epsilon([gaussian(1.0, relation=REPLACE)], DELTA, "prv")


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(
    ("q", "sigma", "steps"), [(0.1, 1.0, 50), (0.01, 0.6, 100), (0.5, 4.0, 30), (1.0, 2.0, 5)]
)
def test_replacing_one_costs_between_one_removed_and_a_group_of_two(
    q: float, sigma: float, steps: int, accountant: str
) -> None:
    added, replaced = (PoissonGaussian(q, sigma, steps, relation) for relation in (ADD, REPLACE))
    cost = epsilon([replaced], DELTA, accountant)
    assert epsilon([added], DELTA, accountant) < cost
    if accountant == "pld":
        assert cost <= group_epsilon([added], DELTA, 2) * (1 + 1e-9)
        assert cost <= epsilon([replaced], DELTA, "rdp")


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_replacing_one_of_all_is_exactly_the_gaussian_at_half_the_noise(accountant: str) -> None:
    for sigma, steps in ((2.0, 3), (7.0, 40)):
        replaced = gaussian(sigma, steps, REPLACE)
        assert epsilon([replaced], DELTA, accountant) == epsilon(
            [gaussian(sigma / 2, steps)], DELTA, accountant
        )


def test_an_adaptive_filter_may_sum_renyi_divergences() -> None:
    # The bound for a sequence is the sum over its steps at every order, so that no choice of
    # later parameters can undo what earlier steps have spent.
    a, b = PoissonGaussian(0.1, 1.0, 7, REPLACE), PoissonGaussian(0.3, 2.0, 5, REPLACE)
    total = 7 * renyi(0.1, 1.0, REPLACE) + 5 * renyi(0.3, 2.0, REPLACE)
    bounds = [
        total[i] + math.log1p(-1 / order) - math.log(DELTA * order) / (order - 1)
        for i, order in enumerate(ORDERS.tolist())
    ]
    assert epsilon([a, b], DELTA, "rdp") == pytest.approx(min(bounds), rel=1e-12)


def test_curves_take_composed_events() -> None:
    both = Composed((gaussian(4.0, unit="client"), gaussian(20.0, unit="client")))
    curve = epsilon_curve(both, [0, 1, 10], DELTA)
    assert curve == [0.0, epsilon([both], DELTA), epsilon([both.times(10)], DELTA)]
    assert curve == sorted(curve)


@settings(max_examples=8, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.05, 0.3, 1.0]), st.floats(0.8, 6), st.integers(1, 20)),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from([ADD, REPLACE]),
)
def test_the_reported_value_is_at_most_the_hard_stop(
    parts: list[tuple[float, float, int]], relation: str
) -> None:
    events = [PoissonGaussian(q, s, n, relation) for q, s, n in parts]
    reported, stop = epsilon(events, DELTA), epsilon(events, DELTA, "rdp")
    assert 0 <= reported <= stop
    assert stop <= 1.6 * reported + 0.6
    assert epsilon([Composed(tuple(events))], DELTA) == reported
