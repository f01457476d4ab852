"""The backends by name."""

from __future__ import annotations

from . import BackendName
from .base import Backend
from .onnx_qdq import ONNX
from .qnnpack import QNNPACK, X86
from .xnnpack import XNNPACK

BACKENDS: dict[BackendName, Backend] = {b.name: b for b in (QNNPACK, X86, ONNX, XNNPACK)}
