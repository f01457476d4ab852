"""Who teaches whom: each mode against plain loops, and what it must not look at."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reticent.compression.distill import Ensemble
from reticent.core.errors import DataError
from reticent.core.models import student as student_of
from reticent.core.plan import Plan, parse_plan
from reticent.core.tasks import Examples, Task, load_task
from reticent.server import learning
from reticent.server.distillation import lesson, new_student, new_teacher, untrained_teacher
from reticent.server.learning import in_precision
from reticent.server.means import Means
from reticent.server.preparation import prepare
from reticent.server.public_training import (
    accuracy,
    batches,
    soft_labels,
    steps_of,
    train_public,
)

SMALL = [
    "task.name=digits",
    "task.clients=6",
    "task.public_examples=30",
    "teacher.epochs=2",
    "student.epochs=4",
    "federation.clients_per_round=6",
]


def plan_of(*overrides: str) -> Plan:
    return parse_plan("", [*SMALL, *overrides])


PLAN = plan_of()
TASK = load_task(PLAN.task, PLAN.seed)


class Drawer:
    """Stands for the journal."""

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, np.ndarray]] = {}

    def store(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        self.kept[name] = arrays

    def restore(self, name: str) -> dict[str, np.ndarray] | None:
        return self.kept.get(name)


def assert_equal(first: nn.Module, second: nn.Module) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def adamw(model: nn.Module, rate: float, steps: int) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-3)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)


def test_the_default_is_hinton_s_loop() -> None:
    taught = lesson(PLAN, TASK, TASK.public())
    teacher, student = new_teacher(PLAN, TASK), new_student(PLAN, TASK)
    for model, name, epochs in ((teacher, "teacher", 2), (student, "student", 4)):
        optimizer, schedule = adamw(model.train(), 0.01, epochs)
        for inputs, labels in batches(TASK.public(), steps_of(TASK.public(), epochs), 0, name):
            logits = model(inputs)
            loss = F.cross_entropy(logits, labels)
            if name == "student":
                target = F.softmax(teacher(inputs).detach() / 2.0, dim=1)
                log = F.log_softmax(logits / 2.0, dim=1)
                loss = 0.5 * loss + 0.5 * 2.0**2 * F.kl_div(log, target, reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
    assert_equal(taught.teacher, teacher)
    assert_equal(taught.student, student)


def test_online_both_learn_from_each_other() -> None:
    plan = plan_of("student.distill.mode=online", "teacher.learning_rate=0.003")
    taught = lesson(plan, TASK, TASK.public())
    first, second = new_teacher(plan, TASK).train(), new_student(plan, TASK).train()
    tools = [adamw(first, 0.003, 4), adamw(second, 0.01, 4)]
    for inputs, labels in batches(TASK.public(), steps_of(TASK.public(), 4), 0, "student"):
        z, y = first(inputs), second(inputs)
        log, target = F.log_softmax(z / 2, dim=1), F.softmax(y.detach() / 2, dim=1)
        one = 0.5 * F.cross_entropy(z, labels)
        one += 0.5 * 4 * (target * (target.log() - log)).sum(dim=1).mean()
        log, target = F.log_softmax(y / 2, dim=1), F.softmax(z.detach() / 2, dim=1)
        two = 0.5 * F.cross_entropy(y, labels)
        two += 0.5 * 4 * (target * (target.log() - log)).sum(dim=1).mean()
        for (optimizer, schedule), loss in zip(tools, (one, two), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    inputs = TASK.test().inputs[:50]
    # Formulas that differ in rounding, so logits are compared, and not bits.
    for ours, plain in ((taught.teacher, first), (taught.student, second)):
        torch.testing.assert_close(ours(inputs), plain.eval()(inputs), atol=1e-3, rtol=1e-3)


def test_self_the_teacher_is_of_the_student_s_architecture() -> None:
    taught = lesson(plan_of("student.distill.mode=self"), TASK, TASK.public())
    alone = lesson(plan_of("student.distill.kind=none"), TASK, TASK.public())
    assert [p.shape for p in taught.teacher.parameters()] == [
        p.shape for p in taught.student.parameters()
    ]
    assert not same(taught.student, alone.student) and not same(taught.student, taught.teacher)


def test_reverse_the_teacher_is_taught_and_with_weight_zero_it_is_not() -> None:
    plain = lesson(PLAN, TASK, TASK.public())
    taught = lesson(plan_of("student.distill.mode=reverse"), TASK, TASK.public())
    weightless = plan_of("student.distill.mode=reverse", "student.distill.weight=0")
    assert not same(taught.teacher, plain.teacher)
    assert same(lesson(weightless, TASK, TASK.public()).teacher, plain.teacher)


def test_several_teachers_are_different_and_the_first_is_the_only_one_of_before() -> None:
    taught = lesson(plan_of("teacher.count=2"), TASK, TASK.public())
    plain = lesson(PLAN, TASK, TASK.public())
    assert isinstance(taught.teacher, Ensemble) and not taught.teacher.training
    first, second = taught.teacher.members
    assert_equal(first, plain.teacher)
    assert not same(first, second) and not same(taught.student, plain.student)


def test_labels_that_are_not_kept_are_never_read() -> None:
    plan, public = plan_of("task.public_labels=12"), TASK.public()
    taught = lesson(plan, TASK, public)
    spoiled = public.labels.clone()
    spoiled[12:] = (spoiled[12:] + 1) % 10
    again = lesson(plan, TASK, Examples(public.inputs, spoiled))
    assert_equal(taught.teacher, again.teacher)
    assert_equal(taught.student, again.student)
    assert torch.equal(taught.examples.labels, again.examples.labels)


def test_the_teacher_labels_what_has_no_label() -> None:
    plan, public = plan_of("task.public_labels=12"), TASK.public()
    taught = lesson(plan, TASK, public)
    alone = Examples(public.inputs[:12], public.labels[:12])
    teacher = train_public(new_teacher(plan, TASK), alone, 2, 0.01, 0, "teacher")
    assert_equal(taught.teacher, teacher)
    with torch.no_grad():
        guessed = teacher(public.inputs[12:]).argmax(dim=1)
    assert torch.equal(taught.examples.labels, torch.cat([public.labels[:12], guessed]))


def test_keeping_every_label_is_the_default() -> None:
    whole = lesson(plan_of("task.public_labels=30"), TASK, TASK.public())
    plain = lesson(PLAN, TASK, TASK.public())
    assert_equal(whole.teacher, plain.teacher)
    assert_equal(whole.student, plain.student)


@pytest.mark.parametrize(
    "overrides",
    [
        ["teacher.count=2"],
        ["student.distill.mode=self", "task.public_labels=20"],
        ["student.distill.mode=online"],
        ["student.distill.kind=response+relation", "student.distill.local_weight=0.3"],
        ["student.distill.kind=feature", "student.model=tiny-gn"],
    ],
)
def test_a_start_is_read_back_from_the_journal(overrides: list[str]) -> None:
    plan, drawer = plan_of(*overrides), Drawer()
    made = prepare(plan, TASK, drawer, lambda _: None)  # pyright: ignore[reportArgumentType]
    read = prepare(plan, TASK, drawer, lambda _: None)  # pyright: ignore[reportArgumentType]
    for ours, theirs in ((made.teacher, read.teacher), (made.student, read.student)):
        assert_equal(ours, theirs)
    assert made.constants == read.constants and not read.teacher.training
    assert accuracy(made.teacher, TASK.test()) == accuracy(read.teacher, TASK.test())
    assert_equal_structure(plan, TASK, made.teacher)


@pytest.mark.parametrize("part", ["public", "test"])
def test_a_task_without_public_or_test_examples_is_refused(
    monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Accuracy on no examples is no number."""
    task, public = load_task(PLAN.task, PLAN.seed), TASK.public()
    monkeypatch.setattr(task, part, lambda: Examples(public.inputs[:0], public.labels[:0]))
    with pytest.raises(DataError, match=rf"task digits: {part}\(\) has no examples"):
        prepare(PLAN, task, Drawer(), lambda _: None)  # pyright: ignore[reportArgumentType]


def assert_equal_structure(plan: Plan, task: Task, teacher: nn.Module) -> None:
    fresh = untrained_teacher(plan, task).state_dict()
    assert {k: v.shape for k, v in fresh.items()} == {
        k: v.shape for k, v in teacher.state_dict().items()
    }


def test_a_table_of_soft_labels_holds_an_ensemble_s_mean() -> None:
    public = TASK.public()
    members: list[nn.Module] = [student_of("tiny-gn", (1, 8, 8), 10).eval() for _ in range(2)]
    table = soft_labels(Ensemble(members).eval(), public, 10, 3.0)
    rows = public.inputs[public.labels == 4]
    with torch.no_grad():
        mean = sum(F.softmax(m(rows) / 3.0, dim=1) for m in members) / 2
    torch.testing.assert_close(table[4], mean.mean(dim=0))  # pyright: ignore[reportAttributeAccessIssue]


def test_a_hint_reaches_the_student_and_its_projection_does_not() -> None:
    teacher = train_public(new_teacher(PLAN, TASK), TASK.public(), 2, 0.01, 0, "teacher")
    hinted = plan_of("student.distill.kind=feature").student.distill
    models = [
        train_public(new_student(PLAN, TASK), TASK.public(), 2, 0.01, 0, "x", teacher, distill)
        for distill in (hinted, hinted.tuning, None)
    ]
    assert not same(models[0], models[2])
    assert_equal(models[1], models[2])


def test_bf16_computes_in_bfloat16_and_learns_in_float32() -> None:
    model = new_teacher(PLAN, TASK).train()
    seen: list[torch.dtype] = []
    model.register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    inputs, labels = TASK.public()
    gradients = []
    for precision in ("fp32", "bf16"):
        logits = in_precision(model, Means(precision=precision))(inputs)
        found = torch.autograd.grad(F.cross_entropy(logits, labels), list(model.parameters()))
        gradients.append(torch.cat([g.flatten() for g in found]))
        assert logits.dtype == torch.float32
        assert all(g.dtype == torch.float32 for g in found)
    assert seen == [torch.float32, torch.bfloat16]
    apart = float((gradients[0] - gradients[1]).norm() / gradients[0].norm())
    assert 1e-4 < apart < 0.2  # bfloat16 keeps 8 bits; equality would mean that nothing was cast


def test_only_the_teacher_is_trained_in_bf16() -> None:
    plain = lesson(plan_of("student.distill.kind=none"), TASK, TASK.public())
    mixed_plan = plan_of("student.distill.kind=none", "teacher.precision=bf16")
    mixed = lesson(mixed_plan, TASK, TASK.public())
    assert not same(mixed.teacher, plain.teacher)
    assert all(p.dtype == torch.float32 for p in mixed.teacher.parameters())
    assert_equal(mixed.student, plain.student)


@pytest.mark.parametrize("mode", ["offline", "online", "reverse"])
def test_only_the_teacher_is_trained_from_disk_and_it_is_the_same(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []

    def to_disk(optimizer: torch.optim.AdamW, parameters: list[nn.Parameter]) -> None:
        moved.append(sum(p.numel() for p in parameters))
        real(optimizer, parameters)

    real = learning.to_disk
    monkeypatch.setattr(learning, "to_disk", to_disk)
    memory = lesson(plan_of(f"student.distill.mode={mode}"), TASK, TASK.public())
    assert not moved
    plan = plan_of(f"student.distill.mode={mode}", "teacher.offload=disk")
    disk = lesson(plan, TASK, TASK.public())
    assert moved == [sum(p.numel() for p in disk.teacher.parameters())]
    assert_equal(disk.teacher, memory.teacher)
    assert_equal(disk.student, memory.student)


def test_online_the_teacher_may_be_trained_in_bf16() -> None:
    plain = lesson(plan_of("student.distill.mode=online"), TASK, TASK.public())
    plan = plan_of("student.distill.mode=online", "teacher.precision=bf16")
    assert not same(lesson(plan, TASK, TASK.public()).teacher, plain.teacher)


def test_a_teacher_that_is_known_is_not_trained_again_and_changes_nothing() -> None:
    teachers: dict[str, nn.Module] = {}
    first = lesson(PLAN, TASK, TASK.public(), teachers)
    again = lesson(PLAN, TASK, TASK.public(), teachers)
    alone = lesson(PLAN, TASK, TASK.public())
    assert again.teacher is first.teacher and len(teachers) == 1
    assert same(again.student, alone.student) and same(again.teacher, alone.teacher)
    other = lesson(plan_of("teacher.epochs=3"), TASK, TASK.public(), teachers)
    assert len(teachers) == 2 and not same(other.teacher, first.teacher)
