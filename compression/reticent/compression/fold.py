"""Folding of BatchNorm into the convolution before it (Jacob et al. 2018, section 3.2)."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import TypeGuard

import torch
from torch import nn

from reticent.core.errors import PlanError


def is_chain(model: nn.Module) -> TypeGuard[nn.Sequential]:
    """Return whether ``model`` is its layers one after the other, with no ``forward`` of its own.

    Only then do its layers alone say what it computes.
    """
    return isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward


def folded(model: nn.Module) -> nn.Module:
    """Return ``model`` with its batch normalisation folded; itself if it is not a chain."""
    return fold_batchnorm(model) if is_chain(model) else model


def fold_batchnorm(model: nn.Sequential) -> nn.Sequential:
    """Return a deep copy of ``model`` in which every conv + BatchNorm2d pair is one convolution.

    The running (evaluation) statistics are used whatever mode the model is in, so the result equals
    ``model.eval()`` up to float32 rounding. Other layers are copied as they are, and a model
    without BatchNorm2d comes back unchanged. Default names ("0", "1", ...) are numbered anew; names
    that somebody chose stay.

    The statistics must come from public data: they end up in the weights.

    Raises:
        PlanError: If a BatchNorm2d does not follow a Conv2d, does not fit it, or keeps no running
            statistics; the message names the layer.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    last = ""
    for name, layer in model.named_children():
        if not isinstance(layer, nn.BatchNorm2d):
            layers[name] = copy.deepcopy(layer)
            last = name
            continue
        conv = layers.get(last)
        if not isinstance(conv, nn.Conv2d):
            before = type(conv).__name__ if conv is not None else "nothing"
            raise PlanError(
                f"student layer {name} (BatchNorm2d) follows {before}: it can only be folded into "
                "a Conv2d directly before it; reorder the layers or use GroupNorm"
            )
        _check(name, conv, layer)
        layers[last] = _folded(conv, layer)
    default = [str(i) for i in range(len(model))] == [n for n, _ in model.named_children()]
    folded = nn.Sequential(*layers.values()) if default else nn.Sequential(layers)
    return folded.train(model.training)


def _check(name: str, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    if norm.running_mean is None or norm.running_var is None:
        raise PlanError(
            f"student layer {name} (BatchNorm2d) keeps no running statistics: "
            "track_running_stats must be true for it to be folded"
        )
    if norm.num_features != conv.out_channels:
        raise PlanError(
            f"student layer {name} (BatchNorm2d) has {norm.num_features} features: must be the "
            f"{conv.out_channels} channels of the Conv2d before it"
        )


@torch.no_grad()
def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    # In float64, so that the only rounding is the final one to the weights' own type.
    mean, var = _double(norm.running_mean), _double(norm.running_var)
    gamma = torch.ones_like(var) if norm.weight is None else _double(norm.weight)
    beta = torch.zeros_like(mean) if norm.bias is None else _double(norm.bias)
    bias = torch.zeros_like(mean) if conv.bias is None else _double(conv.bias)
    factor = gamma / torch.sqrt(var + norm.eps)
    weight = _double(conv.weight) * factor[:, None, None, None]
    result = copy.deepcopy(conv)
    result.weight = nn.Parameter(weight.to(conv.weight.dtype))
    result.bias = nn.Parameter(((bias - mean) * factor + beta).to(conv.weight.dtype))
    return result


def _double(tensor: torch.Tensor | None) -> torch.Tensor:
    if tensor is None:
        raise PlanError("BatchNorm2d has no running statistics")
    return tensor.detach().to(torch.float64)
