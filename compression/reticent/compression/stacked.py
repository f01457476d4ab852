"""Fake quantization of many models' weights at once, for clients that train in common passes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from reticent.core.plan import Quantize

from .quantize import WeightGrid, fake_quantize, layer_grids

_LARGE = 2**17
"""Weights of many models that are better rounded one model after another: large temporary arrays
are given back to the system and taken from it again, page by page, on every step."""

Stack = list[torch.Tensor]
"""Many models' values of each parameter, float32 ``(models, *shape)``, in order."""


def stacked_rounding(model: nn.Module, section: Quantize) -> Callable[[Stack], Stack]:
    """Return what the weights of many models like ``model`` go through while they are trained.

    Bit for bit what :func:`~.quantize.training_swap` puts around each model's passes alone: the
    step of a channel, or of a tensor, is of one model's weights. ``model`` must be of stock layers:
    held and adapted ones have no stack of weights.
    """
    if section.kind != "qat":
        return list
    grids = {f"{name}.weight".lstrip("."): g for name, g in layer_grids(model, section).items()}
    by_parameter = [grids.get(name) for name, _ in model.named_parameters()]

    def rounded(stack: Stack) -> Stack:
        pairs = zip(stack, by_parameter, strict=True)
        return [values if grid is None else _each(values, grid) for values, grid in pairs]

    return rounded


def _each(values: torch.Tensor, grid: WeightGrid) -> torch.Tensor:
    """Return ``(models, outputs, ...)`` with each model's tensor rounded to ``grid``."""
    if grid.granularity == "channel" and values.numel() < _LARGE:
        # The channels of all models are alike.
        return fake_quantize(values.flatten(0, 1), grid).view_as(values)
    rounded = torch.empty(values.shape)
    for one, into in zip(values, rounded, strict=True):
        into.copy_(fake_quantize(one, grid))
    return rounded
