"""Layers applied one at a time, each with its own backward pass and gradients of single examples.

No graph is kept over the whole model: a layer hands on its output, and a function that turns the
gradient of it into that of its input and into :class:`~.terms.Term` for its parameters. The sum of
an affine layer's term is one matrix product (Bu et al. 2023, "Differentially private optimization
on large model at small cost": no second backward pass).

A convolution is a matrix product of its columns (Chellapilla et al. 2006, "High performance
convolutional neural networks for document processing"), which its gradients need anyway. They are
laid out place by place with the channels innermost, so that they are copied in runs: 4 to 8 times
as fast as :func:`torch.nn.functional.unfold`. Which form is taken depends on shapes alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from .positions import Positions
from .recurrent import RECURRENT, Recurrent, unrolled
from .terms import Outer, Rows, Term

Backward = Callable[[torch.Tensor], tuple[torch.Tensor | None, list[Term]]]
"""From the gradient of a layer's output: that of its input, if needed, and its parameters'."""

Pair = tuple[int, int]

KERNEL_ORDER = (2, 3, 1, 0)
"""A convolution's gradients are kept as (height, width, inputs, outputs)."""

_SHORT = 8
"""Runs of fewer floats than this are not worth having the channels innermost."""


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


def over_places(values: torch.Tensor) -> torch.Tensor:
    """Sum ``(n, channels, *places)`` to ``(n, channels)``; there may be no places."""
    return values.sum(dim=tuple(range(2, values.dim()))) if values.dim() > 2 else values


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
    plain, backward_plain = by_autograd(
        lambda x: F.group_norm(x, layer.num_groups, eps=layer.eps), before, needed
    )
    channels = (-1, *[1] * (before.dim() - 2))
    scale, shift = layer.weight.view(channels), layer.bias.view(channels)

    def backward(back: torch.Tensor) -> tuple[torch.Tensor | None, list[Term]]:
        terms: list[Term] = [Rows(over_places(plain * back)), Rows(over_places(back))]
        return backward_plain(back * scale)[0], terms

    return torch.addcmul(shift, plain, scale), backward


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
    columns, places = columns_of(layer, before)
    n, out = len(before), layer.out_channels
    kernel = layer.weight.permute(KERNEL_ORDER).reshape(-1, out)
    after = _product(columns, kernel, layer.bias)

    def backward(back: torch.Tensor) -> tuple[torch.Tensor | None, list[Term]]:
        rows = back.permute(0, 2, 3, 1).reshape(n, -1, out)
        whole = rows.view(n, *places, out).permute(0, 3, 1, 2)
        return (
            _input_gradient(layer, before, whole) if needed else None,
            convolution_terms(layer, columns, rows),
        )

    return after.view(n, *places, out).permute(0, 3, 1, 2), backward


def convolution_terms(layer: nn.Conv2d, columns: torch.Tensor, rows: torch.Tensor) -> list[Term]:
    """Return the gradients of a convolution.

    Args:
        layer: The convolution.
        columns: Of its input, as :func:`columns_of` gives them.
        rows: Gradient of its output, ``(n, places, outputs)``.
    """
    out, inputs, *size = layer.weight.shape
    values = torch.bmm(columns.transpose(1, 2), rows).flatten(1)
    weight = Rows(values, (*size, inputs, out))
    return [weight] if layer.bias is None else [weight, Rows(rows.sum(dim=1))]


def _product(
    columns: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    if columns.is_contiguous():
        flat = columns.view(-1, columns.shape[2])
        return flat @ kernel if bias is None else torch.addmm(bias, flat, kernel)
    after = torch.bmm(columns, kernel.expand(len(columns), -1, -1))
    return after if bias is None else after + bias


def _input_gradient(layer: nn.Conv2d, before: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    weight = layer.weight.contiguous(memory_format=torch.channels_last)
    stride, dilation = list(layer.stride), list(layer.dilation)
    given = (back, before, weight, None, stride, list(padding_of(layer)), dilation)
    return torch.ops.aten.convolution_backward(*given, False, [0, 0], 1, [True, False, False])[0]


def columns_of(layer: nn.Conv2d, inputs: torch.Tensor) -> tuple[torch.Tensor, Pair]:
    """Return what every place of the output sees, and the number of places down and across.

    Returns:
        ``(n, places, height * width * inputs)``, in the order of :data:`KERNEL_ORDER`.
    """
    n, channels, height, width = inputs.shape
    (kh, kw), (sh, sw) = cast(Pair, layer.kernel_size), cast(Pair, layer.stride)
    (ph, pw), (dh, dw) = padding_of(layer), cast(Pair, layer.dilation)
    high, wide = height + 2 * ph, width + 2 * pw
    places = (high - dh * (kh - 1) - 1) // sh + 1, (wide - dw * (kw - 1) - 1) // sw + 1
    inside = (slice(None), slice(ph, ph + height), slice(pw, pw + width))
    if channels * kw < _SHORT:
        padded = inputs.new_zeros(n, channels, high, wide)
        padded[:, :, inside[1], inside[2]] = inputs
        a, c, y, x = padded.stride()
        view = padded.as_strided(
            (n, kh, kw, channels, *places), (a, dh * y, dw * x, c, sh * y, sw * x)
        )
        return view.reshape(n, kh * kw * channels, -1).transpose(1, 2), places
    padded = inputs.new_zeros(n, high, wide, channels)
    padded[inside] = inputs.permute(0, 2, 3, 1)
    a, y, x, c = padded.stride()
    view = padded.as_strided((n, *places, kh, kw, channels), (a, sh * y, sw * x, dh * y, dw * x, c))
    return view.reshape(n, places[0] * places[1], -1), places


def padding_of(layer: nn.Conv2d) -> Pair:
    """Return how many zeros a convolution adds above and below, and left and right."""
    return (0, 0) if layer.padding == "valid" else cast(Pair, layer.padding)
