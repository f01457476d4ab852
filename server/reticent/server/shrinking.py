"""Making the public student smaller by changing its layers, before any private data are used."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from reticent.compression.adapt import adapted, begin, held_values, ranks_of
from reticent.compression.factorize import factorized
from reticent.compression.fold import folded
from reticent.compression.structure import describe, student_of
from reticent.compression.thin import CRITERIA, thinned
from reticent.core.personal import personal_values
from reticent.core.plan import Plan
from reticent.core.protocol import Constants
from reticent.core.seeds import numpy_generator, torch_generator
from reticent.core.tasks import Examples, Task
from reticent.core.update import Layout

from .pruning import Train, trained_under, tuning

Say = Callable[[str], None]


def reshaped(plan: Plan, dense: nn.Module, public: Examples, train: Train, say: Say) -> nn.Module:
    """Return the student with the layers that the plan asks for, tuned on public data.

    ``dense`` itself is returned when the plan changes no layers, and never changed.

    Raises:
        PlanError: If the student cannot be reshaped like that; the layer is named.
    """
    student = dense
    if plan.student.thin.kind != "none":
        student = _thinned(plan, student, public, say)
        student = trained_under(student, None, train, "thinned", tuning(plan))
    if plan.student.factorize.kind != "none":
        student = _factorized(plan, student, say)
        student = trained_under(student, None, train, "factorized", tuning(plan))
    return student


def sketch(plan: Plan, task: Task) -> nn.Module:
    """Return a student as the plan asks for it to be trained, without training or real data.

    How many filters go follows from the plan alone; which ones does not matter here. Ranks by
    energy are those of random weights, whose singular values are more alike than those of trained
    ones: more parameters, if anything, than the run will have.

    Raises:
        PlanError: As :func:`reshaped`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = folded(task.student(plan.student.model).eval())
    nothing = Examples(torch.zeros(1, *task.input_shape), torch.zeros(1, dtype=torch.int64))
    thin = plan.student.thin
    if thin.kind != "none":
        by_weight = {"thin": thin.model_copy(update={"kind": "l1"})}
        plan = plan.model_copy(update={"student": plan.student.model_copy(update=by_weight)})
    student = reshaped(plan, dense, nothing, lambda *_: None, lambda _: None)
    return with_adapters(plan, student)


def with_adapters(plan: Plan, student: nn.Module) -> nn.Module:
    """Return the student with the factors that the plan asks for, or itself without any.

    Every A is drawn by the plan's seed, every B is zero: the function stays the same.

    Raises:
        PlanError: If there is no such layer, or its factors would not be smaller than itself.
    """
    section = plan.student.adapt
    if section.kind == "none":
        return student
    frozen = adapted(student, ranks_of(student, section.rank, section.layers))
    begin(frozen, torch_generator(plan.seed, "adapt"))
    return frozen


def constants_of(
    plan: Plan, task: Task, student: nn.Module, kept: bytes, soft_labels: NDArray[np.float32]
) -> Constants:
    """Return the run's constants: with the student's layers, where the plan changes them.

    Raises:
        PlanError: If a layer has no description.
        PayloadError: If the devices would refuse the description.
    """
    personal = personal_values(student, plan.federation.local.personal)
    if not plan.student.reshaped:
        return Constants(kept, soft_labels, personal=personal)
    constants = Constants(kept, soft_labels, describe(student), held_values(student), personal)
    student_of(task, plan, constants)
    return constants


def parameters_of(model: nn.Module) -> int:
    """Return how many parameters a model has."""
    return Layout.of(model).total


def _factorized(plan: Plan, student: nn.Module, say: Say) -> nn.Module:
    section = plan.student.factorize
    smaller, splits = factorized(student, section.rule, section.keep)
    before, after = parameters_of(student), parameters_of(smaller)
    done = ", ".join(map(str, splits)) or "no layer would get smaller"
    say(f"student factorized from {before:,} to {after:,} parameters: {done}")
    return smaller


def _thinned(plan: Plan, student: nn.Module, public: Examples, say: Say) -> nn.Module:
    section = plan.student.thin
    generator = numpy_generator(plan.seed, "thin", section.kind)
    score = CRITERIA[section.kind](section.permutations)
    shares = section.shares or section.share
    smaller, cuts = thinned(student, score, shares, public, generator)
    before, after = parameters_of(student), parameters_of(smaller)
    say(f"student thinned from {before:,} to {after:,} parameters: {', '.join(map(str, cuts))}")
    return smaller
