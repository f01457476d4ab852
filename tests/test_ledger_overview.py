"""What the owner is shown, and how refusals are counted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from reticent.core.errors import LedgerError
from reticent.privacy.accounting import epsilon
from reticent.privacy.clock import Reading
from reticent.privacy.events import PoissonGaussian
from reticent.privacy.ledger import Budget, BudgetExceeded, Head, Ledger, Overview

DELTA = 1e-5
EVENT = PoissonGaussian(0.2, 1.2, 1)
TWICE = epsilon([PoissonGaussian(0.2, 1.2, 2)], DELTA)
FREE = Budget(math.inf, DELTA)


class HandClock:
    def __init__(self) -> None:
        self.uptime = 0

    def read(self) -> Reading:
        return Reading("boot", self.uptime)


@pytest.fixture
def hand() -> HandClock:
    return HandClock()


@pytest.fixture
def ledger(tmp_path: Path, hand: HandClock) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "ledger", clock=hand) as opened:
        yield opened


def refused(ledger: Ledger, run: str, number: int, budget: Budget) -> None:
    with pytest.raises(BudgetExceeded):
        ledger.charge("a", run, number, EVENT, budget)


def test_an_unknown_device_has_zeros(ledger: Ledger) -> None:
    budget = Budget(4.0, DELTA)
    view = ledger.overview("nobody", budget)
    empty = Head(0, "00" * 32)
    assert view == Overview(
        "nobody", budget, None, None, 0.0, 0.0, 4.0, 0, 0, 0, 0, None, None, None, None, empty
    )


def test_overview_tells_window_and_lifetime_apart(ledger: Ledger, hand: HandClock) -> None:
    three = epsilon([PoissonGaussian(0.2, 1.2, 3)], DELTA)
    budget = Budget(three * 1.01, DELTA, window=100)
    for number, wait in enumerate((5, 90, 20, 30)):
        hand.uptime += wait
        ledger.charge("a", f"run {number % 2}", number, EVENT, budget)
        ledger.charge("b", "run 0", number, EVENT, FREE)
    ledger.store_release("a", "run 0", 2, b"x")
    hand.uptime += 10
    refused(ledger, "run 0", 4, budget)
    view = ledger.overview("a", budget)
    assert view.lifetime == epsilon([PoissonGaussian(0.2, 1.2, 4)], DELTA)
    assert view.spent == ledger.spent_in_window("a", budget) == three
    assert view.remaining == budget.epsilon - three
    assert (view.charges, view.releases, view.refusals, view.runs) == (4, 1, 1, 2)
    assert (view.first, view.last, view.now) == (0, 140, 150)
    assert view.renews == 90 + 100 + 1
    assert view.head == ledger.head()
    assert (view.unit, view.relation) == ("example", "add-or-remove-one")
    life = ledger.overview("a", Budget(50.0, DELTA))
    assert (life.now, life.renews) == (None, None)
    assert life.spent == life.lifetime == view.lifetime
    assert life.remaining == 50.0 - life.lifetime
    assert ledger.overview("a", FREE).remaining == math.inf


def test_a_server_that_asks_two_hundred_times_costs_one_row(ledger: Ledger) -> None:
    tight = Budget(TWICE, DELTA)
    for number in range(2):
        ledger.charge("a", "run", number, EVENT, tight)
    head, size = ledger.head(), ledger._store.db.execute("PRAGMA page_count").fetchone()
    for number in range(2, 202):
        answer = ledger.charge_many(["a"], f"run {number % 7}", number, EVENT, tight)[0]
        assert isinstance(answer, BudgetExceeded)
    assert ledger.overview("a", tight).refusals == 200
    assert ledger.head() == head == ledger.verify()
    assert ledger._store.db.execute("PRAGMA page_count").fetchone() == size


def test_a_refused_round_asked_again_is_one_refusal(ledger: Ledger) -> None:
    tight = Budget(TWICE / 9, DELTA)
    for run, number in [("r", 0), ("r", 0), ("r", 0), ("r", 1), ("s", 1), ("s", 1)]:
        refused(ledger, run, number, tight)
    assert ledger.overview("a", tight).refusals == 3
    assert ledger.overview("b", tight).refusals == 0


def test_a_forged_count_of_refusals_is_noticed(ledger: Ledger) -> None:
    tight = Budget(TWICE / 9, DELTA)
    refused(ledger, "r", 0, tight)
    ledger._store.db.execute("UPDATE refusals SET refused = 0")
    for use in (ledger.verify, lambda: ledger.overview("a", tight)):
        with pytest.raises(LedgerError, match="refusals was altered"):
            use()
