"""Layers applied one at a time, each with its own backward pass and gradients of single examples.

No graph is kept over the whole model: a layer hands on its output, and a function that turns the
gradient of it into that of its input and into :class:`~.terms.Term` for its parameters. The sum of
an affine layer's term is one matrix product (Bu et al. 2023, "Differentially private optimization
on large model at small cost": no second backward pass).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from .convolutions import (
    KERNEL_ORDER,
    convolution_terms,
    convolved,
    input_gradient,
    rows_of,
)
from .group_norms import normalised
from .positions import Positions
from .recurrent import RECURRENT, Recurrent, unrolled
from .terms import Outer, Rows, Term

Backward = Callable[[torch.Tensor], tuple[torch.Tensor | None, list[Term]]]
"""From the gradient of a layer's output: that of its input, if needed, and its parameters'."""


def orders_of(layer: nn.Module) -> list[tuple[int, ...] | None]:
    """Return, for each parameter of a layer, how its term permutes its dimensions, if it does."""
    first = KERNEL_ORDER if type(layer) is nn.Conv2d else None
    return [None if i else first for i, _ in enumerate(layer.parameters())]


def applied(layer: nn.Module, before: torch.Tensor, needed: bool) -> tuple[torch.Tensor, Backward]:
    """Apply ``layer``; to be called, like what it returns, without gradient mode.

    Args:
        layer: Of a kind that :mod:`.ghost` knows.
        before: Its input ``(n, ...)``.
        needed: Whether the gradient of the input is needed: whether a layer before has parameters.
    """
    if type(layer) is nn.Linear:
        return _linear(layer, before, needed)
    if type(layer) is nn.Conv2d:
        return _convolution(layer, before, needed)
    if type(layer) is nn.GroupNorm:
        return _group_norm(layer, before, needed)
    if isinstance(layer, RECURRENT):
        return _recurrent(layer, before, needed)
    if type(layer) is nn.ReLU:
        return _relu(before)
    if type(layer) is nn.Flatten:
        return _flatten(layer, before)
    return by_autograd(layer, before, needed)


def _linear(layer: nn.Linear, before: torch.Tensor, needed: bool) -> tuple[torch.Tensor, Backward]:
    def backward(back: torch.Tensor) -> tuple[torch.Tensor | None, list[Term]]:
        return back @ layer.weight if needed else None, linear_terms(layer, before, back)

    return F.linear(before, layer.weight, layer.bias), backward


def linear_terms(layer: nn.Linear, before: torch.Tensor, back: torch.Tensor) -> list[Term]:
    """Return the gradients of a linear layer, used at one place of each example or at many."""
    if back.dim() > 2:
        back, before = back.flatten(1, -2), before.flatten(1, -2)
        weight, bias = Positions(back, before), back.sum(dim=1)
    else:
        weight, bias = Outer(back, before), back
    return [weight] if layer.bias is None else [weight, Rows(bias)]


def _relu(before: torch.Tensor) -> tuple[torch.Tensor, Backward]:
    after = before.relu()
    return after, lambda back: (torch.ops.aten.threshold_backward(back, after, 0), [])


def _flatten(layer: nn.Flatten, before: torch.Tensor) -> tuple[torch.Tensor, Backward]:
    # Gradients get the layout of what they are of: products of two layouts are slow.
    return before.flatten(1, layer.end_dim), lambda back: (
        torch.empty_like(before).copy_(back.reshape(before.shape)),
        [],
    )


def _group_norm(
    layer: nn.GroupNorm, before: torch.Tensor, needed: bool
) -> tuple[torch.Tensor, Backward]:
    after, of_output = normalised(layer, before, layer.weight[None], layer.bias[None], needed)

    def backward(back: torch.Tensor) -> tuple[torch.Tensor | None, list[Term]]:
        found = of_output(back)
        return found.before, [Rows(found.scale), Rows(found.shift)]

    return after, backward


def _recurrent(
    layer: Recurrent, before: torch.Tensor, needed: bool
) -> tuple[torch.Tensor, Backward]:
    leaf = before.detach().requires_grad_(needed)
    with torch.enable_grad():
        whole = unrolled(layer, leaf)

    def backward(back: torch.Tensor) -> tuple[torch.Tensor | None, list[Term]]:
        wanted = [*whole.outputs, leaf] if needed else [*whole.outputs]
        found = list(torch.autograd.grad(whole.last, wanted, back))
        count = len(whole.outputs)
        return found[count] if needed else None, list(whole.terms(found[:count]))

    return whole.last.detach(), backward


def by_autograd(
    layer: Callable[[torch.Tensor], torch.Tensor], before: torch.Tensor, needed: bool
) -> tuple[torch.Tensor, Backward]:
    """Apply a layer without parameters."""
    if not needed:
        return layer(before), lambda _: (None, [])
    leaf = before.detach().requires_grad_()
    with torch.enable_grad():
        after = layer(leaf)
    return after.detach(), lambda back: (torch.autograd.grad(after, leaf, back)[0], [])


def _convolution(
    layer: nn.Conv2d, before: torch.Tensor, needed: bool
) -> tuple[torch.Tensor, Backward]:
    def backward(back: torch.Tensor) -> tuple[torch.Tensor | None, list[Term]]:
        of_input = input_gradient(layer, layer.weight, before, back) if needed else None
        return of_input, convolution_terms(layer, before, rows_of(back))

    return convolved(layer, layer.weight, layer.bias, before), backward
