"""Whole runs on a fleet: charges, workers, resume, FedBuff, secret cohorts, and the report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from test_server_strategy import Answer, Federation, encoded, honest, plan_of, refusing, vector_of
from test_strategies import kept, start_of, state_of

from reticent.cli.main import cli
from reticent.core.errors import DataError, NetworkError, PlanError, RunError
from reticent.core.personal import split_of
from reticent.core.plan import Plan, parse_plan
from reticent.core.protocol import Refusal
from reticent.core.run import Run
from reticent.core.signing import read_public_key
from reticent.core.tasks import Examples
from reticent.privacy.accounting import epsilon
from reticent.privacy.ledger import Budget, Ledger
from reticent.privacy.randomness import SeededRandomness
from reticent.privacy.report import (
    collect,
    compare,
    render_html,
    render_md,
    verify_report,
    write_reports,
)
from reticent.privacy.schedule import schedule_for
from reticent.server.app import Settings, run_federation
from reticent.server.buffered import BufferedAveraging
from reticent.server.fleet import LEVELS, SURPLUS, Virtual, fleet_summary
from reticent.server.optimizer import ServerState, apply_round
from reticent.server.public_training import accuracy
from reticent.server.rounds import BudgetsSpent
from reticent.server.strategy import PrivateAveraging
from reticent.simulations import explain
from reticent.simulations.audit import audit_plan
from reticent.simulations.explain import check_plan, explain_plan
from reticent.simulations.fleet import SimulatedFleet, fleet_for, granting, priced
from reticent.simulations.grid import node_of
from reticent.simulations.runs import describe
from reticent.simulations.simulate import simulate
from reticent.simulations.sweep.points import Point
from reticent.simulations.sweep.results import figures_of

SMALL = [
    "task.name=digits",
    "task.clients=24",
    "task.public_examples=200",
    "teacher.epochs=1",
    "student.epochs=1",
    "federation.clients_per_round=6",
    "federation.min_replies=4",
    "federation.rounds=5",
    "federation.sampling_rate=0.2",
    "federation.eval_every=1",
    "engine.workers=1",
    "fleet.over_selection=1.5",
    'fleet.classes=[{kind="phone",dropout=0.3},{kind="pi4",memory=1e8,share=0.2}]',
]
BUFFERED = ["federation.buffered.concurrency=10", "federation.buffered.max_staleness=3"]
FOUR = ["federation.rounds=4", "fleet.over_selection=1.0"]
GONE = 'fleet.availability={kind="diurnal",low=0.0,high=1e-9}'
TWO = parse_plan("", ["engine.workers=2"]).engine
ALIKE = ['fleet.classes=[{kind="pi5",dropout=0.0}]', "fleet.spread=0.0", "fleet.jitter=0.0"]


def small(*overrides: str) -> Plan:
    return parse_plan("", [*SMALL, *overrides])


class Stopped(Exception):
    """Stands for a crash."""


def stop_after(rounds: int) -> Any:
    def progress(metrics: dict[str, Any]) -> None:
        if metrics["round"] == rounds:
            raise Stopped

    return progress


@pytest.fixture(scope="module")
def synchronous(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return simulate(small(), tmp_path_factory.mktemp("synchronous") / "run")


@pytest.fixture(scope="module")
def semi(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return simulate(small(*BUFFERED), tmp_path_factory.mktemp("semi") / "run")


def charges_of(run: Run) -> int:
    schedule = schedule_for(run.plan())
    assert schedule is not None
    with Ledger.open(run.ledger) as ledger:
        rows = ledger.summary(1e-5)
    return sum(len(r.devices) * e.steps for r in rows for e in r.events)  # pyright: ignore


def test_a_straggler_that_is_not_used_has_charged_its_ledger(synchronous: Run) -> None:
    lines = synchronous.read_metrics()
    used, unused = (
        sum(m["replies"] for m in lines),
        sum(m["virtual"]["charged_unused"] for m in lines),
    )
    assert unused > 0
    assert charges_of(synchronous) == used + unused
    assert sum(m["asked"] for m in lines) > used + unused  # some never began to train


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_that_is_reached_exactly_is_reached(level: float) -> None:
    """With as many of 1,000 test examples right as the level says, and one fewer."""
    model = torch.nn.Linear(1, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        model.bias.zero_()
    labels = torch.ones(1000, dtype=torch.int64)

    def reached(right: int, start: float = float("nan")) -> dict[str, float]:
        inputs = torch.ones(1000, 1)
        inputs[right:] = -1
        line = {"accuracy": accuracy(model, Examples(inputs, labels)), "dropped": {}}
        line |= {"virtual": Virtual(ends=3.0).figures()}
        return fleet_summary([line], start)["seconds_to_accuracy"]

    right, name = round(1000 * level), f"{level:.0%}"
    assert reached(right)[name] == 3.0
    assert name not in reached(right - 1)
    assert reached(right, level)[name] == 0.0
    assert reached(right, level - 0.001)[name] == 3.0


def test_what_the_fleet_costs_is_in_metrics_summary_and_price(synchronous: Run) -> None:
    lines, fleet = synchronous.read_metrics(), synchronous.read_summary()["fleet"]
    times = [m["virtual"]["time"] for m in lines]
    assert times == sorted(times) and times[-1] == fleet["seconds"] > 0
    assert fleet["energy"] == pytest.approx(sum(m["virtual"]["energy"] for m in lines))
    dropped = sum((Counter(m["dropped"]) for m in lines), Counter[str]())
    assert fleet["dropped"] == dict(dropped)
    before = synchronous.read_summary()["accuracy"]["public_only_pruned"]
    tested = [(before, 0.0), *((m["accuracy"], m["virtual"]["time"]) for m in lines)]
    for level, time in fleet["seconds_to_accuracy"].items():
        wanted = float(level[:-1]) / 100
        assert time == next(time for accuracy, time in tested if accuracy >= wanted)
    price = explain_plan(small())["fleet"]
    # The real mask, and so sizes, are known after training only; everything else is the run's.
    assert price["seconds"] == pytest.approx(fleet["seconds"], rel=0.05)
    assert (price["dropped"], price["charged_unused"]) == (
        fleet["dropped"],
        fleet["charged_unused"],
    )


def test_what_the_first_student_knows_took_no_time_on_the_fleet(tmp_path: Path) -> None:
    more = ["student.epochs=30", "student.prune.kind=none", "federation.rounds=1"]
    summary = simulate(small(*more), tmp_path / "run").read_summary()
    before = summary["accuracy"]["public_only_pruned"]
    assert before > 0.5
    at_once = {level for level, time in summary["fleet"]["seconds_to_accuracy"].items() if not time}
    assert at_once == {f"{level:.0%}" for level in LEVELS if before >= level}


@pytest.mark.parametrize("kind", ["synchronous", "semi"])
def test_any_number_of_workers_and_a_resume_give_the_same_run(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    whole: Run = request.getfixturevalue(kind)
    more = BUFFERED if kind == "semi" else []
    with pytest.raises(Stopped):
        simulate(small(*more), tmp_path / "run", progress=stop_after(3))
    resumed = simulate(small(*more, "engine.workers=2"), tmp_path / "run", resume=True)
    assert resumed.read_summary()["model"] == whole.read_summary()["model"]
    assert resumed.read_summary()["fleet"] == whole.read_summary()["fleet"]
    for mine, theirs in zip(resumed.read_metrics(), whole.read_metrics(), strict=True):
        assert {k: v for k, v in mine.items() if k not in ("seconds", "bytes_constants")} == {
            k: v for k, v in theirs.items() if k not in ("seconds", "bytes_constants")
        }
    assert charges_of(resumed) == charges_of(whole)


def test_buffered_updates_are_stale_and_what_was_begun_is_charged(semi: Run) -> None:
    lines = semi.read_metrics()
    assert max(m["virtual"]["stalest"] for m in lines) > 0
    assert all(m["replies"] == 6 for m in lines)
    began = {
        pair
        for release, _ in zip(fleet_of(semi.plan()).releases(range(2, 26)), lines, strict=False)
        for pair in release.began
    }
    # Sizes differ a little from the run's, so a device at the very end may be on either side.
    assert abs(charges_of(semi) - len(began)) <= 1
    assert charges_of(semi) == sum(m["replies"] + m["virtual"]["charged_unused"] for m in lines)
    lost = sum(sum(m["dropped"].values()) for m in lines)
    assert sum(m["asked"] for m in lines) == sum(m["replies"] for m in lines) + lost


def fleet_of(plan: Plan) -> Any:
    return fleet_for(plan, 15_338, (3199, 9250), granting)


@pytest.mark.parametrize("promise", ["privacy.unit=client", "privacy.trust=local"])
def test_personal_layers_stay_on_devices_in_a_buffered_run(promise: str, tmp_path: Path) -> None:
    more = ["federation.steps_per_round=3", "student.prune.kind=none", promise]
    plan = small(*BUFFERED, *more, 'federation.local.personal=["7"]')
    run = simulate(plan, tmp_path / "run")
    lines = run.read_metrics()
    assert max(m["virtual"]["stalest"] for m in lines) > 0
    assert all(m["replies"] == 6 for m in lines)
    layout, start = start_of(run)
    split, end = split_of(layout, ["7"]), state_of(run).weights
    assert (split.personal(end) == split.personal(start)).all()
    assert (split.shared(end) != split.shared(start)).any()
    own = [kept(run, "personal", client, split.personal(start)) for client in range(24)]
    assert sum((values != split.personal(start)).any() for values in own) >= 6


def test_the_ledger_does_not_count_less_than_the_journal(semi: Run, synchronous: Run) -> None:
    for run in (semi, synchronous):
        report = collect(run)
        assert report["spent"]["maximum"] <= report["promise"]["epsilon"] + 1e-9
        assert report["promise"]["epsilon"] <= 8.0


def scripted(plan: Plan, answer: Answer = honest) -> Federation:
    """A federation whose clients answer with made updates, on the plan's fleet if it has one."""
    federation = Federation(plan, answer)
    fleet = fleet_for(plan, 36, (200, 200), granting) if plan.fleet else None
    kind = BufferedAveraging if plan.federation.buffered else PrivateAveraging
    constants = replace(federation.rounds, randomness=SeededRandomness(0))
    federation.strategy = kind(plan, constants, federation.start, federation._commit, fleet=fleet)
    if isinstance(federation.strategy, BufferedAveraging):
        federation.strategy.follow(lambda n: federation.states[n - 1].weights)
    return federation


@pytest.mark.parametrize("unit", ["example", "client"])
def test_fedbuff_without_staleness_has_the_synchronous_cohorts_and_arithmetic(unit: str) -> None:
    """With the same updates and the same noise, which two plans have in no run of their own."""
    common = [*ALIKE, f"privacy.unit={unit}"]
    plans = [
        plan_of(12, 4, 7, *common),
        plan_of(12, 4, 7, *common, "federation.buffered.concurrency=4"),
        plan_of(12, 4, 7, *common, "federation.buffered.max_staleness=0"),
        plan_of(12, 4, 7, f"privacy.unit={unit}"),
    ]
    ends: list[ServerState] = []
    cohorts: list[list[set[int]]] = []
    for plan in plans:
        federation = scripted(plan)
        federation.run()
        ends.append(federation.states[-1])
        cohorts.append([set(t.devices) for t in federation.tallies])
    assert all(cohort == cohorts[0] for cohort in cohorts)
    for end in ends[1:]:
        assert end.weights.tobytes() == ends[0].weights.tobytes()
        assert end.average.tobytes() == ends[0].average.tobytes()


def test_fedbuff_without_staleness_has_the_synchronous_times_and_other_draws(
    tmp_path: Path,
) -> None:
    """Draws are by the plan's digest: docs/fleet.md promises the schedule, and not the models."""
    runs = [
        simulate(small(*ALIKE, "fleet.over_selection=1.0", "federation.rounds=2", *more), folder)
        for more, folder in (
            ([], tmp_path / "synchronous"),
            (["federation.buffered.concurrency=6"], tmp_path / "buffered"),
        )
    ]
    one, other = (
        [x for m in run.read_metrics() for x in (m["asked"], m["replies"], m["virtual"]["time"])]
        for run in runs
    )
    assert one == pytest.approx(other)
    first, second = map(state_of, runs)
    assert np.abs(first.weights - second.weights).max() > 1e-3


def test_a_stale_update_counts_as_much_as_its_weight_says() -> None:
    plan = plan_of(
        40,
        4,
        6,
        "privacy.trust=local",
        'fleet.classes=[{kind="phone",dropout=0.0},{kind="gateway",dropout=0.0}]',
        "fleet.over_selection=2.0",
        "federation.buffered.concurrency=12",
        "federation.buffered.weight=inverse-sqrt",
    )
    federation = scripted(plan)
    fleet = fleet_for(plan, 36, (200, 200), granting)
    expected = federation.start
    behind = set[int]()
    for release in zip(range(1, 7), fleet.releases(range(2, 42)), strict=False):
        number, found = release
        total = np.zeros(36)
        for node, given in found.used:
            behind.add(number - 1 - given)
            total += (number - given) ** -0.5 * vector_of(node, given + 1).astype(np.float64)
        f = plan.federation
        expected = apply_round(expected, total / 4, f.server, f.average)
    federation.run()
    assert len(behind) > 1
    assert np.allclose(federation.states[-1].weights, expected.weights, rtol=1e-6, atol=0)


def test_too_many_dropouts_end_the_run_as_too_few_replies_do(tmp_path: Path) -> None:
    plan = small('fleet.classes=[{kind="phone",dropout=0.95}]', "federation.retries=1")
    with pytest.raises(NetworkError, match=r"4 are needed, asked 2 times .*it dropped out"):
        simulate(plan, tmp_path / "run")
    assert "4 are needed" in explain_plan(plan)["fleet"]["failed"]


def test_a_buffer_that_budgets_empty_ends_the_run_and_says_that_each_was_asked_once() -> None:
    """Whatever ``retries`` is: a buffered run knows none."""
    plan = plan_of(12, 4, 3, *ALIKE, "federation.buffered.concurrency=4", "federation.retries=2")
    federation = scripted(plan, refusing(int(Refusal.BUDGET), *range(12)))
    with pytest.raises(BudgetsSpent) as caught:
        federation.run()
    assert "4 are needed, each asked once (4 x " in str(caught.value)
    assert "asked 3 times" not in str(caught.value)
    assert len(federation.script.nodes(1)) == 4


def test_another_trace_is_refused_on_resume(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("".join(f"{c},0,1e6\n" for c in range(24)))
    plan = small(f'fleet.availability={{kind="file",path="{trace}"}}')
    with pytest.raises(Stopped):
        simulate(plan, tmp_path / "run", progress=stop_after(1))
    trace.write_text("".join(f"{c},0,2e6\n" for c in range(24)))
    with pytest.raises(RunError, match="was begun on another fleet"):
        simulate(plan, tmp_path / "run", resume=True)


def test_a_fleet_is_refused_for_real_devices(tmp_path: Path) -> None:
    run = Run(tmp_path)
    settings = Settings(run, "x", print, print, countersigner=object())  # pyright: ignore
    for overrides, words in (
        ([], "fleet: describes simulated devices"),
        (None, "must be false for real devices"),
    ):
        plan = secret() if overrides is None else small()
        monkey = pytest.MonkeyPatch()
        monkey.setattr(Run, "plan", lambda self, plan=plan: plan)
        with pytest.raises(PlanError, match=words):
            run_federation(settings, None)  # pyright: ignore
        monkey.undo()


def secret(*overrides: str) -> Plan:
    given = [o for o in SMALL if not o.startswith(("fleet.", "federation.min_replies"))]
    return parse_plan(
        "",
        [
            *given,
            "privacy.unit=client",
            "privacy.epsilon=6.0",
            "federation.sampling=poisson",
            "privacy.secret_cohort=true",
            *overrides,
        ],
    )


def test_a_secret_cohort_is_charged_whole_at_once_and_reported_as_it_was_sampled(
    tmp_path: Path,
) -> None:
    plan = secret()
    run = simulate(plan, tmp_path / "run")
    schedule = schedule_for(plan)
    assert schedule is not None and schedule.sampling_rate == 0.25
    whole = schedule.over(schedule.round_event(), 5)
    promised = epsilon([whole], 1e-5)
    report = collect(run)
    with Ledger.open(run.ledger) as ledger:
        for device in ledger.devices():
            spending = [e for e in ledger.events(device) if e.to_json() == whole.to_json()]
            assert len(spending) == 1
        asked = len(ledger.devices())
    assert {g["epsilon"] for g in report["spent"]["groups"]} == {promised}  # the unasked too
    assert sum(g["clients"] for g in report["spent"]["groups"]) == 24 > asked
    assert promised <= 6.0 == pytest.approx(promised, rel=2e-3)
    rows = {row["field"]: row["answer"] for row in report["checklist"]}
    assert "by a coin of its own (Poisson sampling)" in rows["Sampling performed"]
    assert "Poisson sampling of clients at rate q = 0.25" in rows["Sampling accounted"]
    adversaries = {row["name"]: row for row in report["adversaries"]}
    assert adversaries["The server"]["epsilon"] == "infinity"
    assert "not who took part either" in adversaries["Readers of the models"]["assumes"]
    assert run.read_summary()["privacy"]["epsilon"] == promised
    # A sweep's table says the same, and nothing of the draw travels with the model.
    row = figures_of(run, Point((), plan.seed, plan))
    assert row.epsilons["Readers of the models"] == promised
    manifest = json.loads((run.artifact / "manifest.json").read_text())
    assert not {"largest_asked", "largest_participation"} & manifest["privacy"].keys()
    assert any("secret draws" in line["remark"] for line in report["not_covered"])
    require_told_nothing(run)
    write_reports(run)
    verify_report(run, read_public_key(run.keys / "signing_key.pub.pem"))


def require_told_nothing(run: Run) -> None:
    """With other cohorts of the same models, all that is shown would be the same."""
    plan, before = run.plan(), shown_of(run)
    lines = run.metrics.read_text()
    drawn = ("replies", "asked", "bytes_up", "bytes_down", "bytes_constants")
    rows = [json.loads(line) for line in lines.splitlines()]
    other = [
        row | {key: row[key] + 3 for key in drawn} | {"seconds": 9.9, "dropped": {"late": 2}}
        for row in rows
    ]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in other))
    with Ledger.open(run.ledger) as ledger:  # the same charge of clients that were not drawn
        schedule, known = schedule_for(plan), ledger.devices()
        assert schedule is not None
        whole = schedule.over(schedule.round_event(), schedule.participations)
        idle = [f"other-{n}" for n in range(plan.task.clients - len(known))]
        ledger.charge_many(idle, "run", 0, whole, Budget(9.0, 1e-5))
    assert shown_of(run) == before
    run.metrics.write_text(lines)


def shown_of(run: Run) -> list[Any]:
    """Return everything that is shown of a run, without the keyed head of its ledger."""
    data = collect(run)
    data["spent"]["ledger"].pop("head")
    data["checklist"] = [row for row in data["checklist"] if row["field"] != "Ledger head"]
    point, listed = Point((), run.plan().seed, run.plan()), describe(run.folder)
    pages = (render_html(data), render_md(data))
    return [data, *pages, compare(data, data), figures_of(run, point).values, listed]


@pytest.mark.parametrize("kind", ["file", "diurnal"])
def test_a_poisson_run_waits_for_its_devices_and_takes_the_time_of_its_price(
    kind: str, tmp_path: Path
) -> None:
    away = 'fleet.availability={kind="diurnal",low=0.0,high=0.05,zones=1,peak=12}'
    if kind == "file":
        (tmp_path / "late.csv").write_text("".join(f"{c},1000,1e6\n" for c in range(24)))
        away = f'fleet.availability={{kind="file",path="{tmp_path / "late.csv"}"}}'
    plan = secret("privacy.secret_cohort=false", "federation.rounds=12", away)
    price = explain_plan(plan)["fleet"]
    run = simulate(plan, tmp_path / "run")
    lines, fleet = run.read_metrics(), run.read_summary()["fleet"]
    # Sizes differ a little from the run's.
    for key in ("seconds", "energy", "bytes_up", "bytes_down"):
        assert price[key] == pytest.approx(fleet[key], rel=0.02)
    assert price["dropped"] == fleet["dropped"]
    assert price["charged_unused"] == fleet["charged_unused"]
    assert sum(m["replies"] for m in lines) > 0 and lines[0]["virtual"]["time"] > 1000
    times = [m["virtual"]["time"] for m in lines]
    assert all(later > now for now, later in pairwise(times))
    empty = [m for m in lines if m["asked"] == 0]
    if kind == "diurnal":
        assert empty and all(m["virtual"]["seconds"] >= 600 for m in empty)


def test_a_poisson_cohort_that_is_not_secret_is_reported_without_amplification(
    tmp_path: Path,
) -> None:
    run = simulate(secret("privacy.secret_cohort=false"), tmp_path / "run")
    rows = {row["field"]: row["answer"] for row in collect(run)["checklist"]}
    assert "Poisson sampling" in rows["Sampling performed"]
    assert rows["Sampling accounted"].startswith("none: a client of a round counts in full")
    assert not any("secret draws" in line["remark"] for line in collect(run)["not_covered"])
    manifest = json.loads((run.artifact / "manifest.json").read_text())
    assert manifest["privacy"]["largest_asked"] > 0


@pytest.mark.parametrize(
    ("override", "words", "kind"),
    [
        ('fleet.classes=[{kind="phone",memory=1e6}]', r"largest memory is 1e\+06", PlanError),
        ('fleet.availability={kind="file",path="none.csv"}', "none.csv", DataError),
    ],
)
def test_a_fleet_that_cannot_run_the_plan_is_refused_before_anything_is_written(
    tmp_path: Path, override: str, words: str, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=words):
        simulate(parse_plan("", [*SMALL, override]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], r"over_selection=1: .*round \d: the buffer cannot be filled"),
        (["fleet.over_selection=2.0", GONE], r"round 1: .*24 clients may be asked in 2 rounds"),
    ],
)
def test_a_buffered_plan_that_cannot_end_is_refused_and_priced(
    more: list[str], words: str, tmp_path: Path
) -> None:
    """Four rounds of six of 24 clients leave nobody to stand in for the first that is lost."""
    plan = small("federation.buffered.concurrency=6", *FOUR, *more)
    for refuses in (check_plan, lambda plan: simulate(plan, tmp_path / "run")):
        with pytest.raises(PlanError, match=words):
            refuses(plan)
    assert not (tmp_path / "run").exists()
    assert "the buffer cannot be filled" in explain_plan(plan)["fleet"]["failed"]
    spare = small("federation.buffered.concurrency=6", *FOUR, "fleet.over_selection=2.0")
    check_plan(spare)
    assert explain_plan(spare)["fleet"]["failed"] is None


def test_the_command_shows_virtual_time_and_prices_a_fleet(tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    arguments = [x for o in SMALL for x in ("--set", o)]
    plan.write_text("")
    priced = CliRunner().invoke(cli, ["plan", "explain", str(plan), *arguments])
    assert priced.exit_code == 0, priced.output
    assert "time on the fleet" in priced.output and "energy of the fleet" in priced.output
    where = ["--run", str(tmp_path / "run")]
    ran = CliRunner().invoke(cli, ["simulate", str(plan), *arguments, *where])
    assert ran.exit_code == 0, ran.output
    lines = ran.output.splitlines()
    assert all(" s" in line.split("fleet ")[1] for line in lines if line.startswith("round"))
    assert any(line.startswith("fleet ") and "a proxy" in line for line in lines)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["fleet"]["seconds"] > 0


@pytest.mark.parametrize(
    ("measured", "more", "said"),
    [
        (0.0039, [], False),
        (0.0041, [], True),
        (0.0011, [], False),
        (0.0009, [], True),
        (0.0041, ['fleet.classes=[{kind="pi4",steps_per_second=9.0}]'], False),  # has no effect
    ],
)
def test_a_price_says_if_its_step_is_far_from_the_one_that_was_measured(
    measured: float, more: list[str], said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explain, "_step_seconds", lambda *given: measured)
    (tmp_path / "plan.toml").write_text("")
    arguments = [x for o in [*SMALL, *more] for x in ("--set", o)]
    priced = CliRunner().invoke(cli, ["plan", "explain", str(tmp_path / "plan.toml"), *arguments])
    assert priced.exit_code == 0, priced.output
    words = "fleet.step_seconds=0.002, a local step of 2 ms on its reference machine, not with the "
    assert (f"{words}{1000 * measured:.3g} ms measured here" in priced.output) == said
    assert ("fleet.step_seconds" in priced.output) == said


def test_an_audit_of_a_secret_cohort_is_refused() -> None:
    with pytest.raises(PlanError, match="canary clients take part in every round"):
        audit_plan(secret())


def test_who_is_asked_again_and_used_after_all_was_not_charged_in_vain() -> None:
    plan = plan_of(
        12,
        6,
        6,
        "federation.retries=9",
        'fleet.classes=[{kind="phone",dropout=0.5}]',
        "fleet.startup=0.0",
        "fleet.step_seconds=5.0",
    )
    federation, charged = scripted(plan), Counter[tuple[int, int]]()

    def charge(run: str, number: int, noise: float, clients: Sequence[int]) -> Sequence[int]:
        charged.update({(number, node_of(client)) for client in clients})
        return clients

    federation.strategy._fleet = fleet_for(plan, 36, (200, 200), charge)
    federation.run()
    again = 0
    for number, tally in enumerate(federation.tallies, 1):
        nodes = {node for n, node in charged if n == number}
        assert tally.virtual is not None
        assert tally.virtual.unused == len(nodes - tally.accepted)
        again += len(nodes & tally.accepted)
    assert again > 0


@pytest.mark.parametrize(("back", "asked_again"), [(1000, 1000.0), (1300, 1200.0)])
def test_a_round_is_asked_again_once_a_quorum_is_back_or_after_the_timeout(
    back: int, asked_again: float, tmp_path: Path
) -> None:
    """All leave after 5 s, before they have trained; the fifth and sixth stay away for good."""
    lines = [f"{c},0,5\n{c},{back},{'1e6' if c < 4 else back + 1}\n" for c in range(6)]
    (tmp_path / "t.csv").write_text("".join(lines))
    path = f'fleet.availability={{kind="file",path="{tmp_path / "t.csv"}"}}'
    more = ["federation.retries=1", "federation.min_replies=4", "federation.timeout=600"]
    plan = plan_of(6, 6, 1, *ALIKE, path, *more)
    fleet = fleet_for(plan, 36, (200, 200), granting)
    asked: list[tuple[int, float]] = []
    ask = SimulatedFleet.ask

    def watched(self: SimulatedFleet, number: int, attempt: int, *given: Any) -> Any:
        asked.append((attempt, given[1]))
        return ask(self, number, attempt, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimulatedFleet, "ask", watched)
        price, federation = priced(plan, fleet), scripted(plan)
        if back > 1200:
            with pytest.raises(NetworkError, match="4 are needed, asked 2 times"):
                federation.run()
            assert "0 clients give a reply in time" in price["failed"]
        else:
            tally = federation.run()
            assert tally.accepted == {2, 3, 4, 5} and price["failed"] is None
            assert tally.virtual is not None and tally.virtual.ends == price["seconds"] > 1000
    assert asked == 2 * [(0, 0.0), (1, asked_again)]


@pytest.mark.parametrize("more", [[], BUFFERED], ids=["synchronous", "buffered"])
def test_who_could_not_bear_the_round_was_not_charged_in_vain(more: list[str]) -> None:
    lossy = ['fleet.classes=[{kind="phone",dropout=0.4}]', "fleet.startup=0.0"]
    given = [*lossy, "fleet.step_seconds=5.0", "fleet.over_selection=2.0", "privacy.trust=local"]
    plan = plan_of(24, 6, 6, *given, *more)
    federation, charged, refused = scripted(plan), set[tuple[int, int]](), set[tuple[int, int]]()

    def charge(run: str, number: int, noise: float, clients: Sequence[int]) -> Sequence[int]:
        refused.update((number, client) for client in clients if client % 3 == 0)
        charged.update((number, client) for client in clients if client % 3)
        return [client for client in clients if client % 3]

    fleet = fleet_for(plan, 36, (200, 200), charge)
    federation.strategy._fleet = fleet
    federation.run()
    counted = sum(t.virtual.unused for t in federation.tallies if t.virtual is not None)
    lost = {
        (number, client)
        for number, client in charged
        if node_of(client) not in federation.tallies[number - 1].accepted  # once more asked
    }
    if more:  # a buffered run charges those whose update is used here too
        releases = zip(range(6), fleet.releases(range(2, 26)), strict=False)
        lost = {(given + 1, node - 2) for _, r in releases for node, given in r.unused} & charged
    assert refused and counted == len(lost) > 0


def test_charges_are_those_that_were_used_and_those_in_vain_when_budgets_end(
    tmp_path: Path,
) -> None:
    plan = small(
        "task.clients=20",
        "privacy.trust=local",
        "privacy.noise_multiplier=0.6",
        "privacy.budget=5.5",
        "federation.sampling_rate=0.1",
        "federation.sampling=fixed",
        "federation.clients_per_round=8",
        "federation.min_replies=1",
        "federation.rounds=5",
        "fleet.over_selection=2.0",
    )
    run = simulate(plan, tmp_path / "run")
    lines = run.read_metrics()
    assert any("budget" in reason for m in lines for reason in m["dropped"])
    used = sum(m["replies"] + m["virtual"]["charged_unused"] for m in lines)
    assert charges_of(run) == used


EARLY = ["federation.min_replies=2", "privacy.trust=local", "federation.retries=9"]
LOSSY = ['fleet.classes=[{kind="phone",dropout=0.3}]', "federation.timeout=40"]
LONG = ["fleet.startup=0.0", "fleet.step_seconds=5.0"]


def test_of_a_fleet_the_first_enough_replies_by_its_clock_are_used() -> None:
    """Asking 6 for enough=3 is asking 6 for 3 by over-selection, retries included."""
    ends: list[tuple[bytes, list[Any]]] = []
    for cohort, more in (
        (6, ["federation.enough=3"]),
        (3, ["fleet.over_selection=2.0"]),
    ):
        plan = plan_of(24, cohort, 8, *EARLY, *LOSSY, *LONG, *more)
        federation = scripted(plan)
        fleet, now = fleet_for(plan, 36, (200, 200), granting), 0.0
        federation.run()
        for number, tally in enumerate(federation.tallies, 1):
            trips = fleet.trips(np.array(tally.devices) - node_of(0), now, (number, 0))
            answers = np.where(np.isinf(trips.lost), trips.finish, np.inf)
            third = np.sort(answers)[2]
            virtual = tally.virtual
            assert virtual is not None
            if third < now + 40:
                first = {tally.devices[i] for i in np.flatnonzero(answers <= third)}
                assert tally.accepted == first and virtual.ends == third
                assert virtual.unused == sum(trips.charged(fleet.work)) - 3 > 0
            now = virtual.ends
        # Energies are sums in the order of asking, which differs.
        virtual = [replace(t.virtual, energy=0.0) for t in federation.tallies if t.virtual]
        figures = [[t.accepted, t.devices, t.dropped] for t in federation.tallies] + virtual
        ends.append((federation.states[-1].weights.tobytes(), figures))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("devices", [[], ALIKE], ids=["different", "alike"])
def test_a_run_on_a_fleet_that_closes_early_has_its_price_with_any_number_of_workers(
    devices: list[str], tmp_path: Path
) -> None:
    early = ["federation.enough=4", "federation.sampling=fixed", "privacy.trust=local"]
    plan = small(*early, *LONG, *devices)
    price = explain_plan(plan)["fleet"]
    one = simulate(plan, tmp_path / "one")
    two = simulate(plan.model_copy(update={"engine": TWO}), tmp_path / "two")
    fleet, lines = one.read_summary()["fleet"], one.read_metrics()
    assert price["seconds"] == pytest.approx(fleet["seconds"], rel=1e-3)
    assert price["charged_unused"] == fleet["charged_unused"] > 0
    assert price["dropped"] == fleet["dropped"] and fleet["dropped"][SURPLUS] > 0
    assert all(m["replies"] == 4 for m in lines)
    assert charges_of(one) == 4 * len(lines) + fleet["charged_unused"]
    assert two.read_summary()["model"] == one.read_summary()["model"]
    assert two.read_summary()["fleet"] == fleet


@pytest.mark.parametrize(
    ("size", "more"), [(6, "federation.enough=2"), (2, "fleet.over_selection=3.0")]
)
def test_of_replies_that_come_at_once_those_of_low_numbers_are_not_preferred(
    size: int, more: str
) -> None:
    plan = plan_of(6, size, 30, *EARLY, *ALIKE, more)
    federation = scripted(plan)
    federation.run()
    used = Counter(node for tally in federation.tallies for node in tally.accepted)
    assert sum(used.values()) == 60 and set(used) == set(range(2, 8))


@pytest.mark.parametrize("control", [False, True])
def test_a_device_whose_update_is_not_used_was_sent_as_much_as_any_other(control: bool) -> None:
    lossy = 'fleet.classes=[{kind="phone",dropout=0.4}]'
    more = ["federation.min_replies=2", "privacy.unit=client", "fleet.over_selection=1.5"]
    scaffold = f"federation.local.scaffold={str(control).lower()}"
    federation = scripted(plan_of(12, 6, 4, lossy, *more, scaffold))
    federation.run()
    size = len(encoded(vector_of(2)))  # of a model, and of a control variate
    for tally in federation.tallies:
        assert len(tally.accepted) < tally.asked
        assert tally.bytes_down == tally.asked * size * (2 if control else 1)
