"""Who teaches whom before the first round: the modes of ``student.distill``, on public data."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from reticent.compression.distill import Ensemble, response_loss
from reticent.core.plan import Distill, Plan
from reticent.core.seeds import derive_key, layers_draw
from reticent.core.tasks import Examples, Task

from .learning import learning
from .means import Means, student_means, teacher_means
from .public_training import batches, logits_of, steps_of, train_public


@dataclass(frozen=True)
class Lesson:
    """What comes of the public data.

    Attributes:
        teacher: Trained, in evaluation mode.
        student: The dense student, trained with the teacher, in evaluation mode.
        examples: The public examples with the labels that the student learns from.
    """

    teacher: nn.Module
    student: nn.Module
    examples: Examples


Teachers = dict[str, nn.Module]
"""Trained teachers, by everything of a plan that decides them: for many plans of one task."""


def lesson(plan: Plan, task: Task, public: Examples, teachers: Teachers | None = None) -> Lesson:
    """Train the teacher and the dense student as the plan's ``student.distill.mode`` says.

    With ``teachers``, a teacher that is in there is not trained again, and a new one is added.
    """
    if plan.student.distill.mode == "online":
        teacher, student = new_teacher(plan, task), new_student(plan, task)
        learn_together(plan, teacher, student, public)
        return Lesson(teacher, student, public)
    labelled = _labelled(plan, public)
    small = _small_teacher(plan, task, labelled)
    members = [
        _known(
            teachers, plan, index, lambda index=index: _teacher(plan, task, labelled, small, index)
        )
        for index in range(plan.teacher.count)
    ]
    teacher = members[0] if len(members) == 1 else Ensemble(members).eval()
    examples = _completed(plan, public, teacher)
    section = plan.student
    student = train_public(
        new_student(plan, task),
        examples,
        section.epochs,
        section.learning_rate,
        plan.seed,
        "student",
        teacher,
        section.distill,
        student_means(plan),
    )
    return Lesson(teacher, student, examples)


def _known(
    teachers: Teachers | None, plan: Plan, index: int, train: Callable[[], nn.Module]
) -> nn.Module:
    student = plan.student.distill.mode in ("self", "reverse")
    decides = {
        "seed": plan.seed,
        "task": plan.task.model_dump(mode="json"),
        "teacher": plan.teacher.model_dump(mode="json", exclude={"count"}),
        "student": plan.student.model_dump(mode="json") if student else None,
        "index": index,
    }
    key = json.dumps(decides, sort_keys=True)
    if teachers is None:
        return train()
    if key not in teachers:
        teachers[key] = train()
    return teachers[key]


def untrained_teacher(plan: Plan, task: Task) -> nn.Module:
    """Return a model of the structure of a lesson's teacher."""
    members = [new_teacher(plan, task, index) for index in range(plan.teacher.count)]
    return members[0] if len(members) == 1 else Ensemble(members)


def new_teacher(plan: Plan, task: Task, index: int = 0) -> nn.Module:
    """Return a new teacher; in mode ``self``, of the student's own architecture."""
    own = plan.student.distill.mode == "self"
    make = (lambda: task.student(plan.student.model)) if own else task.teacher
    return _seeded(plan, _named("teacher", index), make)


def new_student(plan: Plan, task: Task, name: str = "student") -> nn.Module:
    """Return a new student with initial weights that depend on the plan's seed and ``name``."""
    return _seeded(plan, name, lambda: task.student(plan.student.model))


def learn_together(plan: Plan, teacher: nn.Module, student: nn.Module, public: Examples) -> None:
    """Train both in place, each on the labels and on the other's answers of the same step.

    Deep mutual learning (Zhang et al. 2018, section 3) with the plan's temperature and weight. Both
    see the student's batches for the student's epochs, and each keeps its own learning rate.
    """
    steps, device = steps_of(public, plan.student.epochs), plan.teacher.device
    rates = plan.teacher.learning_rate, plan.student.learning_rate
    with (
        layers_draw(derive_key(plan.seed, "public", "pair", "layers"), device),
        learning(teacher, rates[0], steps, teacher_means(plan)) as (large, step_large),
        learning(student, rates[1], steps, Means(device)) as (small, step_small),
    ):
        for batch in batches(public, steps, plan.seed, "student"):
            inputs, labels = (part.to(device) for part in batch)
            first, second = large(inputs), small(inputs)
            step_large(mutual_loss(first, second.detach(), labels, plan.student.distill))
            step_small(mutual_loss(second, first.detach(), labels, plan.student.distill))
    for model in (teacher, student):
        model.zero_grad()


def mutual_loss(
    own: torch.Tensor, other: torch.Tensor, labels: torch.Tensor, distill: Distill
) -> torch.Tensor:
    """Return the loss of one model of a pair, given both models' logits ``(n, classes)``."""
    target = F.softmax(other / distill.temperature, dim=1)
    mimic = response_loss(own, target, distill.temperature)
    return (1 - distill.weight) * F.cross_entropy(own, labels) + distill.weight * mimic


def _small_teacher(plan: Plan, task: Task, labelled: Examples) -> nn.Module | None:
    """Return the trained model that teaches the teacher in mode ``reverse``; None in others."""
    if plan.student.distill.mode != "reverse":
        return None
    small, section = new_student(plan, task, "small teacher"), plan.student
    return train_public(
        small,
        labelled,
        section.epochs,
        section.learning_rate,
        plan.seed,
        "small teacher",
        means=student_means(plan),
    )


def _teacher(
    plan: Plan, task: Task, labelled: Examples, small: nn.Module | None, index: int
) -> nn.Module:
    teacher, section = new_teacher(plan, task, index), plan.teacher
    # A small model's hidden layers are no target for a large one: it gives answers only.
    distill = plan.student.distill.model_copy(update={"kind": "response"}) if small else None
    return train_public(
        teacher,
        labelled,
        section.epochs,
        section.learning_rate,
        plan.seed,
        _named("teacher", index),
        small,
        distill,
        teacher_means(plan),
    )


def _labelled(plan: Plan, public: Examples) -> Examples:
    """Return the public examples that keep their labels: the first ones."""
    count = plan.task.public_labels
    return Examples(public.inputs[:count], public.labels[:count])


def _completed(plan: Plan, public: Examples, teacher: nn.Module) -> Examples:
    """Return all public examples, with the teacher's labels where the others were not kept."""
    count = plan.task.public_labels
    if count is None:
        return public
    guessed = logits_of(teacher, public.inputs[count:]).argmax(dim=1)
    return Examples(public.inputs, torch.cat([public.labels[:count], guessed]))


def _named(name: str, index: int) -> str:
    return name if index == 0 else f"{name} {index + 1}"


def _seeded(plan: Plan, name: str, make: Callable[[], nn.Module]) -> nn.Module:
    """Call ``make`` with torch's global generator seeded, as layer initialisers draw from it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(derive_key(plan.seed, "init", name)[:8], "big") >> 1)
        return make()
