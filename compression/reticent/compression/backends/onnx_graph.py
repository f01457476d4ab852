"""An int8 model as an ONNX graph in QDQ form, written node by node from a spec's own integers.

Every weight and activation passes through QuantizeLinear/DequantizeLinear with the spec's step and
zero point, and the operators between them are plain float ones (ONNX operator set 21). A runtime
that knows QDQ replaces "dequantize, Conv, quantize" by one integer convolution; one that does not
computes the fake-quantized student. Weights are int8 with one step per output channel and zero
point 0, activations uint8, biases int32 with step (input step) x (weight step), as in Jacob et al.
2018, section 2.4.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx  # pyright: ignore[reportMissingImports]
from onnx import TensorProto, helper, numpy_helper  # pyright: ignore[reportMissingImports]

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

OPSET = 21
IR_VERSION = 10
INPUT, OUTPUT = "input", "logits"


def onnx_model(spec: IntegerSpec, input_shape: tuple[int, ...]) -> bytes:
    """Return the serialised model: float32 ``input`` (n, *input_shape) to float32 ``logits``.

    Raises:
        ArtifactError: If a layer has no form here, naming it.
    """
    writer = _Writer(spec)
    writer.rounded(INPUT, spec.graph.input)
    for record in spec.graph.layers:
        writer.layer(record)
    writer.node("Identity", [writer.last], OUTPUT)
    graph = helper.make_graph(
        writer.nodes,
        "student",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["n", *input_shape])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["n", None])],
        writer.constants,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )
    model.producer_name = "reticent"
    return model.SerializeToString(deterministic=True)


class _Writer:
    """Appends nodes; ``last`` names the newest activation, which lies on the grid ``grid``."""

    def __init__(self, spec: IntegerSpec) -> None:
        self.spec, self.grid = spec, spec.graph.input
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.last = INPUT

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        self.last = output
        return output

    def constant(self, name: str, values: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def rounded(self, name: str, grid: Grid) -> None:
        """Round the newest activation to ``grid``."""
        scale = self.constant(f"{name}.output.scale", np.array(grid.scale, np.float32))
        zero = self.constant(f"{name}.output.zero_point", np.array(grid.zero_point, np.uint8))
        integers = self.node("QuantizeLinear", [self.last, scale, zero], f"{name}.quantized")
        self.node("DequantizeLinear", [integers, scale, zero], f"{name}.rounded")
        self.grid = grid

    def layer(self, record: Record) -> None:
        name = record.name
        match record:
            case ConvRecord():
                self._weighted(record, "Conv", **_conv_attributes(record))
            case LinearRecord():
                self._weighted(record, "Gemm", transB=1)
            case GroupNormRecord():
                self._group_norm(record)
            case ReluRecord():
                self.node("Relu", [self.last], name)
                self.rounded(name, self.grid)
            case PoolRecord():
                self.node("MaxPool", [self.last], name, **_pool_attributes(record))
                self.rounded(name, self.grid)
            case FlattenRecord():
                self.node("Flatten", [self.last], name, axis=1)
                self.rounded(name, self.grid)
            case _:
                raise ArtifactError(
                    f"layer {name} ({record.kind}): the backend onnx has no form of it; use "
                    "--backend qnnpack"
                )

    def _weighted(self, record: ConvRecord | LinearRecord, kind: str, **attributes: Any) -> None:
        name, data = record.name, self.last
        steps = self._array(name, "scale")
        weight = self._per_channel(f"{name}.weight", self._array(name, "weight"), steps)
        bias_steps = (np.float32(self.grid.scale) * steps).astype(np.float32)
        integers = _int32_bias(name, self._array(name, "bias"), bias_steps)
        bias = self._per_channel(f"{name}.bias", integers, bias_steps)
        self.node(kind, [data, weight, bias], name, **attributes)
        if record.relu:
            self.node("Relu", [self.last], f"{name}.relu")
        self.rounded(name, record.output)

    def _group_norm(self, record: GroupNormRecord) -> None:
        name, data = record.name, self.last
        parts = [self.constant(f"{name}.{p}", self._array(name, p)) for p in ("weight", "bias")]
        self.node(
            "GroupNormalization",
            [data, *parts],
            name,
            epsilon=record.eps,
            num_groups=record.groups,
        )
        self.rounded(name, record.output)

    def _per_channel(self, name: str, integers: np.ndarray, steps: np.ndarray) -> str:
        inputs = [
            self.constant(f"{name}.integers", integers),
            self.constant(f"{name}.scale", steps),
            self.constant(f"{name}.zero_point", np.zeros(len(steps), integers.dtype)),
        ]
        return self.node("DequantizeLinear", inputs, name, axis=0)

    def _array(self, name: str, part: str) -> np.ndarray:
        return self.spec.arrays[f"{name}.{part}"].detach().contiguous().numpy()


def _int32_bias(name: str, bias: np.ndarray, steps: np.ndarray) -> np.ndarray:
    rounded = np.rint(bias.astype(np.float64) / steps.astype(np.float64))
    limits = np.iinfo(np.int32)
    if not ((rounded >= limits.min) & (rounded <= limits.max)).all():
        raise ArtifactError(
            f"layer {name}: a bias is more than 2**31 steps of its weights, which the backend onnx "
            "cannot hold; use --backend qnnpack, or prune channels whose weights are near zero"
        )
    return rounded.astype(np.int32)


def _conv_attributes(record: ConvRecord) -> dict[str, Any]:
    return {
        "strides": record.stride,
        "pads": (*record.padding, *record.padding),
        "dilations": record.dilation,
        "group": record.groups,
    }


def _pool_attributes(record: PoolRecord) -> dict[str, Any]:
    return {
        "kernel_shape": record.kernel,
        "strides": record.stride,
        "pads": (*record.padding, *record.padding),
        "dilations": record.dilation,
    }
