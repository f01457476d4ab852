"""Convolutions, and their gradients of single examples.

Such a gradient is a matrix product with the columns of the input (Chellapilla et al. 2006, "High
performance convolutional neural networks for document processing"). They are laid out place by
place with the channels innermost, so that they are copied in runs: 4 to 8 times as fast as
:func:`torch.nn.functional.unfold`; and made a few examples at a time, while they are in the cache.
Where there are few places for the size of the weight, norms come from Gram matrices of the columns
instead, and no gradient is written out (:mod:`.positions`). Shapes alone decide the form.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from .positions import Positions, shorter
from .terms import Rows, Term

_Pair = tuple[int, int]

KERNEL_ORDER = (2, 3, 1, 0)
"""A convolution's gradients are kept as (height, width, inputs, outputs)."""

_SHORT = 8
"""Runs of fewer floats than this are not worth having the channels innermost."""

_AT_ONCE = 2**18
"""Numbers in the columns that are made at once: 1 MB."""


def convolved(
    layer: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor | None, before: torch.Tensor
) -> torch.Tensor:
    """Return the output of ``layer`` with another weight and bias, channels innermost.

    Args:
        layer: Gives the strides, the padding and the dilation.
        weight: ``(outputs, inputs, height, width)``.
        bias: ``(outputs,)``, or None.
        before: Its input ``(n, inputs, height, width)``.
    """
    if not _short(layer):
        return F.conv2d(before, _inner(weight), bias, *_geometry(layer))
    columns, places = columns_of(layer, before)
    n, out = len(before), layer.out_channels
    kernel = weight.permute(KERNEL_ORDER).reshape(-1, out)
    after = torch.bmm(columns, kernel.expand(n, -1, -1))
    after = after if bias is None else after.add_(bias)
    return after.view(n, *places, out).permute(0, 3, 1, 2)


def input_gradient(
    layer: nn.Conv2d, weight: torch.Tensor, before: torch.Tensor, back: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of a convolution's input from that of its output.

    Args:
        layer: As :func:`convolved` has it, like ``weight`` and ``before``.
        weight: See there.
        before: See there.
        back: Gradient of the output, ``(n, outputs, height, width)``, best channels innermost.
    """
    stride, padding, dilation = map(list, _geometry(layer))
    given = (back, before, _inner(weight), None, stride, padding, dilation)
    return torch.ops.aten.convolution_backward(*given, False, [0, 0], 1, [True, False, False])[0]


def convolution_terms(layer: nn.Conv2d, before: torch.Tensor, rows: torch.Tensor) -> list[Term]:
    """Return the gradients of a convolution.

    Args:
        layer: The convolution.
        before: Its input ``(n, inputs, height, width)``.
        rows: Gradient of its output, ``(n, places, outputs)``.
    """
    weight = _weight_term(layer, before, rows)
    return [weight] if layer.bias is None else [weight, Rows(rows.sum(dim=1))]


def _weight_term(layer: nn.Conv2d, before: torch.Tensor, rows: torch.Tensor) -> Term:
    out, inputs, *size = layer.weight.shape
    seen = layer.weight[0].numel()
    if shorter(rows.shape[1], seen, out):
        columns, _ = columns_of(layer, before)
        return Positions(columns, rows, (*size, inputs, out))
    values = rows.new_empty(len(rows), seen, out)
    step = max(1, _AT_ONCE // (rows.shape[1] * values.shape[1]))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        columns, _ = columns_of(layer, before[part])
        torch.bmm(columns.transpose(1, 2), rows[part], out=values[part])
    return Rows(values.flatten(1), (*size, inputs, out))


def rows_of(back: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a convolution's output, ``(n, outputs, ...)``, place by place."""
    return back.permute(0, 2, 3, 1).reshape(len(back), -1, back.shape[1])


def columns_of(layer: nn.Conv2d, inputs: torch.Tensor) -> tuple[torch.Tensor, _Pair]:
    """Return what every place of the output sees, and the number of places down and across.

    Returns:
        ``(n, places, height * width * inputs)``, in the order of :data:`KERNEL_ORDER`.
    """
    n, channels, height, width = inputs.shape
    (kh, kw), (sh, sw) = cast(_Pair, layer.kernel_size), cast(_Pair, layer.stride)
    (ph, pw), (dh, dw) = _padding_of(layer), cast(_Pair, layer.dilation)
    high, wide = height + 2 * ph, width + 2 * pw
    places = (high - dh * (kh - 1) - 1) // sh + 1, (wide - dw * (kw - 1) - 1) // sw + 1
    inside = (slice(None), slice(ph, ph + height), slice(pw, pw + width))
    if _short(layer):
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


def _short(layer: nn.Conv2d) -> bool:
    return layer.in_channels * cast(_Pair, layer.kernel_size)[1] < _SHORT


def _inner(weight: torch.Tensor) -> torch.Tensor:
    return weight.contiguous(memory_format=torch.channels_last)


def _geometry(layer: nn.Conv2d) -> tuple[_Pair, _Pair, _Pair]:
    return cast(_Pair, layer.stride), _padding_of(layer), cast(_Pair, layer.dilation)


def _padding_of(layer: nn.Conv2d) -> _Pair:
    """Return how many zeros a convolution adds above and below, and left and right."""
    return (0, 0) if layer.padding == "valid" else cast(_Pair, layer.padding)
