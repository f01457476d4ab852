"""Forms that an int8 model is deployed in, each with what runs it.

This file imports nothing, so that the command line knows the names without loading torch; the
backends themselves are in :mod:`.registry`.
"""

from __future__ import annotations

from typing import Literal, get_args

BackendName = Literal["qnnpack", "x86", "onnx", "xnnpack"]
BACKEND_NAMES: tuple[BackendName, ...] = get_args(BackendName)
