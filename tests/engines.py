"""The int8 engines that this torch has: builds for ARM lack x86."""

from __future__ import annotations

import pytest
import torch

needs_x86 = pytest.mark.skipif(
    "x86" not in torch.backends.quantized.supported_engines, reason="this torch has no engine x86"
)
ENGINES = ["qnnpack", pytest.param("x86", marks=needs_x86)]
