"""``reticent runs``: what it finds, what it says of damage, what it compares."""

from __future__ import annotations

import fcntl
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from report_runs import build

from reticent.cli.main import cli
from reticent.cli.runs import SORTS
from reticent.core.errors import RunError
from reticent.core.plan import parse_plan
from reticent.core.run import Run, create_run
from reticent.simulations.runs import (
    describe,
    differing_keys,
    find_runs,
    record_failure,
    sort_rows,
)
from reticent.simulations.simulate import simulate


def finished(folder: Path, *settings: str) -> Path:
    run = build(folder, *settings)
    lines = [json.loads(line) | {"seconds": 0.5} for line in run.metrics.read_text().splitlines()]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = json.loads(run.summary.read_text())
    summary["privacy"] |= {"epsilon": 3.21, "server_epsilon": "infinity"}
    run.summary.write_text(json.dumps(summary))
    return run.folder


def stopped(folder: Path) -> Path:
    finished(folder)
    (folder / "summary.json").unlink()
    metrics = folder / "metrics.jsonl"
    metrics.write_text("".join(line + "\n" for line in metrics.read_text().splitlines()[:3]))
    return folder


def test_runs_are_found_at_any_depth_and_other_folders_are_not(tmp_path: Path) -> None:
    paths = [finished(tmp_path / "a"), finished(tmp_path / "deep" / "er" / "b")]
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "plan.toml").write_text("seed = 1")  # a plan is not a run
    finished(tmp_path / "a" / "checkpoints" / "nested")  # a run's own folders are not searched
    assert find_runs(tmp_path) == paths
    assert find_runs(paths[0]) == [paths[0]]
    with pytest.raises(RunError, match="no such folder"):
        find_runs(tmp_path / "none")


def test_a_finished_run_has_its_figures(tmp_path: Path) -> None:
    row = describe(finished(tmp_path / "a", "seed=7"))
    assert (row["state"], row["task"], row["trust"], row["seed"]) == (
        "finished",
        "digits",
        "aggregator",
        7,
    )
    assert (row["epsilon"], row["server_epsilon"], row["accuracy"]) == (3.21, "infinity", 0.81)
    assert row["seconds"] == 2.0 and row["problem"] is None
    # Of updates, two figures: 4 * 11,100 + 10 bytes are shown as 45,000.
    assert row["bytes"] == 45_000 + 4 * 5 * 7300 + 4 * 1900


def test_where_clients_are_drawn_in_secret_only_the_day_is_shown(tmp_path: Path) -> None:
    """How long a run took follows from how many were drawn in its rounds."""
    when = datetime(2026, 3, 1, 23, 59, 58, tzinfo=UTC)
    secret = (
        'privacy.unit="client"',
        "privacy.secret_cohort=true",
        'federation.sampling="poisson"',
    )
    for name, settings, date in (("open", (), when.isoformat()), ("secret", secret, "2026-03-01")):
        folder = finished(tmp_path / name, *settings)
        os.utime(folder / "summary.json", (when.timestamp(),) * 2)
        assert describe(folder)["date"] == date
    for arguments in (["secret"], ["secret", "--json"], ["secret", "open"]):
        paths = [str(tmp_path / text) if text[0] != "-" else text for text in arguments]
        shown = CliRunner().invoke(cli, ["runs", *paths]).output
        assert "2026-03-01" in shown and ("open" in arguments or ":59" not in shown)


def test_states_of_runs_that_are_not_finished(tmp_path: Path) -> None:
    folder = stopped(tmp_path / "a")
    assert (describe(folder)["state"], describe(folder)["round"]) == ("stopped", 3)
    with (folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert describe(folder)["state"] == "running"
    run = build(tmp_path / "b")
    run.summary.unlink()
    run.metrics.unlink()
    record_failure(run, "too few clients")
    row = describe(run.folder)
    assert (row["state"], row["problem"], row["round"]) == ("failed", "too few clients", 0)


def test_a_run_that_went_on_and_was_stopped_has_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["task.name=digits", "task.clients=10", "federation.clients_per_round=10"]
    plan = parse_plan("", settings)
    record_failure(create_run(tmp_path / "a", plan), "too few clients")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("reticent.simulations.simulate._serve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        simulate(plan, tmp_path / "a", resume=True)
    row = describe(tmp_path / "a")
    assert (row["state"], row["problem"]) == ("stopped", None)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plan.toml", "seed ="),
        ("plan.toml", "seed = 99"),
        ("plan.toml", None),
        ("metrics.jsonl", "{"),
        ("metrics.jsonl", '{"round": 1}\n'),
        ("metrics.jsonl", b"\xff\xfe"),
        ("summary.json", "[]"),
        ("summary.json", '{"plan": "x"}'),
    ],
)
def test_a_damaged_run_is_a_line_that_says_what_is_wrong(
    tmp_path: Path, name: str, content: str | bytes | None
) -> None:
    finished(tmp_path / "good")
    path = finished(tmp_path / "bad") / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = CliRunner().invoke(cli, ["runs", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "bad  " in result.output and "damaged" in result.output
    assert any(line.startswith("bad: ") for line in result.output.splitlines())
    assert "finished" in result.output


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [("accuracy", "int8", "x"), ("accuracy", "int8", 10**400), ("privacy", "epsilon", "abc")],
)
def test_a_figure_that_is_no_number_is_damage(
    tmp_path: Path, part: str, key: str, value: Any
) -> None:
    run = Run(finished(tmp_path / "bad"))
    summary = json.loads(run.summary.read_text())
    summary[part][key] = value
    run.summary.write_text(json.dumps(summary))
    for arguments in ([], ["--sort", "accuracy"], ["--sort", "epsilon"]):
        result = CliRunner().invoke(cli, ["runs", str(tmp_path), *arguments])
        assert result.exit_code == 0, result.output
        assert f"bad: a figure is missing or damaged: {key if key == 'epsilon' else part}" in (
            result.output.replace("ValueError(", "").replace("'", "").replace('"', "")
        )


def test_rows_are_sorted_and_what_is_not_known_comes_last(tmp_path: Path) -> None:
    rows = [describe(finished(tmp_path / "a", "seed=2")), describe(finished(tmp_path / "b"))]
    rows.append({**rows[0], "run": "c", **{key: None for key in rows[0] if key != "run"}})
    for key in SORTS:
        assert sort_rows(rows, key)[-1]["run"] == "c" or key == "name"
    assert [r["seed"] for r in sort_rows(rows, "seed")] == [0, 2, None]


def test_two_runs_are_compared_by_the_keys_in_which_they_differ(tmp_path: Path) -> None:
    paths = [str(finished(tmp_path / "a")), str(finished(tmp_path / "b", "seed=3"))]
    shown = CliRunner().invoke(cli, ["runs", *paths])
    assert shown.exit_code == 0
    lines = [line.split() for line in shown.output.splitlines()]
    assert ["seed", "0", "3"] in lines
    assert not any(line[:1] == ["task.clients"] for line in lines)
    data = json.loads(CliRunner().invoke(cli, ["runs", *paths, "--json"]).output)
    assert data["plan"] == {"seed": [0, 3]}
    assert [row["accuracy"] for row in data["runs"]] == [0.81, 0.81]


def test_sections_that_are_off_differ_from_sections_that_are_on(tmp_path: Path) -> None:
    from reticent.core.plan import parse_plan

    keys = dict(differing_keys([parse_plan(""), parse_plan("", ["privacy=off"])]))
    assert keys["privacy"] == [None, "off"] and keys["privacy.epsilon"] == [8.0, None]


def test_an_empty_folder_and_json(tmp_path: Path) -> None:
    assert "no runs under" in CliRunner().invoke(cli, ["runs", str(tmp_path)]).output
    assert json.loads(CliRunner().invoke(cli, ["runs", str(tmp_path), "--json"]).output) == []
