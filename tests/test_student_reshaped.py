"""Runs whose student has other layers than the task's own: sent, rebuilt, resumed, deployed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reticent.client.training import LocalTrainer, student_model
from reticent.compression.structure import describe
from reticent.core.errors import PayloadError, PlanError
from reticent.core.plan import Plan, parse_plan
from reticent.core.protocol import Constants
from reticent.core.run import Run
from reticent.core.tasks import Task, load_task
from reticent.core.update import Layout
from reticent.privacy.schedule import schedule_for
from reticent.server.export import export_run
from reticent.server.journal import Journal
from reticent.server.preparation import Start, prepare
from reticent.server.shrinking import sketch, structure_of
from reticent.simulations.audit_examples import canary_layout, observe_examples
from reticent.simulations.explain import explain_plan
from reticent.simulations.simulate import simulate

SMALL = [
    "task.name=digits",
    "task.clients=4",
    "task.public_examples=100",
    "teacher.epochs=1",
    "student.epochs=2",
    "federation.clients_per_round=4",
    "federation.rounds=2",
    "federation.sampling_rate=0.2",
    "engine.workers=1",
]

THIN = ["student.thin.kind=taylor", "student.thin.share=0.3"]
FACTORIZE = ["student.factorize.kind=svd", "student.factorize.keep=0.5"]
SHAPES = {"thin+factorize": [*THIN, *FACTORIZE]}
NO_SOFT = np.zeros((0, 0), dtype=np.float32)


def plan_of(*overrides: str) -> Plan:
    return parse_plan("", [*SMALL, *overrides])


def task_of(plan: Plan) -> Task:
    return load_task(plan.task, plan.seed)


class Stopped(Exception):
    """Stands for a crash."""


def stop(metrics: dict[str, Any]) -> None:
    raise Stopped


def start_of(run: Run) -> Start:
    journal, plan = Journal(run), run.plan()
    try:
        return prepare(plan, task_of(plan), journal, lambda _: None)
    finally:
        journal.close()


@pytest.mark.parametrize("kind", sorted(SHAPES))
def test_a_reshaped_run_is_deployed_and_a_stopped_one_ends_with_the_same_bits(
    kind: str, tmp_path: Path
) -> None:
    plan = plan_of(*SHAPES[kind])
    run = simulate(plan, tmp_path / "run")
    summary = run.read_summary()
    parameters = summary["parameters"]
    assert parameters["kept"] < parameters["total"] < parameters["before"]
    assert parameters["deployed"] < parameters["before"] == 15_338
    assert summary["agreement"]["fake_quantized"] > 0.95
    with pytest.raises(Stopped):
        simulate(plan, tmp_path / "stopped", progress=stop)
    again = simulate(plan, tmp_path / "stopped", resume=True)
    assert again.read_summary()["model"] == summary["model"]
    exported = export_run(run, tmp_path / "artifact")
    assert exported["model"] == summary["model"] and exported["bytes"] == summary["bytes"]


@pytest.mark.parametrize("kind", sorted(SHAPES))
def test_what_is_priced_and_audited_has_the_sizes_of_what_is_run(kind: str, tmp_path: Path) -> None:
    plan = plan_of(*SHAPES[kind])
    with pytest.raises(Stopped):
        simulate(plan, tmp_path / "run", progress=stop)
    start = start_of(Run(tmp_path / "run"))
    shapes = Layout.of(sketch(plan, task_of(plan))).shapes
    assert shapes == start.layout.shapes
    assert Constants.decode(start.constants).structure == describe(start.student)
    assert canary_layout(plan, task_of(plan), 0).shapes == shapes
    off = plan_of(*SHAPES[kind], "student.prune.kind=none")
    assert explain_plan(off)["parameters"] == start.layout.total


def test_an_audit_runs_on_a_reshaped_student() -> None:
    plan = plan_of(*THIN)
    schedule = schedule_for(plan)
    assert schedule is not None
    observed = observe_examples(plan, task_of(plan), schedule, count=20, rounds=1, seed=0)
    assert np.isfinite(observed.projections).all()


def test_devices_take_a_structure_exactly_when_the_plan_changes_the_layers() -> None:
    own, thin = plan_of(), plan_of(*THIN)
    task = task_of(thin)
    text = structure_of(thin, task, sketch(thin, task))
    assert structure_of(own, task, sketch(own, task)) == ""
    assert describe(student_model(task, thin, text)) == text
    constants = Constants(b"", NO_SOFT, text)
    LocalTrainer(thin, task, constants)
    with pytest.raises(PayloadError, match="is there though the plan does not change"):
        LocalTrainer(own, task, constants)
    with pytest.raises(PayloadError, match="is missing"):
        LocalTrainer(thin, task, replace(constants, structure=""))
    with pytest.raises(PayloadError, match="structure"):
        LocalTrainer(thin, task, replace(constants, structure=text.replace("relu", "run")))
    with pytest.raises(PayloadError, match="must be"):
        LocalTrainer(thin, task, replace(constants, structure=text.replace("10", "11")))


def test_constants_carry_a_structure_and_without_one_are_what_they_were() -> None:
    bare, full = Constants(b"\1", NO_SOFT), Constants(b"\1", NO_SOFT, '{"x":1}')
    for constants in (bare, full):
        back = Constants.decode(constants.encode())
        assert (back.kept, back.structure) == (constants.kept, constants.structure)
    assert b"structure" not in bare.encode()
    with pytest.raises(PayloadError, match="ASCII"):
        Constants.decode(full.encode().replace(b'{"x":1}', b'{"\xc3":1}'))


def test_a_layer_that_would_be_emptied_is_refused_before_anything_is_trained() -> None:
    with pytest.raises(PlanError, match=r"layer 0; must be at most 0\.9375"):
        explain_plan(plan_of("student.thin.kind=l1", "student.thin.share=0.99"))
