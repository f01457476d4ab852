"""Budgets that renew: by device time that nobody can move ahead, late and never early."""

from __future__ import annotations

import math
import pickle
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from reticent.core.errors import LedgerError, PrivacyError
from reticent.privacy import clock as clock_module
from reticent.privacy.accounting import epsilon
from reticent.privacy.clock import BootClock, DeviceTime, Reading
from reticent.privacy.events import PoissonGaussian
from reticent.privacy.ledger import Budget, BudgetExceeded, Charge, Ledger

DELTA = 1e-5
EVENT = PoissonGaussian(0.2, 1.2, 1)
OTHER = PoissonGaussian(0.1, 1.0, 1)
DAY = 86_400
THREE = epsilon([PoissonGaussian(0.2, 1.2, 3)], DELTA) * 1.001
DAILY = Budget(THREE, DELTA, window=DAY)


class HandClock:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.boot, self.uptime = "first", 1000
        self.reads = 0

    def read(self) -> Reading:
        self.reads += 1
        return Reading(self.boot, self.uptime)

    def wait(self, seconds: int) -> None:
        self.uptime += seconds

    def reboot(self, uptime: int) -> None:
        self.boot, self.uptime = self.boot + "+", uptime


class NoClock:
    def read(self) -> Reading:
        raise LedgerError("no boot clock here")


@pytest.fixture
def hand() -> HandClock:
    return HandClock()


@pytest.fixture
def ledger(tmp_path: Path, hand: HandClock) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "ledger", clock=hand) as opened:
        yield opened


def charge(ledger: Ledger, number: int, budget: Budget = DAILY) -> Charge:
    return ledger.charge("a", "run", number, EVENT, budget)


def spend_all(ledger: Ledger, first: int = 0) -> None:
    for number in range(first, first + 3):
        charge(ledger, number)


def test_a_window_renews_after_its_whole_length_and_not_a_second_before(
    ledger: Ledger, hand: HandClock
) -> None:
    spend_all(ledger)
    for wait in (0, 1, DAY - 2, 1):  # together one day
        hand.wait(wait)
        with pytest.raises(BudgetExceeded):
            charge(ledger, 3)
    hand.wait(1)
    spend_all(ledger, 3)
    assert ledger.spent_in_window("a", DAILY) == epsilon([PoissonGaussian(0.2, 1.2, 3)], DELTA)
    assert ledger.spent("a", DELTA) == epsilon([PoissonGaussian(0.2, 1.2, 6)], DELTA)


def test_a_refusal_says_when_the_budget_is_free_again_and_that_is_when(
    ledger: Ledger, hand: HandClock
) -> None:
    for wait, number in ((0, 0), (100, 1), (900, 2)):
        hand.wait(wait)
        charge(ledger, number)
    with pytest.raises(BudgetExceeded, match=r"in any 86400 s.*device time 86401 s") as refusal:
        charge(ledger, 3)
    assert (refusal.value.now, refusal.value.renews) == (1000, DAY + 1)
    assert str(pickle.loads(pickle.dumps(refusal.value))) == str(refusal.value)
    hand.wait(DAY - 1000)
    with pytest.raises(BudgetExceeded):
        charge(ledger, 3)
    hand.wait(1)
    charge(ledger, 3)
    with pytest.raises(BudgetExceeded) as refusal:
        charge(ledger, 4)
    assert refusal.value.renews == 100 + DAY + 1


def test_what_never_fits_is_said_to_never_fit(ledger: Ledger) -> None:
    with pytest.raises(BudgetExceeded, match="even after the whole window") as refusal:
        ledger.charge("a", "run", 0, PoissonGaussian(0.2, 1.2, 9), DAILY)
    assert refusal.value.renews is None


def test_in_every_stretch_of_a_window_the_promise_holds(tmp_path: Path) -> None:
    """Against a second, naive count over every stretch that begins with a charge."""
    generator, hand = random.Random(4), HandClock()
    window, limit = 50, epsilon([PoissonGaussian(0.2, 1.2, 4)], DELTA) * 1.001
    charged: list[int] = []
    now = 0
    with Ledger.open(tmp_path, clock=hand) as ledger:
        for number in range(150):
            wait = generator.choice([0, 1, 7, 20])
            hand.wait(wait)
            now += wait
            answer = ledger.charge_many(["a"], "run", number, EVENT, Budget(limit, DELTA, window))[
                0
            ]
            inside = sum(now - when <= window for when in charged)
            assert isinstance(answer, Charge) == (inside < 4)
            if isinstance(answer, Charge):
                charged.append(now)
        ledger.verify()
    assert len(charged) > 30
    for start in charged:
        assert sum(start <= when <= start + window for when in charged) <= 4


@pytest.mark.parametrize("shift", [-DAY, DAY])
def test_a_wall_clock_moved_by_a_day_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: int
) -> None:
    with Ledger.open(tmp_path) as ledger:  # with the kernel's clock
        spend_all(ledger)
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + shift)
        monkeypatch.setattr(time, "time_ns", lambda: int((real() + shift) * 1e9))
        settable = time.clock_gettime

        def moved(which: int) -> float:
            return settable(which) + (shift if which == time.CLOCK_REALTIME else 0)

        monkeypatch.setattr(time, "clock_gettime", moved)
        with pytest.raises(BudgetExceeded):
            charge(ledger, 3)
        view = ledger.overview("a", DAILY)
        assert view.now is not None and view.now < 3600


def test_time_that_was_not_observed_does_not_count(ledger: Ledger, hand: HandClock) -> None:
    spend_all(ledger)
    hand.reboot(uptime=10 * DAY)  # a machine that has been up for long: nothing follows from that
    with pytest.raises(BudgetExceeded):
        charge(ledger, 3)
    hand.wait(DAY)
    with pytest.raises(BudgetExceeded):
        charge(ledger, 3)
    hand.wait(1)
    charge(ledger, 3)


def test_ticks_let_time_count_across_reboots(ledger: Ledger, hand: HandClock) -> None:
    spend_all(ledger)
    for _ in range(25):
        hand.wait(3600)
        ledger.tick()
        hand.reboot(uptime=30)
        ledger.tick()
    charge(ledger, 3)


def test_a_boot_clock_that_goes_back_gives_nothing(ledger: Ledger, hand: HandClock) -> None:
    spend_all(ledger)
    hand.wait(-900)
    with pytest.raises(BudgetExceeded):
        charge(ledger, 3)
    hand.wait(DAY)
    with pytest.raises(BudgetExceeded):
        charge(ledger, 3)
    hand.wait(1)
    charge(ledger, 3)


def test_without_a_clock_a_window_is_refused_and_a_lifetime_is_not(tmp_path: Path) -> None:
    with Ledger.open(tmp_path, clock=NoClock()) as ledger:
        with pytest.raises(LedgerError, match="no boot clock"):
            charge(ledger, 0)
        assert ledger.head().sequence == 0
        charge(ledger, 0, Budget(THREE, DELTA))


def test_charges_without_a_clock_count_from_the_next_observation_on(
    tmp_path: Path, hand: HandClock
) -> None:
    with Ledger.open(tmp_path, clock=hand) as ledger:
        charge(ledger, 0)
    with Ledger.open(tmp_path, clock=NoClock()) as ledger:
        charge(ledger, 1, Budget(math.inf, DELTA))
        charge(ledger, 2, Budget(math.inf, DELTA))
    hand.wait(5 * DAY)  # nobody saw these days: they may all lie before the two charges
    with Ledger.open(tmp_path, clock=hand) as ledger:
        assert ledger.overview("a", DAILY).now == 0
        with pytest.raises(BudgetExceeded):
            charge(ledger, 3)
        hand.wait(DAY + 1)
        charge(ledger, 3)


def test_lifetime_budgets_read_no_clock_and_give_the_same_bits(tmp_path: Path) -> None:
    heads = []
    for name in ("one", "two"):
        hand = HandClock()
        with Ledger.open(tmp_path / name, clock=hand) as ledger:
            # The same key: the MACs then differ only if an entry does.
            object.__setattr__(ledger._store, "_key", bytes(32))
            for number in range(3):
                hand.wait(random.randrange(9, 99))
                charge(ledger, number, Budget(9.0, DELTA))
                ledger.store_release("a", "run", number, b"x")
            heads.append(ledger.head())
        assert hand.reads == 0
    assert heads[0] == heads[1]


def test_a_window_looks_back_over_other_devices_too(ledger: Ledger, hand: HandClock) -> None:
    for number in range(8):
        hand.wait(DAY // 2)
        names = [f"d{i}" for i in range(number % 3, 12, 3)]
        answers = ledger.charge_many(names, "run", number, EVENT, DAILY)
        assert all(isinstance(answer, Charge) for answer in answers)
    ledger.verify()


@pytest.mark.parametrize("statement", ["UPDATE clock SET at = at + 99999", "INSERT INTO clock"])
def test_a_forged_device_time_is_noticed(ledger: Ledger, statement: str) -> None:
    charge(ledger, 0)
    if statement.startswith("INSERT"):
        ledger._store.db.execute("DELETE FROM clock")
        statement += " VALUES (99999, 'first', 1000, zeroblob(32))"
    ledger._store.db.execute(statement)
    for use in (ledger.verify, lambda: charge(ledger, 1)):
        with pytest.raises(LedgerError, match="device time was altered"):
            use()


def test_a_lost_device_time_renews_late(ledger: Ledger, hand: HandClock) -> None:
    spend_all(ledger)
    ledger._store.db.execute("DELETE FROM clock")
    hand.wait(9 * DAY)
    with pytest.raises(BudgetExceeded):
        charge(ledger, 3)


def test_windows_out_of_range_are_refused() -> None:
    for window in (0, 0.5, -1, math.inf, math.nan):
        with pytest.raises(PrivacyError, match=r"budget\.window="):
            Budget(1.0, DELTA, window)


def test_the_kernels_clock_names_its_boot_and_never_falls() -> None:
    first, second = BootClock().read(), BootClock().read()
    assert first.boot == second.boot and len(first.boot) == 36
    assert 0 <= second.uptime - first.uptime < 60


def test_a_time_namespaces_offset_is_taken_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = BootClock().read().uptime
    (tmp_path / "offsets").write_text("monotonic 0 0\nboottime 86400 500000000\n")
    monkeypatch.setattr(clock_module, "OFFSETS", tmp_path / "offsets")
    assert true - 86_402 <= BootClock().read().uptime <= true - 86_390


def test_a_system_without_a_boot_clock_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock_module, "BOOT_ID", tmp_path / "absent")
    with pytest.raises(LedgerError, match="without a window"):
        BootClock().read()
    (tmp_path / "absent").write_text("\n")
    with pytest.raises(LedgerError, match="boot's name"):
        BootClock().read()


def test_device_time_adds_only_what_one_boot_saw() -> None:
    start = DeviceTime(100, "one", 50)
    assert start.advanced(Reading("one", 80)) == DeviceTime(130, "one", 80)
    assert start.advanced(Reading("one", 20)) == DeviceTime(100, "one", 20)
    assert start.advanced(Reading("two", 900)) == DeviceTime(100, "two", 900)
    assert start.advanced(None) == DeviceTime(100)
    assert start.advanced(None).advanced(Reading("one", 80)).at == 100


def test_a_charge_that_left_the_window_unreleased_is_not_used_later(
    ledger: Ledger, hand: HandClock
) -> None:
    for number in (1, 2, 3):
        ledger.charge("device", "run", number, EVENT, DAILY)
    ledger.store_release("device", "run", 1, b"sent on the first day")
    hand.wait(DAY + 2)
    # The next day's budget is whole: three releases, and none beside them on old charges.
    for number in (2, 3):
        with pytest.raises(LedgerError, match="more than the budget's window ago"):
            ledger.charge("device", "run", number, EVENT, DAILY)
    assert ledger.charge("device", "run", 1, EVENT, DAILY).repeated  # its bytes are stored
    for number in (4, 5, 6):
        ledger.charge("device", "run", number, EVENT, DAILY)
    with pytest.raises(BudgetExceeded):
        ledger.charge("device", "run", 7, EVENT, DAILY)


def test_a_charge_in_the_window_is_repeated(ledger: Ledger, hand: HandClock) -> None:
    ledger.charge("device", "run", 1, EVENT, DAILY)
    hand.wait(DAY // 2)
    assert ledger.charge("device", "run", 1, EVENT, DAILY).repeated
