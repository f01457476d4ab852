"""The float model of an int8 one's layers: what a graph describes, with float weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from reticent.core.errors import ArtifactError

from ..integer import (
    ConvRecord,
    FlattenRecord,
    Graph,
    GroupNormRecord,
    LinearRecord,
    PoolRecord,
    Record,
    ReluRecord,
)


def float_model(graph: Graph, weights: Mapping[str, torch.Tensor]) -> nn.Sequential:
    """Return the float32 student that ``graph`` was converted from; its grids are not used.

    Args:
        graph: Layers.
        weights: The student's ``state_dict``.

    Raises:
        ArtifactError: If a layer has no float form here.
    """
    layers: list[nn.Module] = []
    for record in graph.layers:
        layers.append(_layer(record, weights))
        if _has_relu(record):
            layers.append(nn.ReLU())
    return nn.Sequential(*layers).eval()


def _has_relu(record: Record) -> bool:
    if isinstance(record, GroupNormRecord):
        # The ReLU after a GroupNorm is the lower end of its grid.
        return record.output.zero_point == 0
    return getattr(record, "relu", False)


def _layer(record: Record, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    match record:
        case ConvRecord(name=name):
            weight = weights[f"{name}.weight"]
            layer = nn.Conv2d(
                weight.shape[1] * record.groups,
                len(weight),
                (weight.shape[2], weight.shape[3]),
                record.stride,
                record.padding,
                record.dilation,
                record.groups,
                device="meta",  # no memory, as the weights are those given
            )
        case LinearRecord(name=name):
            weight = weights[f"{name}.weight"]
            layer = nn.Linear(weight.shape[1], len(weight), device="meta")
        case GroupNormRecord(name=name):
            layer = nn.GroupNorm(
                record.groups, len(weights[f"{name}.weight"]), record.eps, device="meta"
            )
        case ReluRecord():
            return nn.ReLU()
        case PoolRecord():
            return nn.MaxPool2d(record.kernel, record.stride, record.padding, record.dilation)
        case FlattenRecord():
            return nn.Flatten()
        case _:
            raise ArtifactError(f"layer {record.name} ({record.kind}): has no float form here")
    layer.weight = nn.Parameter(weights[f"{record.name}.weight"])
    bias = weights.get(f"{record.name}.bias")
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    return layer
