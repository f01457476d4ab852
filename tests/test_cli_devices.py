"""``reticent device budget`` and ``reticent server init``, as their owners use them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from reticent.cli import main as command
from reticent.client.budget import remember_budget
from reticent.privacy.accounting import epsilon
from reticent.privacy.events import PoissonGaussian
from reticent.privacy.ledger import Budget, BudgetExceeded, Ledger

EVENT = PoissonGaussian(0.1, 1.0, 10)
BUDGET = Budget(4.0, 1e-5)
Capture = pytest.CaptureFixture[str]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["reticent", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A device that took part in two rounds of two runs, and refused a third."""
    folder = tmp_path / "state"
    with Ledger.open(folder) as ledger:
        remember_budget(folder, BUDGET)
        for run in ("one", "two"):
            ledger.charge("device", run, 1, EVENT, BUDGET)
        ledger.store_release("device", "two", 1, b"bytes")
        with pytest.raises(BudgetExceeded):
            ledger.charge("device", "two", 2, EVENT.times(50), BUDGET)
    return folder


def test_it_shows_what_was_spent_and_what_is_left(
    state: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert call(monkeypatch, "device", "budget", state, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    spent = epsilon([EVENT.times(2)], 1e-5)
    assert shown["spent"] == shown["lifetime"] == spent
    assert shown["remaining"] == 4.0 - spent
    assert (shown["charges"], shown["releases"], shown["refusals"]) == (2, 1, 1)
    assert shown["runs"] == 2
    assert call(monkeypatch, "device", "budget", state) == 0
    text = capsys.readouterr().out
    assert "one example, add-or-remove-one" in text
    assert "ε 4.00 at δ 1e-05, for life" in text
    assert "rounds refused for the budget" in text
    assert "verified, 3 entries" in text


def test_another_budget_can_be_tried(
    state: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    options = ["--epsilon", "9", "--delta", "1e-6", "--window-days", "2", "--json"]
    assert call(monkeypatch, "device", "budget", state, *options) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["budget"] == {"epsilon": 9.0, "delta": 1e-6, "window": 172800.0}
    assert call(monkeypatch, "device", "budget", state, "--epsilon", "inf", "--json") == 0
    assert json.loads(capsys.readouterr().out)["remaining"] == "infinity"


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--delta", "1e-6"], 2, "need --epsilon"),
        (["--epsilon", "-1"], 5, "must be > 0"),
        (["--epsilon", "1", "--delta", "2"], 5, "delta=2.0"),
        (["--epsilon", "1", "--window-days", "0"], 5, "budget.window"),
    ],
)
def test_a_budget_that_makes_no_sense_is_an_error(
    state: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    options: list[str],
    status: int,
    said: str,
) -> None:
    assert call(monkeypatch, "device", "budget", state, *options) == status
    assert said in capsys.readouterr().err


def test_a_folder_without_a_ledger_is_not_given_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert call(monkeypatch, "device", "budget", tmp_path, "--epsilon", "1") == 5
    assert "holds no ledger" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_ledger_is_an_error_and_shows_nothing(
    state: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (state / "ledger.tip").write_bytes(b"damaged")
    assert call(monkeypatch, "device", "budget", state) == 5
    printed = capsys.readouterr()
    assert printed.out == "" and "damaged" in printed.err


def test_a_ledger_that_was_put_back_is_an_error_and_shows_nothing(
    state: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (state / "anchors.json").write_text(json.dumps({"ab" * 32: [9, "cd" * 32]}))
    assert call(monkeypatch, "device", "budget", state) == 5
    printed = capsys.readouterr()
    assert printed.out == "" and "put back to an older state" in printed.err


def test_a_ledger_of_a_simulation_is_not_one_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    with Ledger.open(tmp_path) as ledger:
        ledger.charge_many(["a", "b"], "run", 1, EVENT, BUDGET)
    assert call(monkeypatch, "device", "budget", tmp_path, "--epsilon", "1") == 5
    assert "2 simulated devices" in capsys.readouterr().err


def test_a_servers_state_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert call(monkeypatch, "server", "init", tmp_path / "state") == 0
    assert "signing_key.pub.pem" in capsys.readouterr().out
    key = (tmp_path / "state" / "keys" / "signing_key.pem").read_bytes()
    assert call(monkeypatch, "server", "init", tmp_path / "state") == 11
    assert (tmp_path / "state" / "keys" / "signing_key.pem").read_bytes() == key
