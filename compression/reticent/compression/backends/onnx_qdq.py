"""The backend ``onnx``: one ``model.onnx`` with int8 weights, run by onnxruntime."""

from __future__ import annotations

import torch

from ..integer import Graph, IntegerSpec
from .base import Backend, Runner, Shape


def _write(spec: IntegerSpec, input_shape: Shape) -> bytes:
    from .onnx_graph import onnx_model

    return onnx_model(spec, input_shape)


def _load(_: Graph, data: bytes) -> Runner:
    from .onnx_session import open_session

    run = open_session(data)
    return Runner(lambda inputs: torch.from_numpy(run(inputs.numpy())))


ONNX = Backend("onnx", "onnxruntime", "model.onnx", _write, _load, ("onnx",), ("onnxruntime",))
