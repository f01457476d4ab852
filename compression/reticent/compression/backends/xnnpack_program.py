"""An int8 model as an ExecuTorch program for XNNPACK, from a spec's own integers and steps.

No quantizer and no observer of another library runs: the exported module rounds with
``quantized_decomposed`` operators whose steps are the spec's, and XNNPACK's partitioner replaces
them, with the float operators between them, by integer ones. XNNPACK's activations are int8, so
zero points are 128 lower than in the spec, which names the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from executorch.backends.xnnpack.partition import (  # pyright: ignore[reportMissingImports]
    xnnpack_partitioner,
)
from executorch.exir import (  # pyright: ignore[reportMissingImports]
    to_edge_transform_and_lower,
)
from torch import nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401  (registers the operators)
from torch.nn import functional

from reticent.core.errors import ArtifactError

from ..integer import (
    ConvRecord,
    FlattenRecord,
    Grid,
    GroupNormRecord,
    IntegerSpec,
    LinearRecord,
    PoolRecord,
    Record,
    ReluRecord,
)

_OFFSET = 128


def xnnpack_program(spec: IntegerSpec, input_shape: tuple[int, ...]) -> bytes:
    """Return the serialised program: float32 ``(1, *input_shape)`` to float32 ``(1, classes)``.

    Raises:
        ArtifactError: If a layer has no form here (naming it), or ExecuTorch refuses the model.
    """
    layers = [_Round(spec.graph.input)]
    grid = spec.graph.input
    for record in spec.graph.layers:
        grid = getattr(record, "output", grid)
        layers += [_layer(record, spec), _Round(grid)]
    model = nn.Sequential(*layers).eval()
    try:
        exported = torch.export.export(model, (torch.zeros(1, *input_shape),))
        lowered = to_edge_transform_and_lower(
            exported, partitioner=[xnnpack_partitioner.XnnpackPartitioner()]
        )
        return bytes(lowered.to_executorch().buffer)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(f"backend xnnpack: ExecuTorch refuses the model: {reason}") from error


class _Round(nn.Module):
    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.scale, self.zero_point = grid.scale, grid.zero_point - _OFFSET

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ops: Any = torch.ops.quantized_decomposed
        kind = (self.scale, self.zero_point, -128, 127, torch.int8)
        return ops.dequantize_per_tensor(ops.quantize_per_tensor(x, *kind), *kind)


class _Weighted(nn.Module):
    """A conv or linear layer whose int8 weights are dequantized on the way in."""

    def __init__(self, record: ConvRecord | LinearRecord, spec: IntegerSpec) -> None:
        super().__init__()
        self.record, name = record, record.name
        steps = spec.arrays[f"{name}.scale"]
        self.register_buffer("weight", spec.arrays[f"{name}.weight"])
        self.register_buffer("scale", steps)
        self.register_buffer("zero_points", torch.zeros(len(steps), dtype=torch.int64))
        self.bias = nn.Parameter(spec.arrays[f"{name}.bias"], requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ops: Any = torch.ops.quantized_decomposed
        weight = ops.dequantize_per_channel(
            self.weight, self.scale, self.zero_points, 0, -127, 127, torch.int8
        )
        r = self.record
        if isinstance(r, LinearRecord):
            y = functional.linear(x, weight, self.bias)
        else:
            y = functional.conv2d(x, weight, self.bias, r.stride, r.padding, r.dilation, r.groups)
        return torch.relu(y) if r.relu else y


class _GroupNorm(nn.GroupNorm):
    def __init__(self, record: GroupNormRecord, spec: IntegerSpec) -> None:
        weight, bias = (spec.arrays[f"{record.name}.{part}"] for part in ("weight", "bias"))
        super().__init__(record.groups, len(weight), record.eps)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)


def _layer(record: Record, spec: IntegerSpec) -> nn.Module:
    match record:
        case ConvRecord() | LinearRecord():
            return _Weighted(record, spec)
        case GroupNormRecord():
            return _GroupNorm(record, spec)
        case ReluRecord():
            return nn.ReLU()
        case PoolRecord():
            return nn.MaxPool2d(record.kernel, record.stride, record.padding, record.dilation)
        case FlattenRecord():
            return nn.Flatten()
        case _:
            raise ArtifactError(
                f"layer {record.name} ({record.kind}): the backend xnnpack has no form of it; use "
                "--backend qnnpack"
            )
