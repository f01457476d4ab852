"""Runs whose student has other layers than the task's own: sent, rebuilt, resumed, deployed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reticent.client.training import LocalTrainer, student_model
from reticent.compression.adapt import merged
from reticent.compression.structure import describe
from reticent.core.errors import PayloadError, PlanError
from reticent.core.plan import Plan, parse_plan
from reticent.core.protocol import Constants
from reticent.core.run import Run, create_run
from reticent.core.tasks import Task, load_task
from reticent.core.update import Layout
from reticent.privacy.schedule import schedule_for
from reticent.server.export import export_run
from reticent.server.journal import Journal
from reticent.server.preparation import Start, prepare
from reticent.server.shrinking import constants_of, sketch
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
FACTORIZE = [
    "student.factorize.kind=svd",
    "student.factorize.rule=size",
    "student.factorize.keep=0.5",
]
ADAPT = ["student.adapt.kind=lora", "student.adapt.rank=2", "student.prune.kind=none"]
LOCAL = ["privacy.trust=local", "federation.steps_per_round=2"]
SHAPES = {
    "thin+factorize": [*THIN, *FACTORIZE],
    "thin+adapt": [*THIN, *ADAPT, *LOCAL, "student.distill.local_weight=0.5"],
}
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


def test_a_reshaped_run_is_deployed_and_exported(tmp_path: Path) -> None:
    run = simulate(plan_of(*SHAPES["thin+factorize"]), tmp_path / "run")
    summary = run.read_summary()
    parameters = summary["parameters"]
    assert parameters["kept"] < parameters["total"] == parameters["deployed"]
    assert parameters["deployed"] < parameters["before"] == 15_338
    assert summary["agreement"]["fake_quantized"] > 0.95
    exported = export_run(run, tmp_path / "artifact", "qnnpack", 0.9)
    assert exported["model"] == summary["model"] and exported["bytes"] == summary["bytes"]


def test_a_stopped_run_with_everything_ends_with_the_same_bits(tmp_path: Path) -> None:
    plan = plan_of(*SHAPES["thin+adapt"])
    summary = simulate(plan, tmp_path / "run").read_summary()
    parameters = summary["parameters"]
    assert parameters["kept"] == parameters["total"] < parameters["deployed"] == 7_578
    with pytest.raises(Stopped):
        simulate(plan, tmp_path / "stopped", progress=stop)
    again = simulate(plan, tmp_path / "stopped", resume=True).read_summary()
    assert again["model"] == summary["model"] and again["accuracy"] == summary["accuracy"]


@pytest.mark.parametrize("kind", sorted(SHAPES))
def test_what_is_priced_and_audited_has_the_sizes_of_what_is_run(kind: str, tmp_path: Path) -> None:
    plan = plan_of(*SHAPES[kind])
    start = start_of(create_run(tmp_path / "run", plan))
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
    constants = constants_of(thin, task, sketch(thin, task), b"", NO_SOFT)
    text = constants.structure
    assert constants_of(own, task, sketch(own, task), b"", NO_SOFT).structure == ""
    assert describe(student_model(task, thin, constants)) == text
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


def test_only_the_factors_of_an_adapted_student_change(tmp_path: Path) -> None:
    run = simulate(plan_of(*ADAPT, 'student.adapt.layers=["7"]'), tmp_path / "run")
    start = start_of(run)
    assert start.layout.names == ("7.down.weight", "7.up.weight")
    journal = Journal(run)
    state = journal.latest()
    journal.close()
    assert state is not None and state.average.shape == start.weights.shape
    assert (state.average != start.weights).all()
    begun = merged(start.student)
    inputs = task_of(run.plan()).public().inputs
    assert torch.equal(begun(inputs), start.public_only(inputs))
    start.layout.write(start.student, state.average)
    for (name, a), (_, b) in zip(
        begun.named_parameters(), merged(start.student).named_parameters(), strict=True
    ):
        assert torch.equal(a, b) == (name != "7.weight")


def test_adapters_need_dense_layers_that_are_known_before_training() -> None:
    with pytest.raises(PlanError, match="would fill again what is pruned"):
        plan_of("student.adapt.kind=lora")
    with pytest.raises(PlanError, match="must be known before training"):
        plan_of(*ADAPT, "student.factorize.kind=svd", "student.factorize.rule=energy")


def test_devices_refuse_a_student_that_is_larger_than_the_plans() -> None:
    thin = plan_of(*THIN)
    task = task_of(thin)
    wide = describe(student_model(task, plan_of("student.model=tiny"))).replace("16", "17")
    with pytest.raises(PayloadError, match="at most 15338"):
        LocalTrainer(thin, task, Constants(b"", NO_SOFT, wide))


def test_devices_take_factors_and_held_values_exactly_as_planned() -> None:
    thin, adapt = plan_of(*THIN), plan_of(*ADAPT)
    task = task_of(thin)
    narrow = constants_of(thin, task, sketch(thin, task), b"", NO_SOFT)
    factors = constants_of(adapt, task, sketch(adapt, task), b"", NO_SOFT)
    assert factors.held.size == 15_338 and not narrow.held.size
    back = Constants.decode(factors.encode())
    assert (back.held == factors.held).all()
    LocalTrainer(adapt, task, back)
    for plan, wrong, has in [(thin, factors, "has factors"), (adapt, narrow, "has no factors")]:
        with pytest.raises(PayloadError, match=has):
            LocalTrainer(plan, task, wrong)
    with pytest.raises(PayloadError, match="must be 15338"):
        LocalTrainer(adapt, task, replace(factors, held=factors.held[1:]))
    with pytest.raises(PayloadError, match="must be 0"):
        LocalTrainer(thin, task, replace(narrow, held=factors.held))
    with pytest.raises(PayloadError, match="non-finite"):
        Constants.decode(replace(factors, held=factors.held * np.float32("nan")).encode())
