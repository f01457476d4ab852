"""Dynamic quantization: int8 weights, and activations that are quantized as they come.

For layers whose weights are many and whose activations have no range worth fixing: Linear, and the
LSTM or GRU of a sequence. It computes as ``torch.ao.quantization.quantize_dynamic`` does, but is
assembled from plain arrays, as :mod:`integer` is, without pickle. The input of each product is
rounded to one asymmetric grid between its own extremes (255 steps on qnnpack; 127 on x86, where
sums then cannot saturate), the product is one of integers, and what comes out is float.

The range is of one example at a time, so that an answer does not depend on what else is in a batch
(torch's own is of the whole batch). Nothing needs calibration, so no data are read.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.nn import functional

from reticent.core.errors import ArtifactError, DataError
from reticent.core.plan import Quantize
from reticent.core.sequences import OneHot

from .integer import FlattenRecord, LayerRecord, ReluRecord, check_inputs, quantized_engine
from .quantize import WeightGrid, fake_quantize, from_int8, to_int8


class DynamicLinearRecord(LayerRecord):
    """Fully connected layer of the last dimension."""

    kind: Literal["linear"] = "linear"


class RecurrentRecord(LayerRecord):
    """One layer of LSTM or GRU over ``(n, length, inputs)``; it returns the last hidden state."""

    kind: Literal["lstm", "gru"]


class OneHotRecord(LayerRecord):
    """Codes, cut off to integers of the range, as vectors of zeros and a one."""

    kind: Literal["one_hot"] = "one_hot"
    symbols: Annotated[int, Field(ge=1, le=2**16)]


DynamicRecord = Annotated[
    DynamicLinearRecord | RecurrentRecord | OneHotRecord | ReluRecord | FlattenRecord,
    Field(discriminator="kind"),
]


class DynamicGraph(BaseModel):
    """The layers in order: what ``model.json`` holds."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    activations: Literal["dynamic"] = "dynamic"
    layers: tuple[DynamicRecord, ...]


@dataclass(frozen=True)
class DynamicSpec:
    """A dynamically quantized model as data.

    Attributes:
        graph: The layers.
        arrays: For each matrix ``M.weight`` (int8), ``M.scale`` and ``M.bias`` (float32, one value
            a row). ``M`` is the name of a Linear; an LSTM or GRU has two, ``NAME.input`` and
            ``NAME.hidden``.
    """

    graph: DynamicGraph
    arrays: Mapping[str, torch.Tensor]


def dynamic_spec(model: nn.Module, section: Quantize) -> DynamicSpec:
    """Return a float chain of layers as a dynamically quantized model.

    Raises:
        ArtifactError: If a layer has no dynamic form (naming it, the reason and what to use
            instead), or a weight is not finite.
    """
    records: list[Any] = []
    arrays: dict[str, torch.Tensor] = {}
    for name, layer in model.named_children():
        records.append(_record(name, layer))
        for matrix, (weight, bias) in _matrices(name, layer).items():
            if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
                raise ArtifactError(f"layer {matrix} holds values that are not finite")
            integers, steps = to_int8(weight, WeightGrid(8, section.granularity))
            named = {"weight": integers.contiguous(), "scale": steps, "bias": bias.clone()}
            arrays |= {f"{matrix}.{part}": values for part, values in named.items()}
    return DynamicSpec(DynamicGraph(layers=tuple(records)), arrays)


def rounded_copy(model: nn.Module, section: Quantize) -> nn.Module:
    """Return a float copy of ``model`` with the weights of its dynamic form."""
    result = copy.deepcopy(model)
    for name, layer in result.named_children():
        for weight, _ in _matrices(name, layer).values():
            weight.copy_(fake_quantize(weight, WeightGrid(8, section.granularity)))
    return result


class DynamicModel(nn.Module):
    """A dynamically quantized network: float32 in and out. Made by :func:`build_dynamic`."""

    def __init__(self, graph: DynamicGraph, layers: list[_Layer], engine: str) -> None:
        """Hold layers that were assembled for ``engine``."""
        super().__init__()
        self.graph, self.engine, self.layers = graph, engine, layers

    @torch.no_grad()
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return logits for float32 ``inputs``, one example after the other.

        Raises:
            DataError: If ``inputs`` are not float32, hold no example or do not fit the layers.
        """
        check_inputs(inputs)
        with quantized_engine(self.engine):
            return torch.cat([self._one(row) for row in inputs.split(1)])

    def _one(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


_Layer = Callable[[torch.Tensor], torch.Tensor]


def build_dynamic(spec: DynamicSpec, engine: str = "qnnpack") -> DynamicModel:
    """Assemble the model of ``spec`` from torch's dynamically quantized operators.

    Raises:
        ArtifactError: If an array is missing, left over or does not fit its layer, or the engine
            cannot be used.
    """
    _check_arrays(spec)
    with quantized_engine(engine), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*quantize.*", category=UserWarning)
        layers = [_layer(record, spec.arrays, engine) for record in spec.graph.layers]
    return DynamicModel(spec.graph, layers, engine).eval()


def _record(name: str, layer: nn.Module) -> LayerRecord:
    if type(layer) is nn.Linear:
        return DynamicLinearRecord(name=name)
    if type(layer) is nn.ReLU:
        return ReluRecord(name=name)
    if type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1):
        return FlattenRecord(name=name)
    if isinstance(layer, nn.LSTM | nn.GRU):
        _check_recurrent(name, layer)
        return RecurrentRecord(name=name, kind="lstm" if isinstance(layer, nn.LSTM) else "gru")
    if isinstance(layer, OneHot):
        return OneHotRecord(name=name, symbols=layer.symbols)
    raise ArtifactError(
        f"layer {name} ({type(layer).__name__}) has no dynamic form: use Linear, an LSTM or GRU "
        "that returns its last hidden state, ReLU and Flatten of all dimensions but the first; "
        'for convolutions use student.quantize.kind="static" or "qat"'
    )


def _check_recurrent(name: str, layer: nn.LSTM | nn.GRU) -> None:
    shape = (layer.num_layers, layer.bidirectional, layer.batch_first, layer.bias, layer.proj_size)
    if shape != (1, False, True, True, 0) or not _returns_last(layer):
        raise ArtifactError(
            f"layer {name} ({type(layer).__name__}) has no dynamic form: it must have one layer, "
            "one direction, biases, no projection, the batch first, and return the last hidden "
            "state alone"
        )


def _returns_last(layer: nn.LSTM | nn.GRU) -> bool:
    plain: Any = nn.LSTM if isinstance(layer, nn.LSTM) else nn.GRU
    x = torch.linspace(-1, 1, 2 * 3 * layer.input_size).view(2, 3, -1)
    with torch.no_grad():
        found, expected = layer(x), plain.forward(layer, x)[0][:, -1]
    return isinstance(found, torch.Tensor) and torch.equal(found, expected)


def _matrices(name: str, layer: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return weight and bias of each product of a layer, without gradient history."""
    if isinstance(layer, nn.Linear):
        bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
        return {name: (layer.weight.detach(), bias)}
    if isinstance(layer, nn.LSTM | nn.GRU):
        values = {n: p.detach() for n, p in layer.named_parameters()}
        return {
            f"{name}.input": (values["weight_ih_l0"], values["bias_ih_l0"]),
            f"{name}.hidden": (values["weight_hh_l0"], values["bias_hh_l0"]),
        }
    return {}


def _layer(record: LayerRecord, arrays: Mapping[str, torch.Tensor], engine: str) -> _Layer:
    match record:
        case DynamicLinearRecord(name=name):
            return _linear(name, arrays, engine)
        case RecurrentRecord():
            return _recurrent(record, arrays, engine)
        case OneHotRecord(symbols=symbols):
            return lambda x: _one_hot(x, symbols)
        case ReluRecord():
            return torch.relu
        case _:
            return lambda x: x.flatten(1)


def _linear(name: str, arrays: Mapping[str, torch.Tensor], engine: str) -> _Layer:
    packed, features = _prepacked(name, arrays), arrays[f"{name}.weight"].shape[1]
    narrow = engine == "x86"

    def run(x: torch.Tensor) -> torch.Tensor:
        _check_features(name, x, x.dim(), features)
        return torch.ops.quantized.linear_dynamic(x.contiguous(), packed, narrow)

    return run


def _recurrent(record: RecurrentRecord, arrays: Mapping[str, torch.Tensor], engine: str) -> _Layer:
    name = record.name
    cell = torch.ops.quantized.make_quantized_cell_params_dynamic(
        _prepacked(f"{name}.input", arrays),
        _prepacked(f"{name}.hidden", arrays),
        arrays[f"{name}.input.bias"],
        arrays[f"{name}.hidden.bias"],
        engine == "x86",
    )
    features, hidden = (
        arrays[f"{name}.input.weight"].shape[1],
        arrays[f"{name}.hidden.weight"].shape[1],
    )
    operators: Any = torch  # its stubs lack the quantized recurrent layers

    def run(x: torch.Tensor) -> torch.Tensor:
        _check_features(name, x, 3, features)
        start = torch.zeros(1, len(x), hidden)
        options = (True, 1, 0.0, False, False, True)  # biases, layers, dropout, training, ...
        if record.kind == "gru":
            return operators.quantized_gru(x.contiguous(), start, [cell], *options)[0][:, -1]
        int8: Any = {"dtype": torch.qint8, "use_dynamic": True}
        return operators.quantized_lstm(x.contiguous(), (start, start), [cell], *options, **int8)[
            0
        ][:, -1]

    return run


def _prepacked(matrix: str, arrays: Mapping[str, torch.Tensor]) -> Any:
    integers, steps = arrays[f"{matrix}.weight"], arrays[f"{matrix}.scale"]
    zeros = torch.zeros(len(steps), dtype=torch.int64)
    weight = torch.quantize_per_channel(
        from_int8(integers, steps), steps.double(), zeros, 0, torch.qint8
    )
    return torch.ops.quantized.linear_prepack(weight, arrays[f"{matrix}.bias"])


def _one_hot(x: torch.Tensor, symbols: int) -> torch.Tensor:
    return functional.one_hot(x.long().clamp(0, symbols - 1), symbols).to(torch.float32)


def _check_features(name: str, x: torch.Tensor, dims: int, features: int) -> None:
    if x.dim() != dims or dims < 2 or x.shape[-1] != features:
        raise DataError(
            f"layer {name} was given shape {tuple(x.shape)}: must have "
            f"{dims if dims > 1 else 'at least 2'} dimensions, the last of size {features}"
        )


def _check_arrays(spec: DynamicSpec) -> None:
    matrices: list[str] = []
    for record in spec.graph.layers:
        match record:
            case DynamicLinearRecord(name=name):
                matrices.append(name)
            case RecurrentRecord(name=name):
                matrices += [f"{name}.input", f"{name}.hidden"]
            case _:
                pass
    expected = [f"{matrix}.{part}" for matrix in matrices for part in ("weight", "scale", "bias")]
    if len(set(expected)) < len(expected):
        raise ArtifactError("a layer's name is used twice")
    for name in set(expected) ^ spec.arrays.keys():
        raise ArtifactError(f"array {name}: {'missing' if name in expected else 'unexpected'}")
    for matrix in matrices:
        _check_matrix(matrix, spec.arrays)
    for record in spec.graph.layers:
        if isinstance(record, RecurrentRecord):
            _check_gates(record, spec.arrays)


def _check_matrix(matrix: str, arrays: Mapping[str, torch.Tensor]) -> None:
    weight = arrays[f"{matrix}.weight"]
    if weight.dtype != torch.int8 or weight.dim() != 2 or weight.numel() == 0:
        raise ArtifactError(
            f"array {matrix}.weight is {weight.dtype} of shape {tuple(weight.shape)}: must be "
            "torch.int8 with 2 dimensions"
        )
    for part in ("scale", "bias"):
        values = arrays[f"{matrix}.{part}"]
        if values.dtype != torch.float32 or values.shape != (len(weight),):
            raise ArtifactError(
                f"array {matrix}.{part} is {values.dtype} of shape {tuple(values.shape)}: must be "
                f"torch.float32 of shape ({len(weight)},)"
            )
        if not torch.isfinite(values).all() or (part == "scale" and not (values > 0).all()):
            raise ArtifactError(f"array {matrix}.{part} holds values that no layer can have")


def _check_gates(record: RecurrentRecord, arrays: Mapping[str, torch.Tensor]) -> None:
    gates = 4 if record.kind == "lstm" else 3
    first, second = (arrays[f"{record.name}.{part}.weight"] for part in ("input", "hidden"))
    if len(first) != len(second) or len(second) != gates * second.shape[1]:
        raise ArtifactError(
            f"layer {record.name} ({record.kind}): weights of shape {tuple(first.shape)} and "
            f"{tuple(second.shape)} must both have {gates} rows for each hidden unit"
        )
