"""Runs of sequence students: they finish, are private, and say that there is no int8 artifact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from reticent.cli.main import cli
from reticent.compression.backends.profiles import NO_LIMITS
from reticent.compression.forms import integer_problem
from reticent.core import models, sequences
from reticent.core.errors import ArtifactError
from reticent.core.plan import Plan, parse_plan
from reticent.core.tasks import Examples, OwnedTask
from reticent.privacy.report import write_reports
from reticent.server.bench import bench_run
from reticent.server.export import export_run
from reticent.simulations.explain import check_plan
from reticent.simulations.simulate import simulate

TINY = [
    "task.name=text",
    "task.clients=4",
    "task.public_examples=100",
    "task.partition.examples_per_client=30",
    "teacher.epochs=1",
    "student.epochs=1",
    "federation.rounds=2",
    "federation.clients_per_round=4",
    "engine.workers=1",
]


def _plan(kind: str) -> Plan:
    return parse_plan("", [*TINY, f"student.model={kind}"])


@pytest.fixture(autouse=True)
def few_test_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = OwnedTask.test

    def few(task: OwnedTask) -> Examples:
        inputs, labels = whole(task)
        return Examples(inputs[:200], labels[:200])

    monkeypatch.setattr(OwnedTask, "test", few)


@pytest.mark.parametrize("kind", ["lstm", "attention"])
def test_a_run_finishes_and_says_why_there_is_no_artifact(kind: str, tmp_path: Path) -> None:
    run = simulate(_plan(kind), tmp_path / "run")
    summary = run.read_summary()
    assert not run.artifact.exists()
    assert summary["no_artifact"] == integer_problem(sequences.student(kind, (40,), 36))
    assert summary["privacy"]["epsilon"] <= 8
    assert set(summary["accuracy"]) == {"teacher", "public_only", "public_only_pruned", "fp32"}
    assert summary["parameters"]["kept"] < 0.52 * summary["parameters"]["total"]
    assert all(path.is_file() for path in write_reports(run))
    rows = json.loads((run.folder / "report.json").read_text())["models"]
    assert [row["key"] for row in rows if row["key"] == "int8"] == []
    for action in (
        lambda: export_run(run, run.artifact, "qnnpack", 0.9),
        lambda: bench_run(run, 10, NO_LIMITS),
    ):
        with pytest.raises(ArtifactError, match=r"integer form|nn\.Sequential students"):
            action()


def test_the_float_model_of_a_dynamic_student_is_measured(tmp_path: Path) -> None:
    plan = parse_plan("", [*TINY, "student.model=gru", "student.quantize.kind=dynamic"])
    run = simulate(plan, tmp_path / "run")
    rows = {row["model"]: row for row in bench_run(run, 10, NO_LIMITS)}
    assert rows.keys() == {"teacher", "fp32", "int8"}
    assert rows["fp32"]["median_us"] > 0 and rows["fp32"]["bytes"] > rows["int8"]["bytes"]


def test_the_command_ends_well_without_an_artifact(tmp_path: Path) -> None:
    sets = [part for s in [*TINY, "student.model=gru"] for part in ("--set", s)]
    result = CliRunner().invoke(cli, ["simulate", "--run", str(tmp_path / "run"), *sets])
    assert result.exit_code == 0, result.output
    assert "no int8 artifact: layer 0 (OneHot) has no integer form" in result.output
    assert 'student.quantize.kind="dynamic" quantizes this student' in result.output
    assert "artifact  none" in result.output
    assert "int8    " not in result.output
    assert (tmp_path / "run" / "report.html").is_file()


def test_the_price_of_a_plan_says_that_there_will_be_no_artifact(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text("")
    sets = [part for s in [*TINY, "student.model=gru"] for part in ("--set", s)]
    result = CliRunner().invoke(cli, ["plan", "explain", str(path), *sets])
    assert "no int8 artifact: layer 0 (OneHot) has no integer form" in result.output
    images = ["--set", "task.name=digits", "--set", "task.public_examples=100"]
    result = CliRunner().invoke(cli, ["plan", "explain", str(path), *images])
    assert result.exit_code == 0
    assert "no int8 artifact" not in result.output


def test_image_students_have_an_integer_form() -> None:
    assert integer_problem(models.student("tiny-gn", (1, 8, 8), 10)) is None
    assert integer_problem(models.teacher((1, 8, 8), 10)) is not None


@pytest.mark.parametrize("kind", sequences.STUDENTS)
def test_a_plan_of_sequences_is_checked_without_reading_data(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OwnedTask, "_arrays", property(lambda _: pytest.fail("data were read")))
    check_plan(_plan(kind))
