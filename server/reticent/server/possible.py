"""What is refused before anything is trained: students and teachers that the plan cannot have."""

from __future__ import annotations

import torch
from torch import nn

from reticent.compression.deployable import require_dynamic_form
from reticent.compression.fold import folded
from reticent.compression.prune import require_weights_left
from reticent.core.errors import DataError
from reticent.core.plan import Plan
from reticent.core.tasks import Task

from .distillation import new_student, new_teacher
from .robust import needs_all, require_room
from .shrinking import sketch


def require_possible(plan: Plan, task: Task) -> None:
    """Check the plan's student and teacher as far as that goes without data and training.

    Raises:
        PlanError: If the student cannot be quantized dynamically as the plan says, a change of its
            layers cannot be made, pruning must empty one of them, or a round's updates do not fit
            into memory where they are needed all at once (all parameters are taken to travel).
        DataError: If a model that the task makes was trained before.
    """
    require_dynamic_form(folded(new_student(plan, task).eval()), plan.student.quantize)
    prune = plan.student.prune
    if prune.kind != "none":
        require_weights_left(sketch(plan, task), prune.sparsity)
    if needs_all(plan.federation.robust):
        require_room(plan.federation, sum(p.numel() for p in sketch(plan, task).parameters()))
    require_new_models(plan, task)


def require_new_models(plan: Plan, task: Task) -> None:
    """Check that teacher and student of ``task`` begin at random weights.

    A model that learned from private data before would be a release without an event in any ledger,
    and where weights of a task's own came from cannot be seen: they are refused unless the task
    has a true attribute ``public_weights``. A random model differs from one time to the next; one
    value throughout a parameter (zeros of a bias, ones of a norm) tells of no data.

    Raises:
        DataError: If they do not; the parameter is named.
    """
    if getattr(task, "public_weights", False):
        return
    pairs = {
        "teacher": (new_teacher(plan, task, 0), new_teacher(plan, task, 1)),
        "student": (new_student(plan, task), new_student(plan, task, "another student")),
    }
    for role, (one, other) in pairs.items():
        known = _made_before(one, other)
        if known is not None:
            raise DataError(
                f"task {task.name}: the {role} is made with the same weights every time "
                f"({known}): must begin at weights drawn by torch's generator, because weights "
                "that learned from private data would need an event of their own in the ledger, "
                "which does not exist; if no private data went into them, give the task the "
                "attribute public_weights = True"
            )


def _made_before(one: nn.Module, other: nn.Module) -> str | None:
    """Return the name of a state that is equal in both and not one value throughout, or None."""
    states = other.state_dict()
    for name, value in one.state_dict().items():
        if value.is_floating_point() and torch.equal(value, states[name]) and _varies(value):
            return name
    return None


def _varies(value: torch.Tensor) -> bool:
    return value.numel() > 1 and not bool((value == value.flatten()[0]).all())
