"""Pruning the public student to its mask: at once, or in steps with training between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from reticent.compression.fold import folded
from reticent.compression.prune import Mask, Scores, lowest_dropped, magnitudes, sparsities, taylor
from reticent.core.plan import Plan
from reticent.core.seeds import numpy_generator
from reticent.core.tasks import Examples
from reticent.core.update import Layout


@dataclass(frozen=True)
class Stretch:
    """A training on public data, or a part of one.

    Attributes:
        epochs: Passes of the whole training.
        learning_rate: Its largest learning rate.
        span: First epoch and the one after the last; None for the whole.
    """

    epochs: int
    learning_rate: float
    span: tuple[int, int] | None = None


Train = Callable[[nn.Module, str, Stretch], object]
"""Trains a student in place on public data, as the plan says; the name decides the batches."""


def tuning(plan: Plan, steps: int = 1) -> Stretch:
    """Return the short training that follows a change, shared by ``steps`` of them."""
    section = plan.student
    return Stretch(max(1, section.epochs // 4 // steps), section.learning_rate / 10)


def trained_under(
    model: nn.Module, mask: Mask | None, train: Train, name: str, stretch: Stretch
) -> nn.Module:
    """Return a copy of ``model``, trained with ``mask`` applied before and held throughout.

    It is in evaluation mode and has no gradients and no hooks.
    """
    student = deepcopy(model)
    layout = Layout.of(student, mask)
    layout.write(student, layout.read(model))
    with _held(student, layout):
        train(student, name, stretch)
    return student.eval()


def pruned(
    plan: Plan, student: nn.Module, raw: Callable[[], nn.Module], public: Examples, train: Train
) -> tuple[nn.Module, Mask | None]:
    """Return the pruned student and what it keeps; ``student`` itself and None without pruning.

    Args:
        plan: The plan.
        student: Trained on public data, folded, perhaps reshaped; not changed.
        raw: Makes the student as it was before training, with its BatchNorm.
        public: Public examples.
        train: Trains on them.

    Raises:
        PlanError: If a layer would lose every weight; it is named.
    """
    prune = plan.student.prune
    if prune.kind == "none" or prune.sparsity == 0:
        return student, None
    score = _scorer(plan, student, public)
    if prune.schedule == "one-shot":
        mask = lowest_dropped(student, score(student), prune.sparsity)
        return trained_under(student, mask, train, "pruned", tuning(plan)), mask
    step = _stepper(plan, raw, train)
    mask = None
    targets = sparsities(prune.sparsity, prune.steps, prune.schedule)
    for number, sparsity in enumerate(targets, 1):
        mask = lowest_dropped(student, score(student), sparsity, mask)
        student = step(student, mask, f"pruned-{number}")
    return student, mask


def _scorer(plan: Plan, student: nn.Module, public: Examples) -> Callable[[nn.Module], Scores]:
    kind = plan.student.prune.kind
    if kind == "taylor":
        return lambda model: taylor(model, public)
    if kind == "magnitude":
        return magnitudes
    fixed = numpy_generator(plan.seed, "prune", "random").random(Layout.of(student).total)
    return lambda _: fixed


def _stepper(
    plan: Plan, raw: Callable[[], nn.Module], train: Train
) -> Callable[[nn.Module, Mask, str], nn.Module]:
    """Return what a step of the schedule does to a student after its mask is known."""
    section, prune = plan.student, plan.student.prune
    if prune.schedule == "gradual":
        short = tuning(plan, prune.steps)
        return lambda student, mask, name: trained_under(student, mask, train, name, short)
    begin = min(section.epochs - 1, round(prune.rewind * section.epochs))
    rest = Stretch(section.epochs, section.learning_rate, (begin, section.epochs))
    if prune.schedule == "rate-rewind":
        return lambda student, mask, name: trained_under(student, mask, train, name, rest)
    early = raw()
    # The beginning of the training that the dense student had, with the same batches.
    train(early, "student", Stretch(section.epochs, section.learning_rate, (0, begin)))

    def rewound(student: nn.Module, mask: Mask, name: str) -> nn.Module:
        return folded(trained_under(early, _unfolded(student, mask, early), train, name, rest))

    return rewound


def _unfolded(student: nn.Module, mask: Mask, raw: nn.Module) -> Mask:
    """Return the mask of a folded student for the student that still has its BatchNorm.

    Folding scales whole output channels, so a weight is zero in both or in neither, and weights of
    two or more dimensions, which alone are pruned, come in the same order in both.
    """
    layout = Layout.of(student)
    parts = np.split(mask, np.cumsum(layout.sizes)[:-1])
    wide = iter([p for p, shape in zip(parts, layout.shapes, strict=True) if len(shape) > 1])
    own = Layout.of(raw)
    return np.concatenate(
        [
            next(wide) if len(shape) > 1 else np.ones(size, dtype=np.bool_)
            for size, shape in zip(own.sizes, own.shapes, strict=True)
        ]
    )


@contextmanager
def _held(model: nn.Module, layout: Layout) -> Iterator[None]:
    """Keep pruned coordinates at zero: their gradients are, and weight decay leaves zero alone."""
    kept = torch.from_numpy(layout.mask).split(list(layout.sizes))
    handles = []
    for parameter, part in zip(model.parameters(), kept, strict=True):
        shaped = part.view_as(parameter).to(torch.float32)
        handles.append(parameter.register_hook(lambda gradient, shaped=shaped: gradient * shaped))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
