"""A partial sum as bytes: what a worker gives back for its whole share."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from reticent.core.decoding import parse_json
from reticent.core.errors import PayloadError
from reticent.core.update import Vector

from .optimizer import Accumulator, Floats
from .rounds import Tally

_MALFORMED = (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OverflowError)


def encode_tally(tally: Tally) -> bytes:
    """Return what :meth:`.Tally.add` and :meth:`.Tally.drop` counted, as safetensors bytes."""
    high, low = tally.sum.parts
    head = {"dropped": tally.dropped, "bytes_up": tally.bytes_up, "inside": tally.inside}
    return save(
        _kept(tally)
        | {
            "high": high,
            "low": low,
            "accepted": _nodes(tally.accepted),
            "failed": _nodes(tally.failed),
            "spent": _nodes(tally.spent),
            "head": np.frombuffer(json.dumps(head).encode(), dtype=np.uint8),
        }
    )


def decode_tally(data: bytes, size: int, keep: bool = False) -> Tally:
    """Return the tally of updates of length ``size`` that :func:`encode_tally` made ``data`` of.

    With ``keep`` it holds the updates themselves as well.

    Raises:
        PayloadError: If it did not.
    """
    try:
        arrays = load(data)
        high, low = arrays["high"], arrays["low"]
        names = ("accepted", "failed", "spent")
        accepted, failed, spent = (set(arrays[name].tolist()) for name in names)
        head = parse_json(arrays["head"].tobytes())
        dropped = Counter({str(k): int(v) for k, v in head["dropped"].items()})
        numbers = int(head["bytes_up"]), int(head["inside"])
    except _MALFORMED as error:
        raise PayloadError("a partial sum cannot be decoded") from error
    for part in (high, low):
        if part.dtype != np.float64 or part.shape != (size,) or not np.isfinite(part).all():
            raise PayloadError(f"a partial sum is not finite float64 ({size},)")
    if accepted & failed or not spent <= failed or not 0 <= numbers[1] <= len(accepted):
        raise PayloadError("a partial sum counts a node twice")
    total = Accumulator.of(high, low, len(accepted))
    tally = Tally(total, accepted, failed, spent, dropped, bytes_up=numbers[0], inside=numbers[1])
    if keep:
        tally.vectors = _vectors(arrays.get("vectors"), accepted, size)
    return tally


def _kept(tally: Tally) -> dict[str, NDArray[np.float32]]:
    """Return the updates, float32 ``(accepted, size)`` in the order of their nodes, if kept."""
    if tally.vectors is None:
        return {}
    rows = np.zeros((len(tally.vectors), len(tally.sum.parts[0])), dtype=np.float32)
    for row, node in zip(rows, sorted(tally.vectors), strict=True):
        row[:] = tally.vectors[node]
    return {"vectors": rows}


def _vectors(
    rows: NDArray[np.float32] | None, accepted: set[int], size: int
) -> dict[int, Vector | Floats]:
    """Return the updates by node.

    Raises:
        PayloadError: If they are not one for each accepted node, finite and float32.
    """
    shape = (len(accepted), size)
    if rows is None or rows.dtype != np.float32 or rows.shape != shape:
        raise PayloadError(f"a partial sum comes without its updates, float32 {shape}")
    if not np.isfinite(rows).all():
        raise PayloadError("a partial sum comes with updates that are not finite")
    return dict(zip(sorted(accepted), rows, strict=True))


def _nodes(nodes: set[int]) -> NDArray[np.int64]:
    return np.array(sorted(nodes), dtype=np.int64)
