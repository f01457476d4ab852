"""Fake quantization of weights that is safe under DP-SGD (straight-through by weight swap).

Two properties matter under differential privacy:

- The range is max|w| of each output channel, so no weight is ever clipped. The straight-through
  gradient (Bengio et al. 2013) is then the plain gradient at the rounded weights, which stock
  layers, per-example gradient hooks and ghost norms compute exactly: nothing about them has to
  know of quantization.
- There are no observers. An observer is a buffer that remembers the extremes of what passed
  through it, private activations included; it sits in ``state_dict`` beside the noised weights and
  leaves the device with no noise at all. Here the scale is a function of the current weights only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from .adapt import Adapted, Frozen

LEVELS = 127
"""Largest integer magnitude; -128 is not used, so the grid is symmetric."""

_SPARE_BITS = 7
_TINY = 1e-30


def channel_scales(weight: torch.Tensor) -> torch.Tensor:
    """Return the step of each output channel (first dimension): float32, shape ``(out,)``.

    The step is max|w| / 127, rounded *up* to 17 significant bits (a relative change below 2**-16).
    Every integer up to 127 times such a step is exact in float32, which is why quantizing a second
    time changes no bit. A channel of zeros (or below 1e-30, where float32 runs out of bits) gets
    step 1, and all its weights become zero.
    """
    limit = weight.detach().to(torch.float32).flatten(1).abs().amax(dim=1)
    mask = (1 << _SPARE_BITS) - 1
    bits = (limit / LEVELS).view(torch.int32)
    rounded = ((bits + mask) & ~mask).view(torch.float32)
    return torch.where(limit < _TINY, torch.ones_like(rounded), rounded)


def to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``weight`` as int8 of the same shape, and the float32 step of each output channel."""
    scales = channel_scales(weight)
    return _rounded(weight, scales).to(torch.int8), scales


def from_int8(integers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the float32 weights that ``integers`` and ``scales`` stand for (an exact product)."""
    return integers.to(torch.float32) * _per_channel(scales, integers)


def fake_quantize(weight: torch.Tensor) -> torch.Tensor:
    """Return ``weight`` rounded to symmetric int8 with one step per output channel.

    Rounding is to nearest, ties to even. The result is float32, has no gradient history, equals
    ``from_int8(*to_int8(weight))`` and is a fixed point: ``fake_quantize`` of it is the same, bit
    for bit. Values that are not finite stay so.

    Args:
        weight: Weights with the output channel first, at least 2 dimensions.
    """
    scales = channel_scales(weight)
    # Adding zero turns -0.0 into 0.0, as the way through int8 does.
    return _rounded(weight, scales) * _per_channel(scales, weight) + 0.0


@contextmanager
def quantized_weights(model: nn.Module) -> Iterator[None]:
    """Swap the weights of conv and linear layers for fake-quantized ones; restore them after.

    Put it around forward *and* backward, and take the optimizer's step outside: gradients are
    those of the rounded weights, the step moves the float weights (straight-through). What is
    restored is the storage itself, so every bit comes back, also after an exception. Values
    written to these parameters inside the context are lost. Of an adapted layer the merged weight
    is rounded, not its factors.

    >>> layer = nn.Linear(2, 1)
    >>> with quantized_weights(layer):
    ...     layer(torch.ones(1, 2)).sum().backward()
    """
    saved = {id(w): (w, w.data) for w in _weights(model)}
    frozen = [(layer, layer.rounding) for layer in model.modules() if isinstance(layer, Frozen)]
    try:
        for layer, _ in frozen:
            layer.rounding = fake_quantize
        for weight, data in saved.values():
            weight.data = fake_quantize(data)
        yield
    finally:
        for weight, data in saved.values():
            weight.data = data
        for layer, rounding in frozen:
            layer.rounding = rounding


def _weights(model: nn.Module) -> Iterator[nn.Parameter]:
    adapted = [layer for layer in model.modules() if isinstance(layer, Adapted)]
    factors = {id(factor) for layer in adapted for factor in (layer.down, layer.up)}
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and id(module) not in factors:
            yield cast(nn.Parameter, module.weight)


def _rounded(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    values = weight.detach().to(torch.float32) / _per_channel(scales, weight)
    return torch.round(values)


def _per_channel(scales: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return scales.view(-1, *[1] * (weight.dim() - 1))
