"""From a float student to an int8 one: calibration on public data, conversion, comparison.

Conversion goes layer by layer over an ``nn.Sequential`` (Jacob et al. 2018): weights as in
:mod:`quantize` (symmetric, at 8 bits or fewer), activations on one asymmetric quint8 grid a layer
whose range :mod:`observers` finds, a ReLU merged into the layer before it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from reticent.core.errors import ArtifactError, DataError
from reticent.core.plan import Quantize

from .integer import (
    ConvRecord,
    FlattenRecord,
    Graph,
    Grid,
    GroupNormRecord,
    IntegerSpec,
    LinearRecord,
    PoolRecord,
    Record,
    ReluRecord,
)
from .observers import activation_range
from .quantize import (
    DEFAULTS,
    INT8,
    WeightGrid,
    fake_quantize,
    layer_grids,
    quantized_weights,
    to_int8,
)

_REMEDIES = {
    "BatchNorm2d": "has no integer form; fold it into its convolution with fold_batchnorm",
    "Identity": "would keep a ReLU from being merged; leave it out",
    "Dropout": "does nothing in a deployed model; leave it out",
    "ReLU6": "gives wrong answers on some memory layouts; use ReLU",
    "Hardtanh": "gives wrong answers on some memory layouts; use ReLU",
    "Sequential": "is nested; write its layers in one flat nn.Sequential",
}


@dataclass(frozen=True)
class Ranges:
    """Activation ranges: ``(low, high)`` of the model's input and of each weighted layer's output.

    Attributes:
        input: Range of the inputs.
        outputs: By the layer's name; of a layer followed by a ReLU, the range after the ReLU.
    """

    input: tuple[float, float]
    outputs: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Agreement:
    """How near two models are on some inputs.

    Attributes:
        argmax: Share of the inputs on which both predict the same class.
        max_difference: Largest absolute difference of any logit.
    """

    argmax: float
    max_difference: float


@dataclass(frozen=True)
class _Step:
    name: str
    layer: nn.Module
    relu: bool

    @property
    def weighted(self) -> bool:
        return isinstance(self.layer, nn.Conv2d | nn.Linear | nn.GroupNorm)


def calibrate(
    model: nn.Sequential,
    public_inputs: torch.Tensor,
    section: Quantize = DEFAULTS,
) -> Ranges:
    """Return the activation ranges of ``model`` on public inputs, with rounded weights in place.

    The ranges become part of the deployed model, so ``public_inputs`` must never be private data.

    Args:
        model: A folded student; not changed.
        public_inputs: Float32, shape ``(n, *input_shape)``.
        section: How weights are rounded, and by which observer a range follows from the values;
            what lies beyond the range is clipped when deployed.

    Raises:
        DataError: If the inputs are empty, not float32 or not finite.
        ArtifactError: If a layer has no integer form.
    """
    _check_inputs(public_inputs)
    steps = list(_steps(model))
    outputs: dict[str, tuple[float, float]] = {}
    with torch.no_grad(), quantized_weights(model, section):
        x = public_inputs.contiguous()
        for step in steps:
            x = _run(step, x)
            if step.weighted:
                outputs[step.name] = activation_range(x, section.observer)
    return Ranges(activation_range(public_inputs, section.observer), outputs)


def convert(model: nn.Sequential, ranges: Ranges, section: Quantize = DEFAULTS) -> IntegerSpec:
    """Return the int8 model of a folded float student as plain data.

    Raises:
        ArtifactError: If a layer has no integer form (naming the layer, the reason and what to use
            instead), a weight is not finite, or ``ranges`` belong to another model.
    """
    steps = list(_steps(model))
    _check_ranges(steps, ranges)
    arrays: dict[str, torch.Tensor] = {}
    grids = layer_grids(model, section)
    for step in steps:
        arrays |= _arrays(step, grids.get(step.name, INT8))
    records = tuple(_record(step, ranges) for step in steps)
    return IntegerSpec(Graph(input=_grid(ranges.input), layers=records), arrays)


def fake_quantized_model(
    model: nn.Sequential, ranges: Ranges, section: Quantize = DEFAULTS
) -> nn.Sequential:
    """Return a float model that rounds weights and activations as the int8 model does.

    It runs anywhere and is what the int8 model is checked against. It differs from the int8 model
    only where a value lies almost exactly between two integers. ``model`` is not changed.

    Raises:
        ArtifactError: As :func:`convert`.
    """
    steps = list(_steps(model))
    _check_ranges(steps, ranges)
    grids = layer_grids(model, section)
    layers: list[nn.Module] = [_Round(_grid(ranges.input))]
    for step in steps:
        layer = copy.deepcopy(step.layer)
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data = fake_quantize(layer.weight, grids[step.name])
        layers += [layer, nn.ReLU()] if step.relu else [layer]
        if step.weighted:
            layers.append(_Round(_grid(ranges.outputs[step.name])))
    return nn.Sequential(*layers).eval()


@torch.no_grad()
def compare(first: nn.Module, second: nn.Module, inputs: torch.Tensor) -> Agreement:
    """Return how near the logits of two models are on ``inputs`` (both in their present mode)."""
    _check_inputs(inputs)
    a, b = first(inputs), second(inputs)
    same = (a.argmax(1) == b.argmax(1)).double().mean()
    return Agreement(float(same), float((a - b).abs().max()))


def check_layers(model: nn.Sequential) -> None:
    """Check that every layer of ``model`` has an integer form.

    Raises:
        ArtifactError: Naming the first layer that has none.
    """
    for _ in _steps(model):
        pass


class _Round(nn.Module):
    """Rounds an activation to its quint8 grid."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale, zero = self.grid.scale, self.grid.zero_point
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)


def _steps(model: nn.Sequential) -> Iterator[_Step]:
    layers = list(model.named_children())
    merged = False
    for position, (name, layer) in enumerate(layers):
        if merged:
            merged = False
            continue
        _check_layer(name, layer)
        after = layers[position + 1][1] if position + 1 < len(layers) else None
        weighted = isinstance(layer, nn.Conv2d | nn.Linear | nn.GroupNorm)
        merged = weighted and type(after) is nn.ReLU
        yield _Step(name, layer, merged)


def _check_layer(name: str, layer: nn.Module) -> None:
    kind = type(layer).__name__
    known = (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.ReLU, nn.MaxPool2d, nn.Flatten)
    if type(layer) not in known:
        remedy = _REMEDIES.get(
            kind,
            "has no integer form here; use Conv2d, Linear, GroupNorm, ReLU, MaxPool2d and Flatten",
        )
        raise ArtifactError(f"layer {name} ({kind}) {remedy}")
    reason = _unfit(layer)
    if reason:
        raise ArtifactError(f"layer {name} ({kind}) {reason}")


def _unfit(layer: nn.Module) -> str:
    match layer:
        case nn.Conv2d() if layer.padding_mode != "zeros":
            return f"pads with padding_mode={layer.padding_mode}; use zeros"
        case nn.Conv2d() if isinstance(layer.padding, str):
            return f"has padding={layer.padding!r}; write the number of pixels"
        case nn.MaxPool2d() if layer.ceil_mode or layer.return_indices:
            return "uses ceil_mode or return_indices; leave them off"
        case nn.Flatten() if (layer.start_dim, layer.end_dim) != (1, -1):
            return f"flattens dimensions {layer.start_dim} to {layer.end_dim}; use 1 to -1"
        case _:
            return ""


def _run(step: _Step, x: torch.Tensor) -> torch.Tensor:
    return step.layer(x).relu() if step.relu else step.layer(x)


def _grid(bounds: tuple[float, float]) -> Grid:
    # Zero must be exact: padding and ReLU produce it.
    low, high = min(bounds[0], 0.0), max(bounds[1], 0.0)
    width = high - low
    if width < 1e-12:
        return Grid(scale=1.0, zero_point=0)
    scale = float(np.float32(width / 255))
    return Grid(scale=scale, zero_point=min(255, max(0, round(-low / scale))))


def _arrays(step: _Step, grid: WeightGrid) -> dict[str, torch.Tensor]:
    layer: Any = step.layer
    if not step.weighted:
        return {}
    for part, values in layer.named_parameters():
        if not torch.isfinite(values).all():
            raise ArtifactError(f"layer {step.name}: {part} holds values that are not finite")
    rows = layer.num_channels if isinstance(layer, nn.GroupNorm) else len(layer.weight)
    bias = torch.zeros(rows) if layer.bias is None else layer.bias.detach().clone()
    if isinstance(layer, nn.GroupNorm):
        weight = torch.ones(rows) if layer.weight is None else layer.weight.detach().clone()
        return {f"{step.name}.weight": weight, f"{step.name}.bias": bias}
    integers, scales = to_int8(layer.weight, grid)
    named = {"weight": integers.contiguous(), "scale": scales, "bias": bias}
    return {f"{step.name}.{part}": values for part, values in named.items()}


def _record(step: _Step, ranges: Ranges) -> Record:
    layer: Any = step.layer
    name, relu = step.name, step.relu
    match layer:
        case nn.Conv2d():
            conv: Any = layer  # torch types its pairs as tuples of any length
            return ConvRecord(
                name=name,
                stride=conv.stride,
                padding=conv.padding,
                dilation=conv.dilation,
                groups=conv.groups,
                relu=relu,
                output=_grid(ranges.outputs[name]),
            )
        case nn.Linear():
            return LinearRecord(name=name, relu=relu, output=_grid(ranges.outputs[name]))
        case nn.GroupNorm():
            grid = _grid(ranges.outputs[name])
            return GroupNormRecord(
                name=name, groups=layer.num_groups, eps=float(layer.eps), output=grid
            )
        case nn.MaxPool2d():
            return PoolRecord(
                name=name,
                kernel=_pair(layer.kernel_size),
                stride=_pair(layer.stride),
                padding=_pair(layer.padding),
                dilation=_pair(layer.dilation),
            )
        case nn.ReLU():
            return ReluRecord(name=name)
        case _:
            return FlattenRecord(name=name)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _check_ranges(steps: list[_Step], ranges: Ranges) -> None:
    expected = {step.name for step in steps if step.weighted}
    if expected != ranges.outputs.keys():
        raise ArtifactError(
            f"ranges are of layers {sorted(ranges.outputs)}: must be of {sorted(expected)}; "
            "calibrate the model that is converted"
        )
    bounds = [("input", ranges.input), *ranges.outputs.items()]
    for name, (low, high) in bounds:
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise ArtifactError(f"range of {name} is ({low}, {high}): must be finite and ascending")
    for step in steps:
        if step.relu and ranges.outputs[step.name][0] < 0:
            raise ArtifactError(f"range of {step.name} starts below zero: a ReLU follows it")


def _check_inputs(inputs: torch.Tensor) -> None:
    if inputs.dtype != torch.float32 or inputs.numel() == 0:
        raise DataError(
            f"inputs are {inputs.dtype} of shape {tuple(inputs.shape)}: must be float32 and hold "
            "at least one example"
        )
    if not torch.isfinite(inputs).all():
        raise DataError("inputs hold values that are not finite")
