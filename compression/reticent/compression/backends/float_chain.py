"""The float model of an int8 one's layers: what a graph describes, with float weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from reticent.core.errors import ArtifactError
from reticent.core.sequences import LastGRU, LastLSTM, OneHot

from ..dynamic import (
    DynamicGraph,
    DynamicLinearRecord,
    DynamicRecord,
    OneHotRecord,
    RecurrentRecord,
)
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


def float_model(graph: Graph | DynamicGraph, weights: Mapping[str, torch.Tensor]) -> nn.Sequential:
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


def _has_relu(record: Record | DynamicRecord) -> bool:
    if isinstance(record, GroupNormRecord):
        # The ReLU after a GroupNorm is the lower end of its grid.
        return record.output.zero_point == 0
    return getattr(record, "relu", False)


def _layer(record: Record | DynamicRecord, weights: Mapping[str, torch.Tensor]) -> nn.Module:
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
        case LinearRecord(name=name) | DynamicLinearRecord(name=name):
            weight = weights[f"{name}.weight"]
            layer = nn.Linear(weight.shape[1], len(weight), device="meta")
        case GroupNormRecord(name=name):
            layer = nn.GroupNorm(
                record.groups, len(weights[f"{name}.weight"]), record.eps, device="meta"
            )
        case RecurrentRecord():
            return _recurrent(record, weights)
        case OneHotRecord(symbols=symbols):
            return OneHot(symbols)
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


def _recurrent(record: RecurrentRecord, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    own = {n.removeprefix(f"{record.name}."): v for n, v in weights.items()}
    hidden, inputs = own["weight_hh_l0"].shape[1], own["weight_ih_l0"].shape[1]
    with torch.device("meta"):
        layer = (LastLSTM if record.kind == "lstm" else LastGRU)(inputs, hidden)
    layer.load_state_dict({n: own[n] for n in layer.state_dict()}, assign=True)
    return layer
