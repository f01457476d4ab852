"""What fits a budget: exact for one kind of round, a Renyi filter for any mixture."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from reticent.core.errors import PrivacyError
from reticent.privacy.accounting import ORDERS, epsilon, renyi
from reticent.privacy.calibrate import max_rounds
from reticent.privacy.events import Composed, DeclaredPublic, Event, NonPrivate, PoissonGaussian
from reticent.privacy.ledger import Budget, BudgetExceeded, Charge, Ledger
from reticent.privacy.ledger.afford import Afford

DELTA = 1e-5
EVENT = PoissonGaussian(0.2, 1.2, 1)
OTHER = PoissonGaussian(0.1, 1.0, 1)
PAIR = Composed((PoissonGaussian(0.2, 1.5, 1), PoissonGaussian(0.2, 10.0, 1)))
OPEN = DeclaredPublic("the teacher's knowledge of public data")


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "ledger") as opened:
        yield opened


def fitting(ledger: Ledger, events: list[Event], budget: Budget) -> list[bool]:
    """Return, for each event asked for in turn, whether it was charged."""
    answers = [
        ledger.charge_many(["a"], "run", number, event, budget)[0]
        for number, event in enumerate(events)
    ]
    return [isinstance(answer, Charge) for answer in answers]


@pytest.mark.parametrize(
    "event",
    [
        PAIR,
        Composed((PAIR, PoissonGaussian(0.2, 1.5, 2), OPEN), 2),
        PoissonGaussian(0.1, 1.5, 3, relation="replace-one"),
        PoissonGaussian(0.05, 1.0, 2, unit="client"),
    ],
)
def test_equal_rounds_of_any_make_fit_to_the_last_by_the_exact_accountant(
    ledger: Ledger, event: Event
) -> None:
    budget = Budget(5.0, DELTA)
    rounds = max_rounds(5.0, DELTA, event)
    assert rounds > 1
    assert epsilon([event.times(rounds)], DELTA) <= 5.0 < epsilon([event.times(rounds + 1)], DELTA)
    answers = fitting(ledger, [event] * (rounds + 2), budget)
    assert answers == [True] * rounds + [False] * 2


def test_steps_of_one_kind_fit_exactly_however_they_are_split(ledger: Ledger) -> None:
    most = max_rounds(5.0, DELTA, EVENT)
    events: list[Event] = [EVENT.times(3), EVENT, EVENT.times(most - 5), EVENT, EVENT]
    assert fitting(ledger, events, Budget(5.0, DELTA)) == [True, True, True, True, False]


def test_a_public_release_costs_nothing_and_spoils_nothing(ledger: Ledger) -> None:
    budget, most = Budget(5.0, DELTA), max_rounds(5.0, DELTA, EVENT)
    events: list[Event] = [OPEN, *[EVENT] * (most + 1), OPEN]
    assert fitting(ledger, events, budget) == [True, *[True] * most, False, True]
    assert ledger.spent("a", DELTA) == epsilon([EVENT.times(most)], DELTA)


def test_a_part_without_privacy_needs_an_infinite_budget(ledger: Ledger) -> None:
    mixed = Composed((EVENT, NonPrivate()))
    assert fitting(ledger, [mixed], Budget(1e9, DELTA)) == [False]
    assert fitting(ledger, [mixed], Budget(math.inf, DELTA)) == [True]
    assert ledger.spent("a", DELTA) == math.inf
    assert not fitting(ledger, [mixed, EVENT, OPEN], Budget(1e9, DELTA))[1]


def test_relations_and_units_do_not_mix_even_beyond_the_window(ledger: Ledger) -> None:
    ledger.charge("a", "run", 0, EVENT, Budget(9.0, DELTA))
    for other in (
        PoissonGaussian(0.2, 1.2, 1, relation="replace-one"),
        Composed((OPEN, PoissonGaussian(0.2, 1.2, 1, unit="client"))),
    ):
        for budget in (Budget(9.0, DELTA), Budget(9.0, DELTA, window=1)):
            with pytest.raises(PrivacyError, match="unit and relation"):
                ledger.charge("a", "run", 1, other, budget)


def filter_by_hand(events: list[PoissonGaussian], limit: float) -> list[bool]:
    """The filter once more, by a loop over orders: one order, fixed by the first event."""

    def room(order: float) -> float:
        return limit - math.log((order - 1) / order) + math.log(DELTA * order) / (order - 1)

    def cost(event: PoissonGaussian, index: int) -> float:
        return float(renyi(event.sampling_rate, event.noise_multiplier)[index]) * event.steps

    orders = [float(order) for order in ORDERS]
    best = max(range(len(orders)), key=lambda i: room(orders[i]) / cost(events[0], i))
    total, answers = 0.0, []
    for event in events:
        total += cost(event, best)
        answers.append(total <= room(orders[best]))
        total -= 0.0 if answers[-1] else cost(event, best)
    return answers


def test_mixtures_are_stopped_by_a_filter_at_an_order_fixed_in_advance(ledger: Ledger) -> None:
    generator = np.random.default_rng(8)
    events = [(EVENT, OTHER)[i].times(int(generator.integers(1, 4))) for i in (0, 1) * 30]
    answers = fitting(ledger, [*events], Budget(8.0, DELTA))
    charged = [event for event, fits in zip(events, answers, strict=True) if fits]
    assert 10 < len(charged) < 60
    # From the second event on the histories are mixed, and both filters agree.
    assert filter_by_hand([*events], 8.0) == answers
    # It is never laxer than the accountant that picks the best order in hindsight.
    assert epsilon(charged, DELTA) < epsilon(charged, DELTA, "rdp") <= 8.0


def test_the_filter_rejects_what_averaged_parameters_would_let_pass() -> None:
    history = ((EVENT.times(20).to_json(), 1),)
    strong = PoissonGaussian(1.0, 1.0, 2)
    averaged = PoissonGaussian((20 * 0.2 + 2) / 22, (20 * 1.2 + 2) / 22, 22)
    limit = epsilon([averaged], DELTA) * 1.05
    assert epsilon([EVENT.times(20), strong], DELTA) > limit
    assert not Afford(strong, Budget(limit, DELTA)).fits(history, history)


def test_the_order_depends_on_the_first_charge_and_not_on_later_ones() -> None:
    small, large = PoissonGaussian(0.01, 0.6, 1), PoissonGaussian(1.0, 8.0, 1)
    budget = Budget(8.0, DELTA)
    past = ((small.to_json(), 60), (large.to_json(), 10))
    turned = (past[1], past[0])
    most = [
        next(n for n in range(1, 999) if not Afford(large.times(n), budget).fits(history, history))
        for history in (past, turned)
    ]
    assert most[0] != most[1]


def test_a_charge_without_privacy_that_left_the_window_fixes_no_order() -> None:
    budget = Budget(8.0, DELTA)
    counted = ((EVENT.to_json(), 3), (OTHER.to_json(), 3))
    lifetime = ((NonPrivate().to_json(), 1), *counted)
    assert Afford(EVENT, budget).fits(counted, counted)
    assert Afford(EVENT, budget).fits(lifetime, counted)


def test_spent_is_told_in_the_refusal_and_counts_only_what_counts(ledger: Ledger) -> None:
    tight = Budget(epsilon([EVENT, EVENT], DELTA), DELTA)
    assert fitting(ledger, [EVENT, EVENT], tight) == [True, True]
    with pytest.raises(BudgetExceeded) as refusal:
        ledger.charge("a", "run", 9, PAIR, tight)
    assert refusal.value.spent == epsilon([EVENT, EVENT], DELTA)
    assert refusal.value.renews is None
