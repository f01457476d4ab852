"""Exact storage of the rare values that an alphabet has no symbol for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from reticent.core.errors import PayloadError

Integers = NDArray[np.int64]

_WIDE = 255
"""A byte of this value says that the value itself follows as uint32."""


def pack_escapes(values: Integers) -> bytes:
    """Return ``values`` (int64, each in [0, 2**32)) as one byte each, plus four for large ones."""
    short = np.minimum(values, _WIDE).astype(np.uint8)
    wide = values[values >= _WIDE].astype("<u4")
    return short.tobytes() + wide.tobytes()


def unpack_escapes(data: bytes, count: int) -> Integers:
    """Return the ``count`` values in ``data``, int64 ``(count,)``.

    Raises:
        PayloadError: If ``data`` is not exactly as long as ``count`` values are.
    """
    short = np.frombuffer(data[:count], dtype=np.uint8)
    wide = np.flatnonzero(short == _WIDE)
    if len(short) != count or len(data) != count + 4 * len(wide):
        raise PayloadError(
            f"payload has {len(data)} bytes of escaped values: {count} values with {len(wide)} "
            f"wide ones must take {count + 4 * len(wide)}"
        )
    values = short.astype(np.int64)
    values[wide] = np.frombuffer(data, dtype="<u4", offset=count)
    return values
