"""A true int8 model as plain data, and its assembly for one of torch's int8 engines.

An :class:`IntegerSpec` is a list of layer records and a dictionary of arrays: what an artifact
stores, and all that is needed to rebuild the model, without FX graphs and without pickle. This file
is the only one that touches ``torch.ao``, which torch has announced to remove.

Engines take the same arrays: ``qnnpack`` is for ARM and runs on x86 too, ``x86`` is for servers and
laptops (FBGEMM and oneDNN, as torch chooses). Both add products in 32 bits and round alike, but
FBGEMM on a processor without AVX512-VNNI adds them two by two in 16 bits first, and those saturate
silently: 255 * (127 + 127) is above 32,767. torch's own remedy is ``reduce_range``, other scales
than QNNPACK's. Here the arrays stay, and where sums might saturate the engine is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import torch
import torch.ao.nn.intrinsic.quantized as nniq
import torch.ao.nn.quantized as nnq
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import nn
from torch.nn import functional

from reticent.core.errors import ArtifactError, DataError
from reticent.core.plan import Backend

from .quantize import from_int8

_SAFE_WEIGHT = 64
"""Of this magnitude two products with 255 and their sum fit into 16 bits: 2 * 64 * 255 = 32,640."""

Pair = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]


class Grid(BaseModel):
    """How a quint8 activation is read: ``scale * (integer - zero_point)``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    zero_point: Annotated[int, Field(ge=0, le=255)]


class LayerRecord(BaseModel):
    """A layer by its name; subclasses say which."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]


class ConvRecord(LayerRecord):
    """Convolution, with the ReLU after it if ``relu``; ``output`` is the grid of its result."""

    kind: Literal["conv2d"] = "conv2d"
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: Annotated[int, Field(ge=1)]
    relu: bool
    output: Grid


class LinearRecord(LayerRecord):
    """Fully connected layer, with the ReLU after it if ``relu``."""

    kind: Literal["linear"] = "linear"
    relu: bool
    output: Grid


class GroupNormRecord(LayerRecord):
    """GroupNorm. A ReLU after it needs no operator: zero point 0 makes rounding clamp at zero."""

    kind: Literal["group_norm"] = "group_norm"
    groups: Annotated[int, Field(ge=1)]
    eps: Annotated[float, Field(gt=0)]
    output: Grid


class ReluRecord(LayerRecord):
    """A ReLU that could not be merged into the layer before it."""

    kind: Literal["relu"] = "relu"


class PoolRecord(LayerRecord):
    """Max pooling."""

    kind: Literal["max_pool2d"] = "max_pool2d"
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair


class FlattenRecord(LayerRecord):
    """Flatten of all dimensions but the first."""

    kind: Literal["flatten"] = "flatten"


Weighted = ConvRecord | LinearRecord | GroupNormRecord
Record = Annotated[
    ConvRecord | LinearRecord | GroupNormRecord | ReluRecord | PoolRecord | FlattenRecord,
    Field(discriminator="kind"),
]


class Graph(BaseModel):
    """The layers in order and the grid of the input: what ``model.json`` holds."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    input: Grid
    layers: tuple[Record, ...]


@dataclass(frozen=True)
class IntegerSpec:
    """An int8 model as data.

    Attributes:
        graph: Layers and activation grids.
        arrays: For each conv and linear layer ``NAME.weight`` (int8), ``NAME.scale`` (float32, one
            step per output channel) and ``NAME.bias`` (float32); for each GroupNorm ``NAME.weight``
            and ``NAME.bias`` (float32).
    """

    graph: Graph
    arrays: Mapping[str, torch.Tensor]


def parse_graph(text: bytes) -> Graph:
    """Read a graph from JSON.

    Raises:
        ArtifactError: If it is not a valid graph.
    """
    try:
        return TypeAdapter(Graph).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ArtifactError(f"model.json: {where}: {first['msg']}") from error


@contextmanager
def quantized_engine(name: str) -> Iterator[None]:
    """Select torch's quantized engine and restore the one before. The setting is process-wide.

    Raises:
        ArtifactError: If the engine is not qnnpack or x86, or this torch was built without it.
    """
    supported = torch.backends.quantized.supported_engines
    if name not in get_args(Backend) or name not in supported:
        raise ArtifactError(
            f"engine={name}: must be qnnpack or x86, and torch must be built with it; it has "
            f"{supported}"
        )
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def check_inputs(inputs: torch.Tensor) -> None:
    """Check what a deployed model is given.

    Raises:
        DataError: If it is not float32 or holds no example.
    """
    if inputs.dtype != torch.float32 or inputs.numel() == 0:
        raise DataError(
            f"inputs are {inputs.dtype} of shape {tuple(inputs.shape)}: must be float32 and hold "
            "at least one example"
        )


class IntegerModel(nn.Module):
    """An int8 network: float32 in, float32 logits out, integers between. Made by :func:`build`."""

    def __init__(self, graph: Graph, layers: list[nn.Module], engine: str) -> None:
        super().__init__()
        self.graph, self.engine = graph, engine
        self.layers = nn.Sequential(*layers)

    @torch.no_grad()
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return logits for float32 ``inputs`` of any memory format.

        Raises:
            DataError: If ``inputs`` are not float32, hold no example or do not fit the layers.
        """
        check_inputs(inputs)
        grid = self.graph.input
        with quantized_engine(self.engine):
            # Contiguous throughout: some quantized kernels read channels_last tensors wrongly.
            x = torch.quantize_per_tensor(
                inputs.contiguous(), grid.scale, grid.zero_point, torch.quint8
            )
            return self.layers(x).dequantize()


class _Checked(nn.Module):
    """A conv or linear layer behind a check of its input's shape.

    QNNPACK itself answers wrong numbers of features, and sometimes of channels, with wrong logits.
    """

    def __init__(self, name: str, layer: nn.Module, features: int, dims: int) -> None:
        super().__init__()
        self.name, self.layer, self.features, self.dims = name, layer, features, dims

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != self.dims or x.shape[1] != self.features:
            raise DataError(
                f"layer {self.name} was given shape {tuple(x.shape)}: must have {self.dims} "
                f"dimensions, the second of size {self.features}"
            )
        return self.layer(x)


class _Relu(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x.contiguous())


class _Flatten(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous().flatten(1)


class _Pool(nn.Module):
    def __init__(self, record: PoolRecord) -> None:
        super().__init__()
        self.record = record

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        r = self.record
        return functional.max_pool2d(x.contiguous(), r.kernel, r.stride, r.padding, r.dilation)


class _GroupNorm(nn.Module):
    def __init__(self, record: GroupNormRecord, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.record, self.weight, self.bias = record, weight, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        r = self.record
        return torch.ops.quantized.group_norm(
            x.contiguous(),
            r.groups,
            self.weight,
            self.bias,
            r.eps,
            r.output.scale,
            r.output.zero_point,
        )


def build(spec: IntegerSpec, engine: str = "qnnpack") -> IntegerModel:
    """Assemble the int8 model of ``spec`` from torch's quantized modules.

    Raises:
        ArtifactError: If an array is missing, left over or does not fit its layer, or the engine
            cannot be used, or might saturate on this processor.
    """
    _check_arrays(spec)
    with quantized_engine(engine), warnings.catch_warnings():
        if engine == "x86":
            _refuse_saturation(spec)
        # torch warns, once in a process, that its quantized tensors will be removed.
        warnings.filterwarnings("ignore", message=".*quantize.*", category=UserWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        layers = [_layer(record, spec.arrays) for record in spec.graph.layers]
    return IntegerModel(spec.graph, layers, engine).eval()


def _refuse_saturation(spec: IntegerSpec) -> None:
    # A torch that cannot tell (2.10 cannot) is taken to run on a processor without.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)
    if capabilities().get("avx512_vnni", False):
        return
    for name, array in spec.arrays.items():
        largest = int(array.to(torch.int16).abs().max()) if array.dtype == torch.int8 else 0
        if largest > _SAFE_WEIGHT:
            raise ArtifactError(
                f"array {name} holds {largest}: engine x86 may saturate silently above "
                f"{_SAFE_WEIGHT} on this processor, which lacks AVX512-VNNI; use qnnpack, or "
                "weights of 4 bits or fewer"
            )


def _layer(record: Record, arrays: Mapping[str, torch.Tensor]) -> nn.Module:
    try:
        match record:
            case ConvRecord():
                return _conv(record, arrays)
            case LinearRecord():
                return _linear(record, arrays)
            case GroupNormRecord(name=name):
                return _GroupNorm(record, arrays[f"{name}.weight"], arrays[f"{name}.bias"])
            case PoolRecord():
                return _Pool(record)
            case ReluRecord():
                return _Relu()
            case FlattenRecord():
                return _Flatten()
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(f"layer {record.name} ({record.kind}): {reason}") from error


def _conv(record: ConvRecord, arrays: Mapping[str, torch.Tensor]) -> nn.Module:
    weight = arrays[f"{record.name}.weight"]
    channels = weight.shape[1] * record.groups
    make: Any = nniq.ConvReLU2d if record.relu else nnq.Conv2d
    layer = make(
        channels,
        weight.shape[0],
        tuple(weight.shape[2:]),
        stride=record.stride,
        padding=record.padding,
        dilation=record.dilation,
        groups=record.groups,
    )
    return _Checked(record.name, _filled(layer, record, arrays), channels, 4)


def _linear(record: LinearRecord, arrays: Mapping[str, torch.Tensor]) -> nn.Module:
    out_features, in_features = arrays[f"{record.name}.weight"].shape
    make: Any = nniq.LinearReLU if record.relu else nnq.Linear
    layer = _filled(make(in_features, out_features), record, arrays)
    return _Checked(record.name, layer, in_features, 2)


def _filled(
    layer: Any, record: ConvRecord | LinearRecord, arrays: Mapping[str, torch.Tensor]
) -> nn.Module:
    integers, scales = arrays[f"{record.name}.weight"], arrays[f"{record.name}.scale"]
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    # The floats lie on the grid, so quantizing them gives the same integers again.
    weight = torch.quantize_per_channel(
        from_int8(integers, scales), scales.double(), zeros, 0, torch.qint8
    )
    layer.set_weight_bias(weight, arrays[f"{record.name}.bias"])
    layer.scale, layer.zero_point = record.output.scale, record.output.zero_point
    return layer


def _check_arrays(spec: IntegerSpec) -> None:
    expected: dict[str, tuple[torch.dtype, int]] = {}
    for record in spec.graph.layers:
        if not isinstance(record, Weighted):
            continue
        wide = {"conv2d": 4, "linear": 2, "group_norm": 1}[record.kind]
        kinds = {"weight": (torch.int8, wide), "scale": (torch.float32, 1)}
        if wide == 1:
            kinds = {"weight": (torch.float32, 1)}
        for part, kind in {**kinds, "bias": (torch.float32, 1)}.items():
            if f"{record.name}.{part}" in expected:
                raise ArtifactError(f"layer {record.name}: the name is used twice")
            expected[f"{record.name}.{part}"] = kind
    for name in expected.keys() ^ spec.arrays.keys():
        raise ArtifactError(f"array {name}: {'missing' if name in expected else 'unexpected'}")
    for name, (dtype, dims) in expected.items():
        _check_array(name, spec.arrays, dtype, dims)


def _check_array(
    name: str, arrays: Mapping[str, torch.Tensor], dtype: torch.dtype, dims: int
) -> None:
    array = arrays[name]
    rows = len(arrays[f"{name.rpartition('.')[0]}.weight"])
    if array.dtype != dtype or array.dim() != dims or array.numel() == 0 or len(array) != rows:
        raise ArtifactError(
            f"array {name} is {array.dtype} of shape {tuple(array.shape)}: must be {dtype} with "
            f"{dims} dimensions and {rows} rows"
        )
    if dtype == torch.float32 and not torch.isfinite(array).all():
        raise ArtifactError(f"array {name} holds values that are not finite")
    if name.endswith(".scale") and not (array > 0).all():
        raise ArtifactError(f"array {name} holds a scale that is not above zero")
