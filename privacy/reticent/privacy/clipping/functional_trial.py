"""Whether :mod:`.functional` is right for a student, tried on random inputs before any data."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from reticent.core.errors import DataError
from reticent.core.update import Layout

from .functional import CPU, FunctionalGradients
from .terms import Owners
from .trial import (
    EXAMPLES,
    ROUNDING,
    SLACK,
    NotFiniteError,
    draws,
    require_finite,
    sum_of_squares,
    twin_of,
)

_LOOSE = 1e12
"""A clip that bounds nothing."""


def unfit(
    model: nn.Module, shape: tuple[int, ...], device: torch.device = CPU, microbatch: int = 64
) -> str | None:
    """Return why :class:`~.functional.FunctionalGradients` cannot be used; None if it can.

    It can if, for owners with weights of their own, it gives on ``device`` what autograd gives on
    the host in plain passes over single examples. No data are read.

    Args:
        model: The student.
        shape: Of one example.
        device: Where it is to be computed.
        microbatch: Most examples in a pass.
    """
    problem = "it takes no random inputs"
    for inputs in draws(shape):
        try:
            with twin_of(model) as twin, warnings.catch_warnings():
                # vmap says so where it goes through sets one by one.
                warnings.filterwarnings("error", "There is a performance drop")
                return _unfit(twin.eval(), inputs[:EXAMPLES], device, microbatch)
        except DataError as error:
            return str(error)
        except NotFiniteError as error:
            problem = str(error)
        except Exception as error:  # a student's own code may raise anything, and so may vmap
            said = str(error).splitlines()
            problem = f"torch.func cannot take it: {said[0] if said else type(error).__name__}"
    return problem


def _unfit(
    model: nn.Module, inputs: torch.Tensor, device: torch.device, microbatch: int
) -> str | None:
    layout = Layout.of(model)
    moves = np.random.default_rng(0).normal(1, 0.1, (EXAMPLES, layout.total))
    weights = (layout.read(model) * moves).astype(np.float32)
    labels = torch.zeros(len(inputs))
    cases: tuple[tuple[float | None, tuple[int, ...]], ...]
    cases = ((_LOOSE, (1,) * EXAMPLES), (None, (EXAMPLES - 1, 0, 1)))
    # First, as what the host refuses may be the end of a graphics processor's whole process.
    right = [_plain(model, layout, weights, inputs, counts) for _, counts in cases]
    gradients = FunctionalGradients(model, layout, microbatch, device=device, training=False)
    for (clip, counts), sums in zip(cases, right, strict=True):
        found = gradients.sums(weights, inputs, labels, counts, sum_of_squares, clip)
        for row, own in zip(found, sums, strict=True):
            if name := _other(layout, torch.from_numpy(row), own):
                return f"the gradient of {name} is not that of plain passes over single examples"
    return None


def _plain(
    model: nn.Module,
    layout: Layout,
    weights: NDArray[np.float32],
    inputs: torch.Tensor,
    counts: tuple[int, ...],
) -> list[torch.Tensor]:
    """Return each owner's gradient sum at its weights, from passes over single examples."""
    totals: list[torch.Tensor] = []
    for own, span in zip(weights, Owners.of(counts).spans, strict=True):
        layout.write(model, own)
        total = torch.zeros(layout.total)
        for one in inputs[span]:
            loss = sum_of_squares(model(one[None]))
            gradients = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
            total += torch.cat([gradient.flatten() for gradient in gradients])
        require_finite(total)
        totals.append(total)
    return totals


def _other(layout: Layout, found: torch.Tensor, total: torch.Tensor) -> str | None:
    """Return the first parameter whose gradient is not what was found."""
    sizes = list(layout.sizes)
    for name, part, right in zip(layout.names, found.split(sizes), total.split(sizes), strict=True):
        if not (part - right).norm() <= ROUNDING * right.norm() + SLACK * total.norm():
            return name
    return None
