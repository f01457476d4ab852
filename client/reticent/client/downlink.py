"""The model of a round on a device: a whole one, or the last one and the change since."""

from __future__ import annotations

import hashlib

import numpy as np
from flwr.app import RecordDict

from reticent.compression.codec import Codec
from reticent.core.errors import PayloadError
from reticent.core.update import Vector

from .records import pack, unpack

MODEL = "model"
"""Name of the record in Flower's state of a client that holds its last model."""

_DIGEST = 32


class ModelMissing(PayloadError):
    """The device does not hold the model that a change is against; it needs a whole one."""


def changed(
    codec: Codec, payload: bytes, marks: bytes, blocks: tuple[int, ...], state: RecordDict
) -> Vector:
    """Return the model that a change leads to, float32 ``(sum(blocks),)``.

    Args:
        codec: The plan's codec of changes.
        payload: The encoded change.
        marks: SHA-256 of the model it is against, then of the model it leads to. A device that
            holds the latter already, because its reply was lost, has nothing to decode.
        blocks: Lengths of the parameters.
        state: Flower's state of this client.

    Raises:
        ModelMissing: If the device holds neither of the two.
        PayloadError: If the payload is malformed or leads to another model than it says.
    """
    if len(marks) != 2 * _DIGEST:
        raise PayloadError(f"a change has {len(marks)} bytes of digests: must have {2 * _DIGEST}")
    held = _held(state)
    known = hashlib.sha256(held).digest()
    if known not in (marks[:_DIGEST], marks[_DIGEST:]) or len(held) != 4 * sum(blocks):
        raise ModelMissing("the device does not hold the model that this change is against")
    model = np.frombuffer(held, dtype="<f4").astype(np.float32)
    if known == marks[_DIGEST:]:
        return model
    model = model + codec.decode(payload, blocks)
    if hashlib.sha256(_bytes(model)).digest() != marks[_DIGEST:]:
        raise PayloadError("a change leads to another model than it says")
    return model


def remember(state: RecordDict, model: Vector) -> None:
    """Keep ``model`` for the next change; it is public."""
    state[MODEL] = pack(_bytes(model))


def _held(state: RecordDict) -> bytes:
    try:
        return unpack(state, MODEL)
    except PayloadError:  # none, or one that an earlier version kept
        return b""


def _bytes(model: Vector) -> bytes:
    return np.ascontiguousarray(model, dtype="<f4").tobytes()
