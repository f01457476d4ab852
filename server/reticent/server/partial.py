"""A partial sum as bytes: what a worker gives back for its whole share."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from reticent.core.errors import PayloadError

from .optimizer import Accumulator
from .rounds import Tally


def encode_tally(tally: Tally) -> bytes:
    """Return what :meth:`.Tally.add` and :meth:`.Tally.drop` counted, as safetensors bytes."""
    high, low = tally.sum.parts
    head = {"dropped": tally.dropped, "bytes_up": tally.bytes_up, "inside": tally.inside}
    return save(
        {
            "high": high,
            "low": low,
            "accepted": _nodes(tally.accepted),
            "failed": _nodes(tally.failed),
            "head": np.frombuffer(json.dumps(head).encode(), dtype=np.uint8),
        }
    )


def decode_tally(data: bytes, size: int) -> Tally:
    """Return the tally of updates of length ``size`` that :func:`encode_tally` made ``data`` of.

    Raises:
        PayloadError: If it did not.
    """
    try:
        arrays = load(data)
        high, low = arrays["high"], arrays["low"]
        accepted, failed = (set(arrays[name].tolist()) for name in ("accepted", "failed"))
        head = json.loads(arrays["head"].tobytes())
        dropped = Counter({str(k): int(v) for k, v in head["dropped"].items()})
        numbers = int(head["bytes_up"]), int(head["inside"])
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PayloadError("a partial sum cannot be decoded") from error
    for part in (high, low):
        if part.dtype != np.float64 or part.shape != (size,) or not np.isfinite(part).all():
            raise PayloadError(f"a partial sum is not finite float64 ({size},)")
    if accepted & failed or not 0 <= numbers[1] <= len(accepted):
        raise PayloadError("a partial sum counts a node twice")
    total = Accumulator.of(high, low, len(accepted))
    return Tally(total, accepted, failed, dropped, bytes_up=numbers[0], inside=numbers[1])


def _nodes(nodes: set[int]) -> NDArray[np.int64]:
    return np.array(sorted(nodes), dtype=np.int64)
