"""What is refused before anything is trained: students and teachers that the plan cannot have."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from reticent.compression.adapt import merged
from reticent.compression.deployable import require_dynamic_form
from reticent.compression.fold import folded
from reticent.compression.forms import require_integer_form
from reticent.compression.prune import require_weights_left
from reticent.core.errors import DataError, PlanError
from reticent.core.plan import Plan
from reticent.core.tasks import Task

from .distillation import new_student, new_teacher
from .learning import in_precision
from .means import require_means, teacher_means
from .robust import needs_all, require_room
from .shrinking import sketch


def require_possible(plan: Plan, task: Task) -> None:
    """Check the plan's student and teacher as far as that goes without data and training.

    Raises:
        PlanError: If the student cannot be quantized dynamically, or to fewer than 8 bits, as the
            plan says, a change of its layers cannot be made, pruning must empty one of them, or a
            round's updates do not fit into memory where they are needed all at once (all parameters
            are taken to travel), it declares other weights than the task's models begin with, or
            its teacher needs a GPU and there is none, or a precision that its layers do not have.
        DependencyError: If its teacher needs DeepSpeed, and that is not installed.
        DataError: If a model that the task makes was trained before and nothing is declared, or the
            student has parameters that are not to be trained.
    """
    require_means(plan)
    _require_trained(plan, task)
    _require_precision(plan, task)
    require_dynamic_form(folded(new_student(plan, task).eval()), plan.student.quantize)
    if plan.student.quantize.bits < 8:
        require_integer_form(merged(sketch(plan, task)), plan.student.quantize)
    prune = plan.student.prune
    if prune.kind != "none":
        require_weights_left(sketch(plan, task), prune.sparsity)
    if needs_all(plan.federation.robust):
        require_room(plan.federation, sum(p.numel() for p in sketch(plan, task).parameters()))
    require_new_models(plan, task)


def _require_precision(plan: Plan, task: Task) -> None:
    """Check that this CPU can train the teacher in the plan's precision, which GPUs can.

    Raises:
        PlanError: If torch has no such computation for one of its layers, such as LSTM in float16.
    """
    means = teacher_means(plan)
    if means.precision == "fp32" or means.device != "cpu":
        return
    runs = in_precision(new_teacher(plan, task).train(), means)
    try:
        runs(torch.zeros(2, *task.input_shape)).sum().backward()
    except RuntimeError as error:
        raise PlanError(
            f'teacher.precision="{means.precision}": must be another on this machine, because '
            f"torch cannot train the teacher of task {task.name} in it on the CPU: {error}"
        ) from error


def _require_trained(plan: Plan, task: Task) -> None:
    """Check that every parameter of the student is one that training moves.

    Raises:
        DataError: If it is not.
    """
    for name, parameter in new_student(plan, task).named_parameters():
        if not parameter.requires_grad:
            raise DataError(
                f"task {task.name}: parameter {name} of student {plan.student.model} has "
                "requires_grad=False: must be True, because all parameters of a student are "
                "trained; use student.adapt to train a few numbers of a model that is held"
            )


def require_new_models(plan: Plan, task: Task) -> None:
    """Check that the models of ``task`` begin at random weights, or that a plan prices the others.

    A model that learned from private data before is a release, and where weights of a task's own
    came from cannot be seen. They are refused unless the task has a true attribute
    ``public_weights`` or the plan declares by ``teacher.trained`` how these very weights were
    trained; the devices' ledgers then charge that. A random model differs from one time to the
    next; one value throughout a parameter (zeros of a bias, ones of a norm) tells of no data.

    Raises:
        DataError: If they bring weights along and nothing is declared; a parameter is named.
        PlanError: If the plan declares other weights, or weights where there are none to declare.
    """
    trained, public = plan.teacher.trained, getattr(task, "public_weights", False)
    if trained is None and public:
        return
    brought = _brought(plan, task)
    if trained is not None:
        _require_declared(trained.weights, brought, task, public)
    elif brought:
        role, known = next(iter(brought)).split(" ")
        raise DataError(
            f"task {task.name}: the {role} is made with the same weights every time "
            f"({known}): must begin at weights drawn by torch's generator, because weights "
            "that learned from private data need an event of their own in the ledger; if no "
            "private data went into them, give the task the attribute public_weights = True, and "
            "if they learned from the clients' data under differential privacy, declare how: "
            f'[teacher.trained] with weights = "{weights_digest(brought.values())}"'
        )


def weights_digest(weights: Iterable[torch.Tensor]) -> str:
    """Return the SHA-256 that stands for a set of tensors, whatever they are called."""
    parts = {
        hashlib.sha256(
            f"{value.dtype} {tuple(value.shape)} ".encode()
            + value.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
        ).digest()
        for value in weights
    }
    return hashlib.sha256(b"".join(sorted(parts))).hexdigest()


def _require_declared(
    weights: str, brought: dict[str, torch.Tensor], task: Task, public: bool
) -> None:
    if public:
        raise PlanError(
            f"teacher.trained: must be absent, because task {task.name} says by public_weights "
            "that no private data went into the weights of its models"
        )
    if not brought:
        raise PlanError(
            f"teacher.trained: must be absent, because the models of task {task.name} begin at "
            "random weights"
        )
    found = weights_digest(brought.values())
    if found != weights:
        raise PlanError(
            f'teacher.trained.weights="{weights}": must be "{found}", which is what the models of '
            f"task {task.name} begin with"
        )


def _brought(plan: Plan, task: Task) -> dict[str, torch.Tensor]:
    """Return the weights that are not drawn anew each time, by role and name."""
    pairs = {
        "teacher": (new_teacher(plan, task, 0), new_teacher(plan, task, 1)),
        "student": (new_student(plan, task), new_student(plan, task, "another student")),
    }
    return {
        f"{role} {name}": value
        for role, (one, other) in pairs.items()
        for name, value in _made_before(one, other)
    }


def _made_before(one: nn.Module, other: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the states that are equal in both and not one value throughout."""
    states = other.state_dict()
    for name, value in one.state_dict().items():
        if value.is_floating_point() and torch.equal(value, states[name]) and _varies(value):
            yield name, value


def _varies(value: torch.Tensor) -> bool:
    return value.numel() > 1 and not bool((value == value.flatten()[0]).all())
