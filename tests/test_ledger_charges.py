"""What a charge, a refusal, a retry and a release mean, exactly."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from reticent.core.errors import LedgerError, PrivacyError
from reticent.privacy.accounting import epsilon
from reticent.privacy.calibrate import max_steps
from reticent.privacy.events import NonPrivate, PoissonGaussian
from reticent.privacy.ledger import Budget, BudgetExceeded, Charge, Head, Ledger, Spent

DELTA = 1e-5
EVENT = PoissonGaussian(0.2, 1.2, 5)
OTHER = PoissonGaussian(0.1, 1.0, 5)
FREE = Budget(math.inf, DELTA)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "ledger") as opened:
        yield opened


def test_charge_is_recorded_and_survives_closing(tmp_path: Path) -> None:
    with Ledger.open(tmp_path) as ledger:
        charge = ledger.charge("a", "run", 3, EVENT, FREE)
        assert charge == Charge("a", "run", 3, EVENT, 1, repeated=False)
        head = ledger.head()
    with Ledger.open(tmp_path) as again:
        assert again.head() == again.verify() == head
        assert again.events("a") == [EVENT]
        assert again.spent("a", DELTA) == epsilon([EVENT], DELTA)
        assert (again.events("b"), again.spent("b", DELTA)) == ([], 0.0)
        assert again.devices() == ["a"]


def test_key_is_private_and_full(tmp_path: Path) -> None:
    Ledger.open(tmp_path).close()
    key = tmp_path / "ledger.key"
    assert len(key.read_bytes()) == 32
    assert key.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "ledger.db").stat().st_mode & 0o777 == 0o600


def test_a_repeated_round_is_charged_once(ledger: Ledger) -> None:
    first = ledger.charge("a", "run", 0, EVENT, FREE)
    head = ledger.head()
    second = ledger.charge("a", "run", 0, EVENT, FREE)
    assert (second.sequence, second.repeated) == (first.sequence, True)
    assert ledger.head() == head
    assert ledger.events("a") == [EVENT]


def test_a_repeated_round_is_allowed_even_when_nothing_more_fits(ledger: Ledger) -> None:
    tight = Budget(epsilon([EVENT], DELTA), DELTA)
    ledger.charge("a", "run", 0, EVENT, tight)
    assert ledger.charge("a", "run", 0, EVENT, tight).repeated
    with pytest.raises(BudgetExceeded):
        ledger.charge("a", "run", 1, EVENT, tight)


def test_the_same_round_with_another_event_is_refused(ledger: Ledger) -> None:
    ledger.charge("a", "run", 0, EVENT, FREE)
    head = ledger.head()
    with pytest.raises(LedgerError, match=r"round 0.*cannot be charged again"):
        ledger.charge("a", "run", 0, OTHER, FREE)
    with pytest.raises(LedgerError):
        ledger.charge_many(["b", "a"], "run", 0, OTHER, FREE)
    assert ledger.head() == head


def test_calibrated_schedule_fits_to_its_last_step_and_no_further(ledger: Ledger) -> None:
    budget = Budget(8.0, DELTA)
    event = PoissonGaussian(0.2, 1.2, 1)
    rounds = max_steps(8.0, DELTA, 0.2, 1.2)
    for number in range(rounds):
        ledger.charge("a", "run", number, event, budget)
    head = ledger.head()
    with pytest.raises(BudgetExceeded, match=r"device a.*epsilon=8 .*is spent") as refusal:
        ledger.charge("a", "run", rounds, event, budget)
    assert ledger.head() == head
    assert refusal.value.spent == ledger.spent("a", DELTA) <= 8.0
    assert str(pickle.loads(pickle.dumps(refusal.value))) == str(refusal.value)


def test_the_budget_is_of_the_device_not_of_the_run(ledger: Ledger) -> None:
    budget = Budget(1.5 * epsilon([EVENT], DELTA), DELTA)
    ledger.charge("a", "first", 0, EVENT, budget)
    for number in range(4):
        result = ledger.charge_many(["a", "b"], f"other-{number}", 0, EVENT, FREE)
        assert all(isinstance(r, Charge) for r in result)
    with pytest.raises(BudgetExceeded):
        ledger.charge("a", "second", 0, EVENT, budget)


def test_mixed_histories_are_stopped_by_the_renyi_sum(ledger: Ledger) -> None:
    pld, rdp = (epsilon([EVENT, OTHER], DELTA, a) for a in ("pld", "rdp"))
    assert pld < rdp
    ledger.charge("a", "run", 0, EVENT, FREE)
    with pytest.raises(BudgetExceeded):
        ledger.charge("a", "run", 1, OTHER, Budget((pld + rdp) / 2, DELTA))
    # The filter's one order, fixed in advance, costs a little against the best in hindsight.
    ledger.charge("a", "run", 1, OTHER, Budget(rdp * 1.03, DELTA))
    assert ledger.spent("a", DELTA) == pld


def test_a_cohort_gets_one_answer_each(ledger: Ledger) -> None:
    tight = Budget(1.05 * epsilon([EVENT], DELTA), DELTA)
    ledger.charge("spent", "run", 0, EVENT, FREE)
    ledger.charge("again", "run", 1, EVENT, FREE)
    answers = ledger.charge_many(["new", "spent", "again", "newer"], "run", 1, EVENT, tight)
    assert [type(a) for a in answers] == [Charge, BudgetExceeded, Charge, Charge]
    numbers = [(a.sequence, a.repeated) for a in answers if isinstance(a, Charge)]
    assert numbers == [(3, False), (2, True), (4, False)]
    assert ledger.verify().sequence == 4
    assert ledger.charge_many([], "run", 1, EVENT, tight) == []


def test_a_cohort_equals_single_charges(tmp_path: Path) -> None:
    names = [f"d{i}" for i in range(20)]
    with Ledger.open(tmp_path / "a") as one, Ledger.open(tmp_path / "b") as many:
        for number in range(3):
            cohort = names[number : number + 10]
            singles = [one.charge(name, "run", number, EVENT, FREE) for name in cohort]
            assert many.charge_many(cohort, "run", number, EVENT, FREE) == singles
        assert one.summary(DELTA) == many.summary(DELTA)


def test_summary_groups_equal_histories(ledger: Ledger) -> None:
    names = [f"d{i:03d}" for i in range(300)]
    ledger.charge_many(names, "run", 0, EVENT, FREE)
    ledger.charge_many(names[:100], "run", 1, EVENT, FREE)
    double = PoissonGaussian(0.2, 1.2, 10)
    assert ledger.summary(DELTA) == [
        Spent(tuple(names[:100]), (double,), epsilon([double], DELTA)),
        Spent(tuple(names[100:]), (EVENT,), epsilon([EVENT], DELTA)),
    ]


def test_releases_are_stored_once_and_sent_again(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="must be charged"):
        ledger.store_release("a", "run", 0, b"x")
    ledger.charge("a", "run", 0, EVENT, FREE)
    assert ledger.stored_release("a", "run", 0) is None
    ledger.store_release("a", "run", 0, b"x")
    head = ledger.head()
    ledger.store_release("a", "run", 0, b"x")
    assert ledger.head() == head
    assert ledger.stored_release("a", "run", 0) == b"x"
    with pytest.raises(LedgerError, match="one charge covers one release"):
        ledger.store_release("a", "run", 0, b"y")


def test_only_the_latest_payload_is_kept_and_older_rounds_stay_closed(ledger: Ledger) -> None:
    for number in (0, 1):
        ledger.charge_many(["a", "b"], "run", number, EVENT, FREE)
        ledger.store_release("a", "run", number, bytes([number]))
    ledger.store_release("b", "run", 0, b"b0")
    assert ledger.stored_release("a", "run", 1) == b"\x01"
    assert ledger.stored_release("b", "run", 0) == b"b0"
    # Answering None here would let the device train again and release twice under one charge.
    with pytest.raises(LedgerError, match="must not be answered again"):
        ledger.stored_release("a", "run", 0)
    with pytest.raises(LedgerError, match="already released other bytes"):
        ledger.store_release("a", "run", 0, b"other")
    ledger.verify()


def test_a_round_without_privacy_needs_an_infinite_budget(ledger: Ledger) -> None:
    with pytest.raises(BudgetExceeded):
        ledger.charge("a", "run", 0, NonPrivate(), Budget(1e9, DELTA))
    assert ledger.events("a") == []
    ledger.charge("a", "run", 0, NonPrivate(), FREE)
    assert ledger.spent("a", DELTA) == math.inf
    with pytest.raises(BudgetExceeded, match="inf is spent"):
        ledger.charge("a", "run", 1, EVENT, Budget(1e9, DELTA))


def test_units_do_not_mix(ledger: Ledger) -> None:
    ledger.charge("a", "run", 0, EVENT, FREE)
    with pytest.raises(PrivacyError, match="unit"):
        ledger.charge("a", "run", 1, PoissonGaussian(0.2, 1.2, 1, unit="client"), FREE)
    assert ledger.events("a") == [EVENT]


def test_bad_arguments_name_themselves(ledger: Ledger) -> None:
    for device, run, number, match in [
        ("", "run", 0, "device="),
        ("a", "x\x00y", 0, "run="),
        ("a", "run", -1, "round="),
        ("a", "run", True, "round="),
        ("a", "run", 2**63, "round="),
        ("a", "r" * 257, 0, "run=.*257 characters: at most 256"),
    ]:
        with pytest.raises(LedgerError, match=match):
            ledger.charge(device, run, number, EVENT, FREE)
    with pytest.raises(LedgerError, match="named twice"):
        ledger.charge_many(["a", "a"], "run", 0, EVENT, FREE)
    for eps in (0.0, -1.0, math.nan):
        with pytest.raises(PrivacyError, match=r"budget\.epsilon="):
            Budget(eps, DELTA)
    with pytest.raises(PrivacyError, match="delta="):
        Budget(1.0, 0.0)
    assert ledger.head() == Head(0, "00" * 32)
    ledger.close()
    with pytest.raises(LedgerError, match="closed"):
        ledger.head()
