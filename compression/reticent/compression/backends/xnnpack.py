"""The backend ``xnnpack``: one ExecuTorch program for XNNPACK's int8 kernels."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from ..integer import Graph, IntegerSpec
from .base import Backend, Runner, Shape
from .frames import framed, unframed

_FILE = "model.pte.zst"


def _write(spec: IntegerSpec, input_shape: Shape) -> bytes:
    with _quiet():
        from .xnnpack_program import xnnpack_program

        return framed(xnnpack_program(spec, input_shape))


def _load(_: Graph, data: bytes) -> Runner:
    with _quiet():
        from .xnnpack_runtime import Program

        return Runner(Program(unframed(data, _FILE)))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the warnings and log lines of ExecuTorch, torchao and torch.export to themselves.

    ExecuTorch's native code writes to the standard error stream itself; what goes wrong in it is
    also raised.
    """
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    stream = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(stream, 2)
        os.close(stream)
        logging.disable(level)


XNNPACK = Backend(
    "xnnpack",
    "XNNPACK, in ExecuTorch",
    _FILE,
    _write,
    _load,
    ("executorch", "torchao", "flatbuffers"),
    ("executorch",),
)
