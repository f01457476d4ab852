"""JSON and ``.npy`` from anywhere: one kind of error, and no allocation that the bytes do not fill.

``json.loads`` also raises RecursionError, and ``numpy.load`` allocates what a header declares
before it looks whether the bytes are there.
"""

from __future__ import annotations

import io
import json
import math
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def parse_json(text: str | bytes) -> Any:
    """Return the value that JSON text holds.

    Raises:
        ValueError: If it is not JSON, not UTF-8, nested too deeply or has too long an integer.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def parse_npy(data: bytes) -> NDArray[Any]:
    """Return the array in the bytes of an ``.npy`` file; objects are refused.

    Raises:
        ValueError: If it is not one of version 1 or 2, or its header does not fit its length.
    """
    source = io.BytesIO(data)
    try:
        version = npy.read_magic(source)
        if version not in _HEADERS:
            raise ValueError(f"npy version {version}: must be 1.0 or 2.0")
        shape, columns_first, kind = _HEADERS[version](source)
    except (SyntaxError, TokenError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"the npy header is malformed: {error}") from error
    body = memoryview(data)[source.tell() :]
    if kind.hasobject or kind.itemsize == 0 or any(size < 0 for size in shape):
        raise ValueError(f"an array of {kind} and shape {shape} cannot be read")
    if math.prod(shape) * kind.itemsize != len(body):
        raise ValueError(f"{len(body)} bytes of {kind} and shape {shape}")
    array = np.frombuffer(body, dtype=kind)
    return array.reshape(shape, order="F" if columns_first else "C").copy()
