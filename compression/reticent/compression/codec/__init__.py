"""Codecs: an update vector to a small checked payload and back.

A codec is one quantizer (what the numbers become) and at most one entropy stage (how the symbols
are written). What a quantizer's error depends on decides whether it may be applied to noise
shares; see :attr:`Codec.error`.
"""

from __future__ import annotations

from .build import build_codec as build_codec
from .codec import Codec as Codec
from .frame import pad as pad

__all__ = ["Codec", "build_codec", "pad"]
