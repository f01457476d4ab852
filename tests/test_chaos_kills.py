"""Kills at seeded points of charge, train and release: never an under-count, one step over at most.

``pytest -m chaos -s`` runs 200 points and prints what was found.
"""

from __future__ import annotations

import importlib.util
import json
import math
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from reticent.core.errors import LedgerError
from reticent.privacy.accounting import epsilon
from reticent.privacy.events import PoissonGaussian
from reticent.privacy.ledger import Budget, Head, Ledger

SCRIPT = Path(__file__).parent / "ledger_victim.py"
EVENT = PoissonGaussian(0.2, 1.2, 1)
FREE = Budget(math.inf, 1e-5)
LIVES_PER_DEVICE = 10


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ledger_victim", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sent = _script().sent


class Lives:
    """Processes that live and die on request."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, *orders: dict[str, Any]) -> list[int]:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(orders) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def close(self) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait()


@pytest.fixture(scope="module")
def lives() -> Iterator[Lives]:
    opened = Lives()
    yield opened
    opened.close()


def life(folder: Path, generator: random.Random) -> dict[str, Any]:
    """Return a life that ends at a step, or (a quarter of them) after a time."""
    folder.mkdir(exist_ok=True)
    order = {
        "kind": "live",
        "folder": str(folder),
        "rounds": 20,
        "window": generator.choice([None, 3600.0]),
        "step": generator.randrange(1, 500),
    }
    if generator.random() < 0.25:
        order |= {"step": 0, "rounds": 10**6, "after": generator.uniform(0.001, 0.05)}
    return order


def check(folder: Path) -> str:
    """Check what a dead device left behind, and say where in a round it died."""
    out = sent(folder / "outbox")
    with Ledger.open(folder / "ledger") as ledger:
        rows = ledger._store.db.execute("SELECT round, kind, body FROM entries").fetchall()
        charged = {number for number, kind, _ in rows if kind == "charge"}
        released = {number: body for number, kind, body in rows if kind == "release"}
        # Whatever left was charged and is stored, every retry sent the same bytes, and heads that
        # were anchored elsewhere are still in the chain.
        for number, copies in out.items():
            assert number in charged
            assert {digest for digest, _, _ in copies} == {released[number]}
            assert all(ledger.contains(Head(int(n), mac)) for _, n, mac in copies)
        # One charge over at most, and it is of the round that is still open.
        assert 0 <= len(charged) - len(out) <= 1
        assert charged == set(range(len(charged)))
        assert sum(e.steps for e in ledger.events("device")) == len(charged)
        assert ledger.overview("device", FREE).charges == len(charged)
        return _place(ledger, charged, set(released), set(out))


def _place(ledger: Ledger, charged: set[int], released: set[int], out: set[int]) -> str:
    if charged == out:
        return "between rounds"
    (open_round,) = charged - out
    # What was begun goes on under the same charge: the stored bytes, or training once more.
    assert ledger.charge("device", "run", open_round, EVENT, FREE).repeated
    stored = ledger.stored_release("device", "run", open_round)
    assert (stored is not None) == (open_round in released)
    return "released, not sent" if stored is not None else "charged, not released"


def kills(lives: Lives, folder: Path, points: int) -> Counter[str]:
    generator, found = random.Random(2026), Counter[str]()
    for point in range(points):
        device = folder / str(point // LIVES_PER_DEVICE)
        (code,) = lives.run(life(device, generator))
        if code == 0:
            found["lived to the end"] += 1
            continue
        assert code == -signal.SIGKILL, (device / "error").read_text()
        found[check(device)] += 1
    rounds = [len(sent(path / "outbox")) for path in folder.iterdir()]
    print(f"\n{points} lives, {sum(rounds)} rounds sent, 0 under-counts; ended {dict(found)}")
    return found


def test_a_kill_never_counts_too_little_and_at_most_one_round_too_much(
    lives: Lives, tmp_path: Path
) -> None:
    found = kills(lives, tmp_path, 20)
    assert sum(found.values()) - found["lived to the end"] >= 12


@pytest.mark.chaos
def test_two_hundred_kills_never_count_too_little(lives: Lives, tmp_path: Path) -> None:
    found = kills(lives, tmp_path, 200)
    assert min(found[k] for k in ("charged, not released", "released, not sent")) > 5


def test_every_step_of_a_ledgers_first_round_can_be_its_last(lives: Lives, tmp_path: Path) -> None:
    found: Counter[str] = Counter()
    for step in range(1, 150, 11):
        folder = tmp_path / str(step)
        folder.mkdir()
        order = {"kind": "live", "folder": str(folder), "rounds": 1, "window": None}
        (code,) = lives.run(order | {"step": step})
        found[check(folder) if code else "lived to the end"] += 1
        assert lives.run(order | {"step": 0}) == [0]  # the next life is not kept from its round
        assert check(folder) == "between rounds"
    print(f"\nfirst round: {dict(found)}")
    assert found["charged, not released"] > 0


@pytest.mark.chaos
def test_each_single_step_of_a_ledgers_first_round(lives: Lives, tmp_path: Path) -> None:
    found: Counter[str] = Counter()
    for step in range(1, 400):
        folder = tmp_path / str(step)
        folder.mkdir()
        order = {"kind": "live", "folder": str(folder), "rounds": 1, "window": 60.0}
        (code,) = lives.run(order | {"step": step})
        if code == 0:
            break
        found[check(folder)] += 1
        assert lives.run(order | {"step": 0}) == [0]
        assert check(folder) == "between rounds"
    else:
        pytest.fail("the round has more steps than were tried")
    print(f"\nevery step of a first round: {dict(found)}")


def test_two_processes_at_the_edge_of_a_budget_never_exceed_it(
    lives: Lives, tmp_path: Path
) -> None:
    with Ledger.open(tmp_path / "ledger") as ledger:
        ledger.charge("device", "before", 0, EVENT, FREE)
        most = 1
        while ledger.spent("device", 1e-5) <= 3.0:
            ledger.charge("device", "before", most, EVENT, FREE)
            most += 1
        budget = ledger.spent("device", 1e-5) * 1.3
    order = {"kind": "spend", "folder": str(tmp_path), "budget": budget, "tries": 40}
    pair = [order | {"run": name, "name": name} for name in ("one", "two")]
    assert lives.run(*pair) == [0, 0]
    with Ledger.open(tmp_path / "ledger") as ledger:
        assert ledger.spent("device", 1e-5) <= budget
        count = sum(e.steps for e in ledger.events("device"))
        charged = [json.loads((tmp_path / f"{n}.charged").read_text()) for n in ("one", "two")]
        assert count == most + sum(len(rounds) for rounds in charged) < most + 80
        # And not a round less than fits: they did not refuse each other without need.
        with_next = [*ledger.events("device"), EVENT]
        assert epsilon(with_next, 1e-5) > budget


def test_two_processes_that_charge_the_same_rounds_charge_each_once(
    lives: Lives, tmp_path: Path
) -> None:
    order = {"kind": "spend", "folder": str(tmp_path), "budget": 1e9, "tries": 40, "run": "same"}
    assert lives.run(order | {"name": "one"}, order | {"name": "two"}) == [0, 0]
    one, two = (json.loads((tmp_path / f"{n}.charged").read_text()) for n in ("one", "two"))
    assert sorted(one + two) == list(range(40))
    with Ledger.open(tmp_path / "ledger") as ledger:
        assert ledger.events("device") == [PoissonGaussian(0.2, 1.2, 40)]


def test_a_full_disk_stops_charges_and_loses_none(lives: Lives, tmp_path: Path) -> None:
    order = {"kind": "fill", "folder": str(tmp_path)}
    for limit in (150_000, 200_000, 333_333):
        assert lives.run(order | {"limit": limit}) == [5]
        message = (tmp_path / "error").read_text()
        assert "cannot be used" in message
        out = sent(tmp_path / "outbox")
        with Ledger.open(tmp_path / "ledger") as ledger:
            view = ledger.overview("device", FREE)
            assert view.charges - 1 <= view.releases <= view.charges
            assert len(out) == view.releases
            # With space again it goes on, beginning with the round that was left open.
            ledger.charge("device", "run", view.charges, EVENT, FREE)
            for number in range(len(out), view.charges + 1):
                ledger.store_release("device", "run", number, b"later")
                with (tmp_path / "outbox").open("a") as stream:
                    stream.write(f"{number} x {view.head.sequence} {view.head.mac}\n")
            ledger.verify()


def charge_until_full(ledger: Ledger) -> int:
    for number in range(10_000):
        try:
            ledger.charge("device", "run", number, EVENT, FREE)
        except LedgerError as error:
            assert "full" in str(error)
            return number
    pytest.fail("the disk never was full")


def test_a_full_file_system_stops_charges_and_loses_none(tmp_path: Path) -> None:
    with Ledger.open(tmp_path) as ledger:
        db = ledger._store.db
        db.execute(f"PRAGMA max_page_count = {db.execute('PRAGMA page_count').fetchone()[0] + 3}")
        charged = charge_until_full(ledger)
        assert charged == ledger.overview("device", FREE).charges > 0
        assert ledger.verify().sequence == charged
        db.execute("PRAGMA max_page_count = 100000")
        assert not ledger.charge("device", "run", charged, EVENT, FREE).repeated
        assert ledger.verify().sequence == charged + 1
