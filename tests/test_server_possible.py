"""What is refused before anything is trained: no data are read, and nothing is charged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from reticent.compression.prune import lowest_dropped, require_weights_left
from reticent.core.errors import DataError, PlanError
from reticent.core.plan import TaskSection, parse_plan
from reticent.core.tasks import ArrayTask, ImageTask, load_task
from reticent.server.possible import require_new_models, require_possible
from reticent.simulations.compress.public_half import PublicHalf
from reticent.simulations.explain import check_plan

DIGITS = ["task.name=digits", "task.clients=10", "federation.clients_per_round=10"]


def linear(_: tuple[int, ...], classes: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, classes))


def before(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Return a model whose weights come from elsewhere, and are the same every time."""
    model = linear(shape, classes)
    values = torch.arange(2.0 * classes).view(classes, 2)
    model.load_state_dict({**model.state_dict(), "1.weight": values})
    return model


def own(**models: Any) -> ArrayTask:
    rng = np.random.default_rng(0)
    return ArrayTask(
        TaskSection(name="own", clients=4, public_examples=12),
        0,
        inputs=rng.normal(size=(60, 2)),
        labels=np.arange(60) % 3,
        test_inputs=rng.normal(size=(9, 2)),
        test_labels=np.arange(9) % 3,
        classes=3,
        **{
            "teacher": linear,
            "student": lambda _, shape, classes: linear(shape, classes),
            **models,
        },
    )


PLAN = parse_plan("", ["task.clients=4", "federation.clients_per_round=4"])


def test_models_that_begin_at_random_are_taken() -> None:
    require_new_models(PLAN, own())
    for kind in ("tiny", "tiny-gn", "wide", "wide-gn"):
        require_possible(*digits(f"student.model={kind}"))
        require_possible(*digits(f"student.model={kind}", "student.quantize.bits=1"))


@pytest.mark.parametrize("model", ["lstm", "gru", "attention"])
def test_sequence_models_that_begin_at_random_are_taken(model: str) -> None:
    plan = parse_plan("", ["task.name=text", f"student.model={model}"])
    require_possible(plan, load_task(plan.task, 0))


def digits(*overrides: str) -> tuple[Any, Any]:
    plan = parse_plan("", [*DIGITS, *overrides])
    return plan, load_task(plan.task, plan.seed)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("attention", r"student \w+: only nn\.Sequential students can be converted to int8"),
        ("gru", r'layer 0 \(OneHot\) has no .* student\.quantize\.kind="dynamic" quantizes this'),
        ("lstm", r'layer 0 \(OneHot\) has no .* student\.quantize\.kind="dynamic" quantizes this'),
    ],
)
@pytest.mark.parametrize("kind", ["qat", "static"])
def test_few_bits_are_refused_for_a_student_without_an_integer_form(
    model: str, reason: str, kind: str
) -> None:
    text = ["task.name=text", "task.clients=4", "federation.clients_per_round=4"]
    given = [*text, f"student.model={model}", f"student.quantize.kind={kind}"]
    for bits in (1, 4):
        plan = parse_plan("", [*given, f"student.quantize.bits={bits}"])
        with pytest.raises(PlanError, match=rf"quantize\.bits={bits}: must be 8 .*{reason}"):
            require_possible(plan, load_task(plan.task, 0))
    plan = parse_plan("", given)
    require_possible(plan, load_task(plan.task, 0))


def test_a_teacher_that_was_trained_before_is_refused_unless_declared_public() -> None:
    with pytest.raises(DataError, match=r"teacher .*\(1\.weight\).*event of their own"):
        require_new_models(PLAN, own(teacher=before))
    require_new_models(PLAN, own(teacher=before, public_weights=True))


def test_a_student_that_was_trained_before_is_refused_in_every_mode() -> None:
    task = own(student=lambda _, shape, classes: before(shape, classes))
    for mode in ("offline", "self"):
        plan = PLAN.model_copy(
            update={
                "student": PLAN.student.model_copy(
                    update={"distill": PLAN.student.distill.model_copy(update={"mode": mode})}
                )
            }
        )
        with pytest.raises(DataError, match=r"\(1\.weight\)"):
            require_new_models(plan, task)


def test_statistics_of_a_norm_count_as_weights() -> None:
    def counted(shape: tuple[int, ...], classes: int) -> nn.Module:
        model = linear(shape, classes)
        model[0].running_mean = torch.tensor([0.3, -1.2])
        return model

    with pytest.raises(DataError, match=r"0\.running_mean"):
        require_new_models(PLAN, own(teacher=counted))


def test_a_search_takes_the_same_tasks_as_a_run() -> None:
    with pytest.raises(DataError, match="teacher"):
        require_new_models(PLAN, PublicHalf(own(teacher=before), 0))
    require_new_models(PLAN, PublicHalf(own(teacher=before, public_weights=True), 0))


def test_a_check_names_what_no_training_can_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("was read")

    for part in ("public", "client", "test"):
        monkeypatch.setattr(ImageTask, part, refuse)
    with pytest.raises(PlanError, match=r"layer 0 \(Conv2d\) has no dynamic form"):
        check_plan(parse_plan("", [*DIGITS, "student.quantize.kind=dynamic"]))
    with pytest.raises(PlanError, match=r"keeps 2 of 15248 weights.*4 layers.*at most 0\.9997"):
        check_plan(parse_plan("", [*DIGITS, "student.prune.sparsity=0.9999"]))
    check_plan(parse_plan("", [*DIGITS, "student.prune.sparsity=0.9997"]))


@pytest.mark.parametrize("privacy", [[], ["privacy=off"], ["privacy.unit=client"]])
def test_a_student_with_a_parameter_that_is_not_trained_is_refused_by_name(
    privacy: list[str],
) -> None:
    with pytest.raises(DataError, match=r"parameter 2\.weight of student .*requires_grad=False"):
        check_plan(parse_plan("", [*DIGITS, "student.model=odd_students:held", *privacy]))


def test_what_is_refused_early_cannot_be_done_and_the_named_limit_can() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    with pytest.raises(PlanError, match=r"at most 0\.9333"):
        require_weights_left(model, 0.96)
    rng = np.random.default_rng(0)
    for _ in range(50):
        with pytest.raises(PlanError, match="every weight"):
            lowest_dropped(model, rng.random(37), 0.96)
    require_weights_left(model, 0.9333)
    scores = np.zeros(37)
    scores[[0, 25]] = 1.0  # one weight of each layer
    assert lowest_dropped(model, scores, 0.9333).sum() == 2 + 7
