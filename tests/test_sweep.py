"""Sweeps: what is run, what is refused before anything starts, what a stop leaves behind."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from interrupts import heeds_ctrl_c
from scipy.stats import t

from reticent.cli.main import cli
from reticent.cli.sweeps import _headline
from reticent.core.errors import (
    DataError,
    DependencyError,
    LedgerError,
    NetworkError,
    PlanError,
    RunError,
)
from reticent.core.plan import Plan
from reticent.core.run import Run, create_run, locked
from reticent.core.signing import read_public_key
from reticent.privacy.accounting import epsilon
from reticent.privacy.events import PoissonGaussian
from reticent.privacy.ledger import Budget, Ledger
from reticent.privacy.report import verify_report
from reticent.privacy.schedule import schedule_for
from reticent.simulations.runs import describe, find_runs, record_failure
from reticent.simulations.simulate import simulate
from reticent.simulations.sweep import (
    collect_results,
    open_sweep,
    parse_grid,
    read_manifest,
    run_sweep,
    write_results,
)
from reticent.simulations.sweep.manifest import Manifest, manifest_of, write_manifest
from reticent.simulations.sweep.plots import _baseline
from reticent.simulations.sweep.points import Base, checked, points_of
from reticent.simulations.sweep.results import figures_of, to_json
from reticent.simulations.sweep.running import Show, _begin_anew
from reticent.simulations.sweep.statistics import estimate
from reticent.simulations.sweep.writing import legend

SETTINGS = (
    "task.name=digits",
    "task.clients=10",
    "task.public_examples=200",
    "teacher.epochs=2",
    "student.epochs=2",
    "federation.rounds=2",
    "federation.clients_per_round=10",
    "federation.eval_every=1",
    "engine.workers=1",
)
BASE = Base("", SETTINGS)
GRID = {"privacy.epsilon": ("2", "8")}


def manifest(grid: dict[str, tuple[str, ...]] = GRID, seeds: int = 2) -> Manifest:
    return manifest_of(BASE, grid, seeds)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweeps") / "sweep"
    sweep = open_sweep(folder, manifest())
    assert run_sweep(sweep, Show()) == {}
    write_results(collect_results(sweep))
    return folder


def test_points_are_the_product_of_the_grid_and_of_the_seeds() -> None:
    grid = parse_grid(["privacy.epsilon=1,2", 'updates.codec=["dither4","ans"],["dither4"]'])
    points = points_of(BASE, grid, 3)
    assert len(points) == 2 * 2 * 3
    assert [p.seed for p in points[:3]] == [0, 1, 2]
    assert len({p.folder for p in points}) == len({p.plan.digest for p in points}) == 12
    letters = set("abcdefghijklmnopqrstuvwxyz0123456789-_.+")
    assert all(set(p.folder) <= letters for p in points)


def test_every_invalid_or_repeated_point_is_named_at_once() -> None:
    grid = {"privacy.epsilon": ("1", "-1", "1.0", "x"), "engine.workers": ("1",)}
    with pytest.raises(PlanError) as caught:
        points_of(BASE, grid, 2)
    message = str(caught.value)
    assert "4 problems" in message and "nothing was started" in message
    assert "privacy.epsilon=-1" in message and "privacy.epsilon=x" in message
    assert "seed=0" in message and "are the same plan" in message


def test_an_engine_whose_runs_cannot_be_resumed_is_refused_before_anything_starts(
    tmp_path: Path,
) -> None:
    """In the base plan, as a value of the grid, and where the sweep is begun."""
    flower = 'engine.kind="flower-ray"'
    base = Base("", (*SETTINGS, flower))
    why = rf'every point: {flower}: must be "inprocess" or "ray" in a sweep: .* cannot be resumed'
    for given, grid in ((base, GRID), (BASE, {"engine.kind": ("flower-ray",)})):
        with pytest.raises(PlanError, match=why) as caught:
            points_of(given, grid, 2)
        assert "1 problem" in str(caught.value)
    grid = {"engine.kind": ("inprocess", "flower-ray"), "privacy.epsilon": ("2",)}
    with pytest.raises(PlanError, match=rf"engine.kind=flower-ray \S+ seed=0: {flower}: must be"):
        points_of(BASE, grid, 1)
    args = ["sweep", "--set", flower, "--seeds", "2", "--run", str(tmp_path / "sweep")]
    assert isinstance(CliRunner().invoke(cli, args).exception, PlanError)
    assert not (tmp_path / "sweep").exists()


def test_points_that_cannot_be_run_are_all_named(tmp_path: Path) -> None:
    grid = {"task.public_examples": ("200", "5000", "6000")}
    points = points_of(BASE, grid, 1)
    with pytest.raises(Exception, match="2 problems") as caught:
        checked(points)
    assert caught.value.exit_code == 4  # type: ignore[attr-defined]
    with pytest.raises(Exception, match="5000"):
        open_sweep(tmp_path / "none", manifest(grid, 1))
    assert not (tmp_path / "none").exists()


def test_missing_data_are_found_before_anything_starts_and_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETICENT_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setattr("reticent.core.tasks.sources.SYSTEM", tmp_path / "none")
    grid = {"task.name": ("fashion-full", "digits"), "privacy.epsilon": ("2", "8")}
    with pytest.raises(DataError, match=r"1 problem, .*\s+task\.name=fashion-full privacy\.eps"):
        open_sweep(tmp_path / "s", manifest(grid))
    assert not (tmp_path / "s").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_found_before_anything_starts(tmp_path: Path) -> None:
    grid = {"engine.device": ("cpu", "cuda")}
    with pytest.raises(DependencyError, match=r"engine\.device=cuda seed=0: .* finds no GPU here"):
        open_sweep(tmp_path / "s", manifest(grid, 1))
    assert not (tmp_path / "s").exists()


def test_reports_that_could_not_be_written_are_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(DependencyError, match=r"Jinja2 is not installed: pip install"):
        open_sweep(tmp_path / "s", manifest())
    assert not (tmp_path / "s").exists()


def test_a_sweep_that_another_process_runs_is_left_as_it_is(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path, manifest())
    before = (tmp_path / "sweep.json").read_bytes()
    with locked(Run(tmp_path)), pytest.raises(RunError, match="in use by another process"):
        open_sweep(tmp_path, manifest(seeds=3))
    assert (tmp_path / "sweep.json").read_bytes() == before
    open_sweep(tmp_path, manifest(seeds=3))
    with pytest.raises(RunError, match="another process has changed"):
        run_sweep(sweep, Show())
    assert not sweep.run_of(sweep.manifest.points[0]).folder.exists()


@pytest.mark.parametrize("text", ["privacy.epsilon", "=1", "a=", "a=1,,2"])
def test_a_grid_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="--grid"):
        parse_grid([text])


def test_intervals_are_those_of_student() -> None:
    values = [0.80, 0.82, 0.85]
    found = estimate(values)
    assert found is not None and found.std is not None and found.half is not None
    low, high = t.interval(0.95, 2, loc=found.mean, scale=found.std / math.sqrt(3))
    assert (found.low, found.high) == pytest.approx((low, high))
    normal = 1.96 * found.std / math.sqrt(3)
    assert found.half > 2 * normal  # the normal distribution would promise far too much
    one = estimate([0.5, None])
    assert one is not None and (one.n, one.std, one.half) == (1, None, None)
    assert estimate([None]) is None


def test_each_point_is_the_run_that_simulate_makes(done: Path, tmp_path: Path) -> None:
    sweep = open_sweep(done, manifest())
    point = sweep.manifest.points[-1]
    alone = simulate(point.plan, tmp_path / "alone")
    assert alone.read_summary()["model"] == sweep.run_of(point).read_summary()["model"]


def test_reports_state_what_choosing_costs_and_verify(done: Path) -> None:
    sweep = open_sweep(done, manifest())
    results = to_json(collect_results(sweep))
    for point in sweep.manifest.points:
        run = sweep.run_of(point)
        data = json.loads((run.folder / "report.json").read_text())
        assert data["tuning"]["runs"] == 4
        assert data["tuning"]["epsilon"] == pytest.approx(results["tuning"][0]["epsilon"])
        assert data["tuning"]["epsilon"] > 8 >= data["promise"]["epsilon"]
        verify_report(run, read_public_key(run.keys / "signing_key.pub.pem"))


def test_points_of_tasks_that_may_share_people_are_counted_together(tmp_path: Path) -> None:
    """``fashion`` is 12,000 of the images of ``fashion-full``: one person may be in both."""
    noise = "privacy.noise_multiplier=1.5"
    base = Base("", (*SETTINGS, noise))
    sweep = open_sweep(tmp_path, manifest_of(base, {"task.name": ("digits", "fashion")}, 1))
    (tuning,) = collect_results(sweep).tuning
    schedules = [schedule_for(point.plan) for point in sweep.manifest.points]
    events = [s.over(s.round_event(), s.participations) for s in schedules if s]
    assert tuning["runs"] == len(events) == 2
    assert tuning["epsilon"] == epsilon(events, 1e-5) > epsilon(events[:1], 1e-5)


def test_results_hold_every_figure_with_its_n(done: Path) -> None:
    data = json.loads((done / "results.json").read_text())
    assert [row["settings"] for row in data["rows"]] == [
        {"privacy.epsilon": "2"},
        {"privacy.epsilon": "8"},
    ]
    row = data["rows"][0]
    runs = [json.loads((p / "summary.json").read_text()) for p in sorted(done.glob("epsilon-2_*"))]
    values = [r["accuracy"]["int8"] for r in runs]
    assert row["int8"]["n"] == 2 and row["int8"]["mean"] == pytest.approx(sum(values) / 2)
    assert row["epsilon"]["Readers of the models"] <= 2 < row["epsilon"]["The server"]
    assert row["up"]["mean"] > 0 and row["seconds"]["mean"] > 0
    lines = (done / "results.csv").read_text().splitlines()
    assert len(lines) == 3 and lines[0].startswith("privacy.epsilon,n,epsilon Readers")
    assert "| epsilon | n |" in (done / "results.md").read_text()


def test_the_page_is_self_contained_and_has_the_plots(done: Path) -> None:
    page = (done / "index.html").read_text()
    assert "<script" not in page and "src=" not in page and "@import" not in page
    assert page.count("<svg") == 3 and "Choosing is not free." in page
    assert page.count('class="error"') >= 4
    for name in ("accuracy-epsilon", "accuracy-bytes", "accuracy-time"):
        assert (done / f"{name}.svg").read_text().startswith("<svg")


def test_the_line_of_public_data_is_of_the_form_that_the_points_are_in(done: Path) -> None:
    """Seed by seed: a row that lacks a seed begins with the same students as the others."""
    results = collect_results(open_sweep(done, manifest()))
    own = {}
    for path in done.glob("epsilon-8_*/summary.json"):
        seed = int(path.parent.name.split("_")[1].removeprefix("seed-"))
        own[seed] = json.loads(path.read_text())["accuracy"]["public_only_int8"]
    assert results.rows[0].baselines == results.rows[1].baselines == own
    (line,) = _baseline(results)
    assert line.y == pytest.approx(sum(own.values()) / 2)
    apart = {0: 0.25, 1: 0.75}

    def lines(first: dict[int, float], second: dict[int, float]) -> list[float]:
        pairs = zip(results.rows, (first, second), strict=True)
        rows = tuple(replace(row, baselines=baselines) for row, baselines in pairs)
        return [rule.y for rule in _baseline(replace(results, rows=rows))]

    assert lines(apart, apart) == lines(apart, {0: 0.25}) == lines({1: 0.75}, {0: 0.25}) == [0.5]
    assert lines(apart, {0: 0.3}) == lines({}, {}) == []


@pytest.mark.parametrize(
    ("trusts", "off", "rounded"),
    [(("local",), False, False), (("local", "aggregator"), False, True), ((), True, False)],
)
def test_bytes_are_said_to_be_rounded_where_some_are(
    tmp_path: Path, trusts: tuple[str, ...], off: bool, rounded: bool
) -> None:
    grid = {"privacy": ('"off"',)} if off else {"privacy.trust": trusts}
    results = collect_results(open_sweep(tmp_path / "s", manifest(grid, seeds=1)))
    write_results(results)
    page, text = ((tmp_path / "s" / name).read_text() for name in ("index.html", "results.md"))
    for said in (legend(results), page, text):
        assert ("updates are rounded up to two figures" in said) == rounded
    assert "all figures, not rounded any further" in page


def test_nothing_that_a_sweep_shows_tells_how_many_a_secret_draw_gave(tmp_path: Path) -> None:
    secret = ("privacy.unit=client", "privacy.secret_cohort=true", "federation.sampling=poisson")
    base, grid = Base("", (*SETTINGS, "federation.clients_per_round=5", *secret)), ("4", "8")
    sweep = open_sweep(tmp_path / "s", manifest_of(base, {"privacy.epsilon": grid}, 1))
    assert run_sweep(sweep, Show()) == {}
    results = collect_results(sweep)
    write_results(results)
    for row in to_json(results)["rows"]:
        assert {row[key] for key in ("up", "down", "total", "seconds")} == {None}
        assert row["int8"] and row["epsilon"]["Readers of the models"] > 0
    for point in sweep.manifest.points:
        sweep.run_of(point).summary.unlink()
    for options in ([], ["--json"]):
        args = ["sweep", "--run", str(tmp_path / "s"), "--resume", *options]
        said = CliRunner().invoke(cli, args).output
        assert not re.search(r"\d s\b", said) and "replies" not in said
        # The first run finishes both points, and what each of them says is said once.
        assert options or said.count("resuming after round") == 1
        assert "artifact written to" not in said
    page = (tmp_path / "s" / "index.html").read_text()
    assert page.count("<svg") == 1 and "clients are drawn in secret" in page


def test_finished_points_are_not_repeated(done: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in done.glob("*/summary.json")}
    sweep = open_sweep(done, read_manifest(done))
    assert run_sweep(sweep, Show(begins=lambda *_: pytest.fail("a point was begun again"))) == {}
    assert {path: path.stat().st_mtime_ns for path in done.glob("*/summary.json")} == before


@pytest.mark.parametrize(
    ("grid", "seeds", "words"),
    [
        ({"seed": ("0", "1", "2")}, 1, "3 runs (1 setting, 3 seeds each)"),
        ({"seed": ("3", "4"), "privacy.epsilon": ("2", "8")}, 1, "4 runs (2 settings, 2 seeds"),
        ({"privacy.epsilon": ("2",)}, 1, "1 run (1 setting, 1 seed each)"),
        (GRID, 2, "4 runs (2 settings, 2 seeds each)"),
    ],
)
def test_the_headline_counts_settings_and_seeds(
    grid: dict[str, tuple[str, ...]], seeds: int, words: str
) -> None:
    assert words in _headline(manifest(grid, seeds), Path("s"))


def test_json_is_one_object_a_line_and_last_the_results(done: Path) -> None:
    result = CliRunner().invoke(cli, ["sweep", "--run", str(done), "--resume", "--json"])
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.output.splitlines()]
    assert all(set(line) == {"message"} for line in lines[:-1])
    assert lines[-1] == json.loads((done / "results.json").read_text())


def test_a_sweep_may_grow_but_not_change(tmp_path: Path) -> None:
    open_sweep(tmp_path / "s", manifest(seeds=1))
    open_sweep(tmp_path / "s", manifest({"privacy.epsilon": ("2", "4", "8")}, seeds=2))
    with pytest.raises(RunError, match=r"--grid privacy.epsilon \(2,4,8 before, 4 now\)"):
        open_sweep(tmp_path / "s", manifest({"privacy.epsilon": ("4",)}, seeds=2))
    with pytest.raises(RunError, match=r"--seeds \(2 before, 1 now\)"):
        open_sweep(tmp_path / "s", manifest({"privacy.epsilon": ("2", "4", "8")}, seeds=1))
    assert len(read_manifest(tmp_path / "s").points) == 6


@pytest.mark.parametrize(
    "now",
    [
        {"privacy.epsilon": ("2.0", "8"), "privacy.clip": ("0.50",)},  # spelled otherwise
        {"privacy.clip": ("1", "0.5"), "privacy.epsilon": ("2", "8")},  # another key and order
    ],
)
def test_a_point_keeps_its_run_however_its_grid_is_written(
    tmp_path: Path, now: dict[str, tuple[str, ...]]
) -> None:
    """By the digest of its plan: 0.5 is the default of privacy.clip."""
    first = open_sweep(tmp_path / "s", manifest(seeds=1))
    folders = {point.plan.digest: point.folder for point in first.manifest.points}
    assert run_sweep(first, Show()) == {}
    begun: list[str] = []
    for _ in range(2):  # as it is given, and as it is read again
        grown = open_sweep(tmp_path / "s", manifest(now, seeds=1))
        assert run_sweep(grown, Show(begins=lambda _, point: begun.append(point.plan.digest))) == {}
        same = {p.plan.digest: p.folder for p in read_manifest(tmp_path / "s").points}
        assert folders.items() <= same.items()
    assert sorted(begun) == sorted(same.keys() - folders.keys())
    assert len(find_runs(tmp_path / "s")) == len(same) == len(now["privacy.clip"]) * 2
    assert [row.seeds for row in collect_results(grown).rows] == [(0,)] * len(same)


@pytest.mark.parametrize("name", ["../other", "/tmp", "..", ".hidden", "a/b", "", 3])
def test_a_manifest_whose_folders_lead_elsewhere_is_damaged(tmp_path: Path, name: Any) -> None:
    write_manifest(tmp_path, manifest())
    path = tmp_path / "sweep.json"
    data = json.loads(path.read_text())
    data["points"][1]["folder"] = name
    path.write_text(json.dumps(data))
    with pytest.raises(RunError, match=r"sweep\.json: damaged: ValueError: folder="):
        read_manifest(tmp_path)


def test_a_grown_sweep_counts_the_new_runs_in_old_reports(tmp_path: Path) -> None:
    first = open_sweep(tmp_path / "s", manifest({"privacy.epsilon": ("2",)}, seeds=1))
    run_sweep(first, Show())
    run = first.run_of(first.manifest.points[0])
    before = json.loads((run.folder / "report.json").read_text())["tuning"]
    second = open_sweep(tmp_path / "s", manifest({"privacy.epsilon": ("2",)}, seeds=2))
    run_sweep(second, Show())
    after = json.loads((run.folder / "report.json").read_text())["tuning"]
    assert (before["runs"], after["runs"]) == (1, 2)
    assert after["epsilon"] > before["epsilon"]
    verify_report(run, read_public_key(run.keys / "signing_key.pub.pem"))


@pytest.mark.parametrize("fault", [KeyboardInterrupt, RunError])
def test_a_stop_before_a_report_is_written_leaves_no_signed_one_that_counts_too_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: type[BaseException]
) -> None:
    first = open_sweep(tmp_path / "s", manifest({"privacy.epsilon": ("2",)}, seeds=1))
    run_sweep(first, Show())
    run = first.run_of(first.manifest.points[0])
    grown = open_sweep(tmp_path / "s", manifest({"privacy.epsilon": ("2",)}, seeds=2))

    def stopped(run: Run) -> list[Path]:
        raise fault("stopped")

    with monkeypatch.context() as patch:
        patch.setattr("reticent.simulations.sweep.running.write_reports", stopped)
        if fault is RunError:  # is told of each point, and stops no other
            folders = [point.folder for point in grown.manifest.points]
            assert run_sweep(grown, Show()) == dict.fromkeys(folders, "stopped")
            assert collect_results(grown, dict.fromkeys(folders, "stopped")).finished == 0
        else:
            with pytest.raises(fault, match="stopped"):
                run_sweep(grown, Show())
    assert json.loads((run.folder / "report.json").read_text())["tuning"]["runs"] == 1
    assert not (run.folder / "report.sig").exists()
    assert run_sweep(grown, Show()) == {}
    assert json.loads((run.folder / "report.json").read_text())["tuning"]["runs"] == 2
    verify_report(run, read_public_key(run.keys / "signing_key.pub.pem"))


def test_old_reports_count_the_new_runs_before_the_first_of_them_begins(tmp_path: Path) -> None:
    first = open_sweep(tmp_path / "s", manifest({"privacy.epsilon": ("2",)}, seeds=1))
    run_sweep(first, Show())
    report = first.run_of(first.manifest.points[0]).folder / "report.json"
    grown = open_sweep(tmp_path / "s", manifest({"privacy.epsilon": ("2",)}, seeds=2))

    def begins(number: int, point: Any) -> None:
        assert json.loads(report.read_text())["tuning"]["runs"] == 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(grown, Show(begins=begins))


def test_a_failed_point_is_recorded_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = open_sweep(tmp_path / "s", manifest({"privacy.epsilon": ("2", "8")}, seeds=1))
    first = sweep.manifest.points[0]

    def failing(plan: Any, folder: Path, **options: Any) -> Run:
        if plan.digest == first.plan.digest:
            raise NetworkError("nobody answered")
        return simulate(plan, folder, **options)

    with monkeypatch.context() as patch:
        patch.setattr("reticent.simulations.sweep.running.simulate", failing)
        failures = run_sweep(sweep, Show())
    assert failures == {first.folder: "nobody answered"}
    assert json.loads((tmp_path / "s" / "failures.json").read_text()) == failures
    results = collect_results(sweep, failures)
    assert [row.planned - len(row.seeds) for row in results.rows] == [1, 0]
    write_results(results)
    assert "nobody answered" in (tmp_path / "s" / "index.html").read_text()
    assert run_sweep(sweep, Show()) == {}
    assert not (tmp_path / "s" / "failures.json").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl"])
def test_a_damaged_finished_point_costs_the_others_neither_rows_nor_the_page(
    done: Path, tmp_path: Path, name: str
) -> None:
    """Be its report there already, or still to be written."""
    folder = tmp_path / "s"
    shutil.copytree(done, folder)
    bad, other = open_sweep(folder, manifest()).manifest.points[:2]
    path = folder / bad.folder / name
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    for report in (True, False):
        if not report:
            (folder / bad.folder / "report.sig").unlink()
        page = folder / "index.html"
        page.unlink()
        result = CliRunner().invoke(cli, ["sweep", "--run", str(folder), "--resume"])
        assert isinstance(result.exception, RunError) and result.exception.exit_code == 8
        assert "1 of 4 points failed" in str(result.exception)
        failures = json.loads((folder / "failures.json").read_text())
        assert list(failures) == [bad.folder] and path.name in failures[bad.folder]
        assert f"failed: {escape(failures[bad.folder])}" in page.read_text()
        data = json.loads((folder / "results.json").read_text())
        assert data["failures"] == failures and data["finished"] == 3
        assert [row["seeds"] for row in data["rows"]] == [[other.seed], [0, 1]]
    path.write_bytes(content)
    assert CliRunner().invoke(cli, ["sweep", "--run", str(folder), "--resume"]).exit_code == 0
    assert not (folder / "failures.json").exists()
    assert (folder / "results.md").read_text() == (done / "results.md").read_text()


def test_reasons_of_points_that_are_not_tried_yet_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = open_sweep(tmp_path / "s", manifest({"privacy.epsilon": ("2", "4", "8")}, seeds=1))
    folders = [point.folder for point in sweep.manifest.points]
    file = tmp_path / "s" / "failures.json"
    file.write_text(json.dumps(dict.fromkeys([*folders, "of no point"], "an old reason")))
    seen: list[dict[str, str]] = []

    def failing(plan: Any, folder: Path, **options: Any) -> Run:
        seen.append(json.loads(file.read_text()))
        if len(seen) == 3:
            raise KeyboardInterrupt
        raise NetworkError("a new reason")

    monkeypatch.setattr("reticent.simulations.sweep.running.simulate", failing)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep, Show())
    new, old = "a new reason", "an old reason"
    assert json.loads(file.read_text()) == dict(zip(folders, (new, new, old), strict=True))
    assert seen[1] == dict(zip(folders, (new, old, old), strict=True))


def test_a_point_that_budgets_ended_has_failed_and_is_tried_again(tmp_path: Path) -> None:
    noisy = ("federation.rounds=4", "federation.retries=0", "privacy.noise_multiplier=0.6")
    base = Base("", (*SETTINGS, *noisy))
    folder = tmp_path / "s"
    sweep = open_sweep(folder, manifest_of(base, {"privacy.budget": ("5.5", "20")}, 1))
    ended, whole = sweep.manifest.points
    failures = run_sweep(sweep, Show())
    assert set(failures) == {ended.folder} and "round 3" in failures[ended.folder]
    results = collect_results(sweep, failures)
    assert [row.seeds for row in results.rows] == [(), (0,)]  # 2 of 4 rounds are no result
    assert results.best is results.rows[1] and results.finished == 1
    states = {path.name: describe(path) for path in find_runs(folder)}
    assert (states[ended.folder]["state"], states[whole.folder]["state"]) == ("ended", "finished")
    assert states[ended.folder]["problem"] == failures[ended.folder]
    listed = CliRunner().invoke(cli, ["runs", str(folder)])
    assert "ended at 2/4" in listed.output
    again = CliRunner().invoke(cli, ["sweep", "--run", str(folder), "--resume"])
    assert isinstance(again.exception, RunError) and again.exception.exit_code == 8
    assert failures[ended.folder] in str(again.exception)
    assert f"[1/2] {ended.label}" in again.output and "[2/2]" not in again.output
    assert json.loads((folder / "failures.json").read_text()) == failures
    assert "report of the rounds before" in (folder / "index.html").read_text()
    for point in (ended, whole):  # what was spent is reported all the same
        run = sweep.run_of(point)
        report = json.loads((run.folder / "report.json").read_text())
        reported = {row["name"]: row["epsilon"] for row in report["adversaries"]}
        assert figures_of(run, point).epsilons == pytest.approx(reported, rel=1e-12)
        assert describe(run.folder)["epsilon"] == reported["Readers of the models"]
        verify_report(run, read_public_key(run.keys / "signing_key.pub.pem"))


def test_a_killed_sweep_goes_on_to_the_same_models(done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    entry = str(Path(sys.executable).parent / "reticent")
    arguments = [part for setting in SETTINGS for part in ("--set", setting)]
    arguments += ["--grid", "privacy.epsilon=2,8", "--seeds", "2", "--run", str(folder)]
    process = subprocess.Popen(
        [entry, "sweep", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(list(folder.glob("*/journal.db"))) < 2:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert (folder / "sweep.json").is_file()
    assert len(list(folder.glob("*/summary.json"))) < 4
    resumed = subprocess.run(
        [entry, "sweep", "--run", str(folder), "--resume"], capture_output=True, text=True
    )
    assert resumed.returncode == 0, resumed.stderr
    for path in done.glob("*/summary.json"):
        again = json.loads((folder / path.parent.name / "summary.json").read_text())
        assert again["model"] == json.loads(path.read_text())["model"]


def test_a_run_without_its_journal_is_begun_anew_only_if_it_charged_nobody(tmp_path: Path) -> None:
    run = create_run(tmp_path / "run", BASE.plan())
    record_failure(run, "a reason")
    _begin_anew(run)
    assert not run.folder.exists()
    for name in ("notes.txt", "checkpoints/round-000001.safetensors"):
        run = create_run(tmp_path / name.split("/")[0], BASE.plan())
        path = run.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("kept")
        with pytest.raises(RunError, match=r"has no journal.db"):
            _begin_anew(run)
        assert path.read_text() == "kept"


def test_a_ledger_with_entries_and_without_its_journal_is_refused(tmp_path: Path) -> None:
    """A run that began anew beside it would charge the same devices a second time."""
    run = create_run(tmp_path / "run", BASE.plan())
    with Ledger.open(run.ledger) as ledger:
        ledger.charge("client-0", "run", 1, PoissonGaussian(0.1, 1.0, 1), Budget(9.0, 1e-5))
        before = ledger.head()
    with pytest.raises(RunError, match=r"has no journal.db"):
        _begin_anew(run)
    with Ledger.open(run.ledger) as ledger:
        assert ledger.head() == before
    (run.ledger / "ledger.db").unlink()
    with pytest.raises(LedgerError, match=r"history in ledger.db is gone"):
        _begin_anew(run)


def killed_on_the_journal(plan: Plan, folder: Path) -> None:
    """Simulate in a process of its own, which dies before it has a journal."""
    die = "journal.Journal.__init__ = lambda *_: os._exit(9)"
    code = (
        f"import os, sys; from pathlib import Path; from reticent.server import journal; {die}\n"
        "from reticent.core.plan import Plan\n"
        "from reticent.simulations.simulate import simulate\n"
        "simulate(Plan.model_validate_json(sys.argv[1]), Path(sys.argv[2]))"
    )
    ended = subprocess.run([sys.executable, "-c", code, plan.canonical(), str(folder)])
    assert ended.returncode == 9


def test_a_point_that_was_killed_before_it_had_a_journal_goes_on(
    done: Path, tmp_path: Path
) -> None:
    sweep = open_sweep(tmp_path / "s", manifest({"privacy.epsilon": ("2",)}, seeds=1))
    (point,) = sweep.manifest.points
    run = sweep.run_of(point)
    killed_on_the_journal(point.plan, run.folder)
    assert (run.ledger / "ledger.db").is_file() and not run.journal.is_file()
    assert run_sweep(sweep, Show()) == {}
    whole = Run(done / point.folder).read_summary()
    assert run.read_summary()["model"] == whole["model"]


@pytest.mark.parametrize(("how", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_sweep_that_is_told_to_end_says_how_to_go_on(
    how: signal.Signals, status: int, tmp_path: Path
) -> None:
    entry = str(Path(sys.executable).parent / "reticent")
    arguments = [part for setting in SETTINGS for part in ("--set", setting)]
    process = subprocess.Popen(
        [entry, "sweep", *arguments, "--seeds", "2", "--run", str(tmp_path / "s")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heeds_ctrl_c,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list((tmp_path / "s").glob("*/journal.db")):
        time.sleep(0.02)
    os.kill(process.pid, how)
    _, errors = process.communicate()
    assert process.returncode == status
    assert "--resume" in errors and "Traceback" not in errors


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 1}', '{"schema": 9}'])
def test_a_damaged_manifest_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(RunError, match=r"sweep\.json: damaged"):
        read_manifest(tmp_path)


def test_a_folder_that_is_no_sweep_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="is no sweep"):
        open_sweep(tmp_path, manifest())
    with pytest.raises(RunError, match="not a sweep"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("seeds", 688), ("grid", {"seed": "12"}), ("grid", {}), ("overrides", "ab"), ("points", [])],
)
def test_a_manifest_that_does_not_list_its_points_makes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any
) -> None:
    """A few bytes would otherwise ask for thousands of plans."""
    write_manifest(tmp_path, manifest())
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    monkeypatch.setattr("reticent.simulations.sweep.manifest.points_of", None)
    with pytest.raises(RunError, match=r"sweep\.json: damaged: ValueError"):
        read_manifest(tmp_path)
