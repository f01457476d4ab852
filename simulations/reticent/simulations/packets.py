"""What goes to the workers of a simulation: the work of a round once, then shares of its clients.

A message to a client is made of records that it shares with most others: the order, the model, the
constants. A worker gets each of them once, and for a client its number and which of them are its
message. Both are safetensors and JSON; nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from reticent.client.records import pack, unpack
from reticent.core.decoding import parse_json
from reticent.core.errors import PayloadError, PrivacyError
from reticent.core.update import Layout
from reticent.privacy.ledger import Grants
from reticent.server.folding import Kept, Rules

from .devices import device_name
from .grid import client_of, numbered

_MALFORMED = (
    *(SafetensorError, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError),
    PrivacyError,
)


@dataclass(frozen=True)
class Work:
    """What all shares of a round need.

    Attributes:
        records: The distinct records of its messages.
        rules: How replies are folded.
        kept: What clients hold of earlier rounds.
    """

    records: tuple[ConfigRecord, ...]
    rules: Rules
    kept: Kept

    def encode(self) -> bytes:
        """Return the work as safetensors bytes."""
        rules, layout, model = self.rules, self.rules.layout, self.kept.model
        arrays: dict[str, NDArray[Any]] = {
            "constants": _bytes(self.kept.constants),
            "mask": _bytes(layout.kept),
        }
        if model is not None:
            arrays["model"] = model
        heads: list[Any] = []
        for index, record in enumerate(self.records):
            if list(record) == ["payload"]:
                heads.append(None)
                arrays[f"record:{index}"] = _bytes(unpack(RecordDict({"one": record}), "one"))
            else:
                heads.append(dict(record))
        shape = [layout.names, layout.shapes]
        head = [heads, rules.round, shape, rules.bound, rules.clip, rules.bit]
        head += [rules.weight, rules.keep]
        return save(arrays | {"head": _bytes(json.dumps(head).encode())})

    @staticmethod
    def decode(data: bytes) -> Work:
        """Return what :meth:`encode` made ``data`` of.

        Raises:
            PayloadError: If it did not.
        """
        try:
            return Work._decoded(data)
        except _MALFORMED as error:
            raise PayloadError(f"the work of a round cannot be decoded: {error}") from error

    @staticmethod
    def _decoded(data: bytes) -> Work:
        arrays = load(data)
        head = parse_json(arrays["head"].tobytes())
        heads, number, (names, shapes), bound, clip, bit, weight, keep = head
        records: list[ConfigRecord] = [
            pack(arrays[f"record:{i}"].tobytes()) if config is None else ConfigRecord(config)
            for i, config in enumerate(heads)
        ]
        mask = arrays["mask"].tobytes()
        layout = Layout(tuple(names), tuple(tuple(shape) for shape in shapes), mask)
        kept = Kept(arrays["constants"].tobytes(), arrays.get("model"))
        rules = Rules(number, layout, bound, clip, bit, weight, keep)
        return Work(tuple(records), rules, kept)


class Packer:
    """Finds the distinct records of a round's messages, window by window."""

    def __init__(self, rules: Rules, kept: Kept) -> None:
        """Pack the messages of one round."""
        self._rules, self._kept = rules, kept
        self._index: dict[int, int] = {}
        self._records: list[ConfigRecord] = []
        self._work = b""

    def work(self, messages: Iterable[Message]) -> bytes:
        """Return the work that these messages need; the same object while nothing new comes."""
        known = len(self._records)
        for message in messages:
            for record in message.content.values():
                if id(record) not in self._index:
                    self._index[id(record)] = len(self._records)
                    # Kept, so that its id stays its own.
                    self._records.append(cast(ConfigRecord, record))
        if len(self._records) > known:
            self._work = Work(tuple(self._records), self._rules, self._kept).encode()
        return self._work

    def share(self, messages: Sequence[Message], grants: Grants) -> bytes:
        """Return one worker's share: the clients, their messages' records, and their charges."""
        kinds: dict[tuple[tuple[str, int], ...], int] = {}
        chosen = [
            kinds.setdefault(
                tuple((name, self._index[id(r)]) for name, r in m.content.items()), len(kinds)
            )
            for m in messages
        ]
        about = messages[0].metadata
        nodes = [m.metadata.dst_node_id for m in messages]
        own = grants.of([device_name(client_of(node)) for node in nodes])
        head = [about.message_type, about.group_id, list(kinds), nodes, chosen, own.to_json()]
        return json.dumps(head).encode()


def clients_in(share: bytes) -> int:
    """Return how many clients a share that :meth:`Packer.share` packed is of."""
    return len(parse_json(share)[3])


def messages_in(share: bytes, work: Work, folder: Path) -> tuple[list[Message], Grants]:
    """Return the messages that :meth:`Packer.share` packed, and the charges of their clients.

    Raises:
        PayloadError: If it did not pack them, or for other work.
    """
    try:
        return _unpacked(share, work, folder)
    except _MALFORMED as error:
        raise PayloadError(f"a share of a round cannot be decoded: {error}") from error


def _unpacked(share: bytes, work: Work, folder: Path) -> tuple[list[Message], Grants]:
    kind, group, contents, nodes, chosen, grants = parse_json(share)
    messages = [
        numbered(
            Message(
                RecordDict({name: work.records[i] for name, i in contents[which]}),
                dst_node_id=node,
                message_type=kind,
                group_id=group,
            ),
            number,
        )
        for number, (node, which) in enumerate(zip(nodes, chosen, strict=True), 1)
    ]
    return messages, Grants.from_json(folder, grants)


def _bytes(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, dtype=np.uint8)
