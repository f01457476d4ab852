"""Whether what is clipped and summed is a student's gradient: a trial before anything is charged.

It is not where a parameter is used by something else than a layer, or by none. Privacy does not
depend on this, as only what is clipped is ever used; training does. No data are read.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from reticent.core.errors import DataError, ReticentError
from reticent.core.plan import Plan
from reticent.core.seeds import layers_draw
from reticent.core.tasks import Task
from reticent.core.update import Layout
from reticent.privacy.clipping import ClippedGradients
from reticent.privacy.clipping.bounds import Clipping
from reticent.privacy.clipping.trial import draws, require_finite, twin_of

from .losses import cross_entropy

_NO_BOUND, _ROUNDING = 1e6, 1e-3  # clip, relative difference


def require_whole(model: nn.Module, plan: Plan, task: Task) -> None:
    """Check on a few random examples that what is clipped and summed is the model's gradient.

    Args:
        model: The student of ``plan`` and ``task``, without hooks; it is left as it is.
        plan: The plan; of one that bounds no single gradients nothing is asked.
        task: Its task.

    Raises:
        DataError: If it is not, or cannot be computed of random numbers, nor of codes for tables.
    """
    private = plan.private
    if private is None or private.unit == "client":
        return
    problem: Exception | None = None
    for inputs in draws(task.input_shape):
        try:
            labels = torch.arange(len(inputs)) % task.classes
            with twin_of(model) as twin:
                apart, size = _apart(twin, inputs, labels, private.clipping)
        except ReticentError:
            raise
        except Exception as error:  # a student's own code may raise anything on such inputs
            problem = error
            continue
        if apart <= _ROUNDING * size:
            return
        raise DataError(
            f"the student's per-example gradients do not sum to its gradient (they are {apart:.2g} "
            f"apart on {len(inputs)} random examples): every parameter must be used exactly once, "
            "by a layer that Opacus supports"
        )
    raise DataError(
        f"student {plan.student.model} of task {task.name}: gradients of single examples cannot be "
        f"computed, neither of random numbers nor of codes 0 and 1: {type(problem).__name__}: "
        f"{problem}"
    ) from problem


def _apart(
    model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, clipping: Clipping
) -> tuple[float, float]:
    """Return how far the sum of single gradients is from the plain one, and that one's length."""
    layout, same = Layout.of(model), copy.deepcopy(model).train()
    clipped = ClippedGradients(model, layout, clipping=clipping, shape=tuple(inputs.shape[1:]))
    with layers_draw(bytes(8)):  # dropout draws the same each time
        found = clipped.sum(inputs, labels, cross_entropy, _NO_BOUND)
    with layers_draw(bytes(8)):
        loss = cross_entropy(same(inputs), labels)
        gradients = torch.autograd.grad(loss, list(same.parameters()))
    require_finite(torch.stack([gradient.norm() for gradient in gradients]))
    plain = layout.gather(list(gradients)).astype(np.float64)
    return float(np.linalg.norm(found - plain)), float(np.linalg.norm(plain))
