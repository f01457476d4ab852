"""The backends by name."""

from __future__ import annotations

from . import BackendName
from .base import Backend
from .onnx_qdq import ONNX
from .qnnpack import QNNPACK
from .xnnpack import XNNPACK

BACKENDS: dict[BackendName, Backend] = {b.name: b for b in (QNNPACK, ONNX, XNNPACK)}
