"""The int8 engines that can be used here: torch for ARM lacks x86, some processors VNNI."""

from __future__ import annotations

import pytest
import torch

needs_x86 = pytest.mark.skipif(
    "x86" not in torch.backends.quantized.supported_engines, reason="this torch has no engine x86"
)
has_vnni = bool(getattr(torch.cpu, "get_capabilities", dict)().get("avx512_vnni", False))
"""Without it the engine x86 refuses weights of 8 bits that might saturate."""
ENGINES = ["qnnpack", pytest.param("x86", marks=needs_x86)]
