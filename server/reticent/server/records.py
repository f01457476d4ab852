"""The form in which bytes travel, as :mod:`reticent.client.records` has it for devices.

The two sides share no module: neither may import the other, and what both may import knows nothing
of Flower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import ConfigRecord, RecordDict

from reticent.core.errors import PayloadError


def packed(payload: bytes) -> ConfigRecord:
    """Return a record with ``payload`` as its one value."""
    return ConfigRecord({"payload": payload})


def payload_of(content: RecordDict, name: str) -> bytes:
    """Return the one payload of a reply's record.

    Raises:
        PayloadError: If the record is of another kind.
    """
    record = content.get(name)
    if isinstance(record, ConfigRecord) and list(record) == ["payload"]:
        payload = record["payload"]
        if isinstance(payload, bytes):
            return payload
    raise PayloadError("the reply is not one encoded update")


@dataclass(frozen=True)
class Shared:
    """Records that many messages share, and the bytes in them."""

    records: dict[str, ConfigRecord]
    size: int

    @staticmethod
    def of(payloads: Mapping[str, bytes]) -> Shared:
        """Return records with one payload each."""
        records = {name: packed(payload) for name, payload in payloads.items()}
        return Shared(records, sum(map(len, payloads.values())))
