"""``reticent compress``: targets, what a search reads, what it rehearses, what it chooses."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from reticent.cli.main import cli
from reticent.core.errors import DataError, PlanError
from reticent.core.plan import Plan, load_plan, parse_plan
from reticent.core.tasks import ImageTask, Task, load_task
from reticent.core.update import Layout
from reticent.privacy.schedule import schedule_for
from reticent.server.preparation import Start
from reticent.simulations.compress import Target, Trial, parse_targets
from reticent.simulations.compress import rehearsal as rehearsing
from reticent.simulations.compress.moves import TECHNIQUES, Candidate, changed
from reticent.simulations.compress.public_half import PublicHalf
from reticent.simulations.compress.rehearsal import rehearse
from reticent.simulations.compress.search import Outcome, beats, climb, excess, front, ties
from reticent.simulations.compress.writing import (
    markdown,
    nearest,
    plot,
    require_writable,
    to_json,
)

SMALL = (
    "task.name=digits",
    "task.clients=10",
    "task.public_examples=100",
    "teacher.epochs=1",
    "student.epochs=1",
    "federation.rounds=2",
    "federation.clients_per_round=10",
    "engine.workers=1",
)
PLAN = parse_plan("", SMALL)


@pytest.mark.parametrize(
    ("text", "kind", "limit"),
    [
        ("size=20kB", "size", 20_000),
        ("size=1.5MB", "size", 1_500_000),
        ("bytes=900", "bytes", 900),
        ("latency=100us", "latency", 100),
        ("latency=0.2ms", "latency", 200),
        ("latency=100µs", "latency", 100),
    ],
)
def test_a_target_is_read_with_its_unit(text: str, kind: str, limit: float) -> None:
    assert parse_targets([text]) == (Target(kind, limit, text),)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([], "at most once, and one"),
        (["size=1kB", "size=2kB"], "at most once"),
        (["weight=3"], "must be one of size"),
        (["size"], "must be one of size"),
        (["size=3us"], "unit 'us' must be one of B, kB, MB"),
        (["latency=-1us"], "must be a finite number above 0"),
        (["latency=0us"], "must be a finite number above 0"),
        (["bytes=1e999"], "must be a finite number above 0"),
        (["bytes=1-2"], "must be a finite number above 0"),
    ],
)
def test_a_target_that_cannot_be_is_named(texts: list[str], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        parse_targets(texts)


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task(PLAN.task, 0)


def test_a_search_reads_neither_private_nor_test_examples(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any) -> Any:
        raise AssertionError("was read")

    monkeypatch.setattr(ImageTask, "client", refuse)
    monkeypatch.setattr(ImageTask, "test", refuse)
    half = PublicHalf(task, 0)
    trained, held = half.public(), half.test()
    with pytest.raises(DataError, match="reads no private data"):
        half.client(0)
    rows = {r.tobytes() for r in task.public().inputs.numpy()}
    first, second = ({r.tobytes() for r in part.inputs.numpy()} for part in (trained, held))
    assert not first & second and first | second == rows
    assert (len(trained.labels), len(held.labels)) == (80, 20)
    assert set(Counter(held.labels.tolist()).values()) == {2}, "as many of every label"


def test_too_few_public_examples_are_refused(task: Task) -> None:
    few = load_task(PLAN.task.model_copy(update={"public_examples": 9}), 0)
    with pytest.raises(DataError, match="9 public examples"):
        PublicHalf(few, 0)
    with pytest.raises(DataError, match="8 public examples with labels"):
        PublicHalf(task, 0, labels=8)


def test_a_search_judges_by_labels_that_the_plan_gives(task: Task) -> None:
    half, public = PublicHalf(task, 0, labels=30), task.public()
    place = {row.tobytes(): index for index, row in enumerate(public.inputs.numpy())}
    trained, held = (
        [place[row.tobytes()] for row in part.inputs.numpy()]
        for part in (half.public(), half.test())
    )
    assert (half.labels, len(held), len(trained)) == (24, 6, 94)
    assert max(held) < 30 and sorted(held + trained) == list(range(100))
    assert max(trained[:24]) < 30 <= min(trained[24:]), "those with labels come first"
    assert PublicHalf(task, 0).labels is None


def test_a_trial_trains_on_no_label_that_the_plan_does_not_give(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from reticent.simulations.compress import trials

    seen: list[int | None] = []

    def prepare(plan: Plan, *rest: Any) -> Any:
        seen.append(plan.task.public_labels)
        raise DataError("enough")

    monkeypatch.setattr(trials, "prepare", prepare)
    plan = parse_plan("", [*SMALL, "task.public_labels=30"])
    half = PublicHalf(load_task(plan.task, 0), 0, plan.task.public_labels)
    with pytest.raises(DataError, match="enough"):
        trials.run_trial(Candidate(plan), half, trials.Prepared())
    assert seen == [24]


def test_a_codec_that_sends_next_to_nothing_learns_next_to_nothing(task: Task) -> None:
    half = Linear(PublicHalf(task, 0))

    def moved(codec: str) -> float:
        plan = parse_plan(
            "",
            [
                *SMALL,
                "privacy.trust=local",
                "privacy.noise_multiplier=0.5",
                f"updates.codec={codec}",
                'federation.server.kind="sgd"',
                'student.prune.kind="none"',
            ],
        )
        start = start_of(half, plan)
        return float(
            np.linalg.norm(rehearse(plan, half, start, schedule_for(plan)) - start.weights)
        )

    assert moved('["topk:0.002"]') < 0.3 * moved('["identity"]')


def start_of(task: Task, plan: Plan) -> Start:
    torch.manual_seed(0)
    student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    layout = Layout.of(student)
    from reticent.core.protocol import Constants

    constants = Constants(b"", np.zeros((0, 0), dtype=np.float32)).encode()
    return Start(student, student, student, layout, layout.read(student), constants)


class Linear:
    """The digits with a linear student."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def student(self, model: str) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))


@pytest.mark.parametrize(("most", "trust"), [(20_000, "aggregator"), (300, "local")])
@pytest.mark.parametrize(("scale", "holds"), [(1.0, True), (2 / 3, False)])
def test_a_rehearsed_round_carries_the_noise_of_a_real_one(
    task: Task, monkeypatch: pytest.MonkeyPatch, most: int, trust: str, scale: float, holds: bool
) -> None:
    monkeypatch.setattr(rehearsing, "MOST", most)
    plan = parse_plan(
        "",
        [
            *SMALL,
            "privacy.noise_multiplier=20",
            f'privacy.trust="{trust}"',
            "federation.rounds=1",
            "federation.average=0",
            'federation.server.kind="sgd"',
            "federation.server.momentum=0",
            "federation.server.learning_rate=1",
            'student.prune.kind="none"',
            'student.quantize.kind="none"',
        ],
    )
    linear = Linear(task)
    start, schedule = start_of(linear, plan), schedule_for(plan)
    assert schedule is not None
    given = replace(schedule, noise_multiplier=scale * schedule.noise_multiplier)
    moved = rehearse(plan, linear, start, given) - start.weights
    # Ten clients, each with its share of the noise over q times its examples; then their mean.
    shares = plan.federation.quorum if trust == "aggregator" else 1
    one = 20 * 0.5 / shares**0.5 / (0.1 * task.nominal_examples)
    assert (abs(float(moved.std()) / (one / 10**0.5) - 1) < 0.12) is holds


def test_a_rehearsal_without_privacy_learns(task: Task) -> None:
    plan = parse_plan(
        "",
        [
            *SMALL,
            'privacy="off"',
            "federation.rounds=20",
            "federation.server.learning_rate=0.05",
            'student.prune.kind="none"',
            'student.quantize.kind="none"',
        ],
    )
    half = Linear(PublicHalf(task, 0))
    start = start_of(half, plan)
    start.layout.write(start.student, rehearse(plan, half, start, None))
    with torch.no_grad():
        hits = start.student(half.test().inputs).argmax(1) == half.test().labels
    assert float(hits.float().mean()) > 0.7


def test_rounds_of_whole_clients_cannot_be_rehearsed() -> None:
    from reticent.simulations.compress import search

    plan = parse_plan("", [*SMALL, 'privacy.unit="client"'])
    with pytest.raises(PlanError, match="search rehearses rounds"):
        search(plan, parse_targets(["size=1kB"]), 1, print)


def trial(size: int, accuracy: float, latency: float = 10.0, up: int = 10) -> Trial:
    return Trial(Candidate(PLAN), 1, size, latency, up, 0.5, accuracy, 100)


TARGET = (Target("size", 100.0, "size=100B"),)


def test_nearness_decides_first_and_then_a_clear_gain_in_accuracy() -> None:
    met, far, near = trial(99, 0.5), trial(1000, 0.999), trial(101, 0.99)
    assert beats(met, near, TARGET) and beats(near, far, TARGET) and not beats(far, met, TARGET)
    assert excess(met, TARGET) == 0 and math.isclose(excess(far, TARGET), math.log(10))
    # A standard error at one half of 100 examples is 5 points.
    assert beats(trial(100, 0.551), met, TARGET) and not beats(trial(100, 0.549), met, TARGET)


def test_gains_within_the_noise_of_few_examples_change_nothing() -> None:
    draws = np.random.default_rng(0).binomial(100, 0.8, 200) / 100
    lucky = [trial(50, float(share)) for share in draws if share <= 0.83]
    outcome = Outcome(TARGET, [trial(50, 0.8), *lucky])
    assert len(lucky) > 150 and outcome.best is outcome.trials[0]


def test_being_cheaper_wins_nothing_once_the_targets_are_met() -> None:
    given = trial(80, 0.8, latency=100.0, up=10)
    assert not beats(trial(60, 0.8, 60.0, 9), given, TARGET)
    assert not beats(given, trial(60, 0.8, 60.0, 9), TARGET)


def test_ties_meet_the_targets_and_are_as_accurate_within_the_noise() -> None:
    best, worse, near, large = trial(80, 0.8), trial(60, 0.75), trial(60, 0.77), trial(200, 0.8)
    outcome = Outcome(TARGET, [best, worse, near, large])
    assert outcome.best is best and ties(outcome) == [near]


def test_latencies_within_a_twentieth_are_one_measurement() -> None:
    given = trial(80, 0.8, latency=100.0)
    assert front([given, trial(80, 0.8, 96.0)]) == [given, trial(80, 0.8, 96.0)]
    assert front([given, trial(80, 0.8, 94.0)]) == [trial(80, 0.8, 94.0)]
    assert front([given, trial(60, 0.8, 104.0)]) == [trial(60, 0.8, 104.0)]


FIGURES = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))


@given(st.lists(FIGURES, min_size=1, max_size=12))
def test_the_front_is_what_nothing_else_dominates(figures: list[tuple[int, int, int, int]]) -> None:
    trials = [trial(s, a / 10, float(t), u) for s, t, u, a in figures]
    kept = front(trials)

    def beats(one: Trial, other: Trial) -> bool:
        pairs = [(one.size, other.size), (one.latency, other.latency), (one.bytes, other.bytes)]
        pairs.append((-one.accuracy, -other.accuracy))
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    for each in trials:
        assert (each in kept) == (not any(beats(other, each) for other in trials))


def costs(candidate: Candidate) -> Trial:
    """Every bit of sparsity makes the file smaller and the model worse; distilling helps."""
    student = candidate.plan.student
    pruned = student.prune.sparsity if student.prune.kind != "none" else 0.0
    helped = 0.05 * (student.distill.kind != "none")
    size = round(200 * (1 - pruned))
    return Trial(candidate, 1, size, 10.0, 10, 0.5, 0.9 - 0.2 * pruned + helped, 10_000)


def test_the_search_ends_at_the_most_accurate_plan_that_meets_the_target() -> None:
    said: list[str] = []
    plan = parse_plan("", [*SMALL, 'student.distill.kind="none"'])
    outcome = climb(plan, TARGET, 50, said.append, costs)
    best = outcome.best.candidate.plan.student
    assert outcome.met and (best.prune.sparsity, best.distill.kind) == (0.5, "response")
    digests = [t.candidate.plan.digest for t in outcome.trials]
    assert len(digests) == len(set(digests)) == len(said), "nothing is measured twice"
    assert outcome.trials[0].candidate.name == "as given"


def test_bytes_are_saved_by_the_codec_before_a_smaller_student_pays_for_them() -> None:
    def measure(candidate: Candidate) -> Trial:
        student, step = candidate.plan.student, candidate.plan.updates.step
        thinned = student.thin.kind != "none"
        sent = round((500 if thinned else 1000) / step)
        return Trial(candidate, 1, 100, 10.0, sent, 0.5, 0.9 - 0.1 * thinned, 10_000)

    outcome = climb(PLAN, (Target("bytes", 250.0, "bytes=250"),), 8, lambda line: None, measure)
    best = outcome.best.candidate.plan
    assert outcome.met and (best.updates.step, best.student.thin.kind) == (4.0, "none")


def test_the_search_keeps_to_its_number_of_trials() -> None:
    assert len(climb(PLAN, TARGET, 3, lambda line: None, costs).trials) == 3
    with pytest.raises(PlanError, match="--trials 0"):
        climb(PLAN, TARGET, 0, lambda line: None, costs)


def test_a_move_that_does_not_fit_is_kept_with_its_reason() -> None:
    def picky(candidate: Candidate) -> Trial:
        if candidate.plan.student.prune.kind == "none":
            raise PlanError("student cannot be unpruned")
        return costs(candidate)

    outcome = climb(PLAN, TARGET, 50, lambda line: None, picky)
    assert ("no pruning", "student cannot be unpruned") in outcome.refused
    assert "- no pruning: student cannot be unpruned" in markdown(outcome)


def test_a_target_that_nothing_meets_names_the_least() -> None:
    outcome = climb(PLAN, (Target("size", 10.0, "size=10B"),), 50, lambda line: None, costs)
    assert not outcome.met
    assert nearest(outcome).startswith("size=10B: the least was 30 B")


def test_every_move_of_every_technique_makes_a_valid_plan() -> None:
    for technique, moves in TECHNIQUES.items():
        for move in moves:
            assert changed(PLAN, move).task == PLAN.task, (technique, move.name)


def test_table_json_and_plot_agree() -> None:
    outcome = climb(PLAN, TARGET, 50, lambda line: None, costs)
    data = json.loads(json.dumps(to_json(outcome)))
    assert data["met"] and len(data["trials"]) == len(outcome.trials)
    dots = ElementTree.fromstring(plot(outcome)).findall(".//{*}circle[@r='5']")
    assert len(dots) == len(outcome.trials)
    lines = [line for line in markdown(outcome).splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + len(outcome.trials)
    assert sum("→" in line for line in lines) == 1
    assert plot(Outcome(TARGET, [trial(5, 0.5)]))  # one point has no range


def test_the_command_searches_and_writes_a_plan_that_runs(tmp_path: Path) -> None:
    given = [f"--set={o}" for o in SMALL]
    out = tmp_path / "out"
    result = CliRunner().invoke(
        cli, ["compress", *given, "--target", "size=100kB", "--trials", "2", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert {p.name for p in out.iterdir()} == {
        "pareto.json",
        "pareto.md",
        "pareto.svg",
        "plan.toml",
    }
    data = json.loads((out / "pareto.json").read_text())
    assert load_plan(out / "plan.toml").digest == data["best"]
    assert "best:" in result.output and "reticent simulate" in result.output


def test_an_impossible_target_is_an_error_and_leaves_the_table(tmp_path: Path) -> None:
    given = [f"--set={o}" for o in SMALL]
    out = tmp_path / "out"
    result = CliRunner().invoke(
        cli, ["compress", *given, "--target", "size=10B", "--trials", "1", "--out", str(out)]
    )
    assert isinstance(result.exception, PlanError) and "the least was" in str(result.exception)
    assert (out / "pareto.md").is_file()


def test_a_folder_that_cannot_take_the_outcome_is_refused_before_the_search(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "plan.toml").write_text("# somebody's\n")
    for out, reason in [(tmp_path / "file", "cannot be written"), (tmp_path, "plan.toml")]:
        result = CliRunner().invoke(cli, ["compress", "--target", "size=9kB", f"--out={out}"])
        assert isinstance(result.exception, PlanError) and reason in str(result.exception)
    assert (tmp_path / "plan.toml").read_text() == "# somebody's\n"


@pytest.mark.parametrize("name", ["pareto.json", "pareto.md", "pareto.svg", "plan.toml"])
def test_files_that_no_search_wrote_are_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / "pareto.json").write_text('{"front": [1, 2]}')
    (tmp_path / name).write_text('{"precious": true}')
    with pytest.raises(PlanError, match=r"--out .* of another kind, which would be replaced"):
        require_writable(tmp_path)
    (tmp_path / "pareto.json").unlink()
    if name != "pareto.json":
        with pytest.raises(PlanError, match=f"holds a {name} of another kind"):
            require_writable(tmp_path)
        assert (tmp_path / name).read_text() == '{"precious": true}'


def test_the_outcome_of_an_earlier_search_may_be_replaced(tmp_path: Path) -> None:
    data = to_json(Outcome(TARGET, [trial(5, 0.5)]))
    (tmp_path / "pareto.json").write_text(json.dumps(data))
    (tmp_path / "plan.toml").write_text("")
    require_writable(tmp_path)
