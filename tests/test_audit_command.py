"""``reticent audit``: what it prints and writes, and its exit status."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reticent.cli import main as command
from reticent.client import round as client_round
from reticent.core.plan import load_plan
from reticent.core.run import create_run

SETTINGS = (
    "task.name=digits",
    "task.clients=3",
    "task.public_examples=200",
    "federation.rounds=3",
    "federation.clients_per_round=3",
    "federation.sampling_rate=0.5",
)
SET = [part for setting in SETTINGS for part in ("--set", setting)]
FEW = ("--canaries", "600", "--seed", "3")
FIELDS = {
    "schema",
    "plan",
    "unit",
    "relation",
    "claimed",
    "lower_bound",
    "weaker_bounds",
    "confidence",
    "estimate",
    "method",
    "canaries",
    "rounds",
    "interval",
    "interval_of",
    "randomness",
    "verdict",
    "seconds",
    "command",
}

Capture = pytest.CaptureFixture[str]


def call(*arguments: str | Path) -> int:
    """Run the command in this process, exactly as its console entry does."""
    before, threads = sys.argv, torch.get_num_threads()
    sys.argv = ["reticent", *map(str, arguments)]
    try:
        command.main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    finally:
        sys.argv = before
        torch.set_num_threads(threads)
    raise AssertionError("the command did not exit")


@pytest.fixture
def plan_file(tmp_path: Path, capsys: Capture) -> Path:
    path = tmp_path / "digits.toml"
    assert call("plan", "new", path, *SET) == 0
    capsys.readouterr()
    return path


def halved(*arguments: Any) -> Any:
    step = noisy_step(*arguments)
    return replace(step, noise=step.noise / 2)


noisy_step = client_round.noisy_step


def test_an_audit_of_a_plan_prints_claim_bound_and_verdict(
    plan_file: Path, capsys: Capture
) -> None:
    before = sorted(plan_file.parent.iterdir())
    assert call("audit", plan_file, *FEW, "--rounds", "2") == 0
    out = capsys.readouterr().out
    for words in ("claimed ε", "lower bound on ε, 99 %", "right guesses", "2 of 3 of one client"):
        assert words in out
    assert "consistent with the claim" in out
    assert sorted(plan_file.parent.iterdir()) == before


def test_an_audit_of_a_run_writes_its_result_into_the_run(
    plan_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    run = create_run(tmp_path / "run", load_plan(plan_file))
    assert call("audit", run.folder, *FEW, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    written = json.loads((run.folder / "audit.json").read_text())
    assert printed == written and set(written) == FIELDS
    assert written["plan"] == run.plan().digest
    assert written["command"] == f"reticent audit {run.folder} --canaries 600 --seed 3"
    low, high = written["interval"]
    assert 0 < low < high < 1 and written["rounds"] == 3
    # What the report reads beside it is what the audit wrote.
    from reticent.privacy.report.audited import read_audit

    read = read_audit(run, run.plan())
    assert read is not None and read["verdict"] == "consistent"


def test_a_violated_claim_is_written_and_has_the_exit_status_of_privacy(
    plan_file: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_round, "noisy_step", halved)
    run = create_run(tmp_path / "run", load_plan(plan_file))
    assert call("audit", run.folder, *FEW) == 5
    shown = capsys.readouterr()
    assert "VIOLATED" in shown.out and "contradicts the claim" in shown.err
    assert json.loads((run.folder / "audit.json").read_text())["verdict"] == "violated"


def test_a_plan_without_privacy_is_named_as_having_no_claim(
    plan_file: Path, capsys: Capture
) -> None:
    assert call("audit", plan_file, "--set", 'privacy="off"') == 3
    assert "no claim to audit" in capsys.readouterr().err


def test_a_result_that_cannot_be_written_is_an_error_of_the_run(
    plan_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    run = create_run(tmp_path / "run", load_plan(plan_file))
    (run.folder / "audit.json").mkdir()
    assert call("audit", run.folder, "--canaries", "5", "--rounds", "1") == 8
    assert "audit.json: cannot be written" in capsys.readouterr().err


def test_noise_that_could_not_be_tested_is_not_said_to_have_passed(
    plan_file: Path, capsys: Capture
) -> None:
    hidden = ("--set", 'privacy.unit="client"', "--set", 'updates.codec=["topk:0.1"]')
    assert call("audit", plan_file, *hidden, "--canaries", "20", "--rounds", "1") == 0
    out = capsys.readouterr().out
    assert "nothing to compare" in out and "passed" not in out


def test_a_run_has_the_plan_that_it_had(plan_file: Path, tmp_path: Path, capsys: Capture) -> None:
    run = create_run(tmp_path / "run", load_plan(plan_file))
    assert call("audit", run.folder, "--set", "federation.rounds=2") == 3
    assert "cannot be used with a run" in capsys.readouterr().err
    shutil.rmtree(run.folder)
    run.folder.mkdir()
    assert call("audit", run.folder) == 8
