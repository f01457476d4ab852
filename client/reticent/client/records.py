"""The form in which bytes travel: one record with one value.

Flower sends a message object by object, and stores each by itself: a record of configuration values
is one object, where an array record is three (itself, the array, and a chunk of it). A value holds
up to 2 GiB (of protobuf); one over 512 MB does not pass Flower's channels.
"""

from __future__ import annotations

from flwr.app import ConfigRecord, RecordDict

from reticent.core.errors import PayloadError


def pack(payload: bytes) -> ConfigRecord:
    """Return a record with ``payload`` as its one value."""
    return ConfigRecord({"payload": payload})


def unpack(content: RecordDict, name: str) -> bytes:
    """Return the bytes that :func:`pack` made a record of.

    Raises:
        PayloadError: If there is no such record, or it does not hold exactly one payload.
    """
    record = content.get(name)
    if isinstance(record, ConfigRecord) and list(record) == ["payload"]:
        payload = record["payload"]
        if isinstance(payload, bytes):
            return payload
    raise PayloadError(f"message holds no record {name!r} with one payload")
