"""The backend ``onnx``: one ONNX model with int8 weights, run by onnxruntime."""

from __future__ import annotations

import torch

from ..integer import Graph, IntegerSpec
from .base import Backend, Runner, Shape
from .frames import framed, unframed

_FILE = "model.onnx.zst"


def _write(spec: IntegerSpec, input_shape: Shape) -> bytes:
    from .onnx_graph import onnx_model

    return framed(onnx_model(spec, input_shape))


def _load(_: Graph, data: bytes) -> Runner:
    from .onnx_session import open_session

    run = open_session(unframed(data, _FILE))
    return Runner(lambda inputs: torch.from_numpy(run(inputs.numpy())))


ONNX = Backend("onnx", "onnxruntime", _FILE, _write, _load, ("onnx",), ("onnxruntime",))
