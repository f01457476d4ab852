"""Replies as they come over a SuperLink: fetched, bounded and read, whatever their sender wrote.

Flower's own grid (``HttpGrid.pull_messages``, flwr 1.41) reads all objects of a reply, of which the
SuperLink has checked the name, the head and the length. One that cannot be read raises and ends the
ServerApp; a megabyte of them can ask for gigabytes; and one that was announced and is not uploaded
holds all others up. So messages are pulled here:

- a reply has at most :data:`_MOST_OBJECTS` objects, and as many bytes as the caller says and
  :data:`_SPARE`;
- its objects are those that ours consist of: a message, its records, and payloads, which are read
  by hand, in memory that follows their length;
- it is taken for the answer to the message that it was pulled for, by the node that this was sent
  to, or not at all;
- one that has not come whole is looked for again, and nobody waits for it.

Whatever else a reply is, it becomes an error reply with a code of :class:`.Unusable`. Grids without
a SuperLink, as a simulation's, hand over messages that were never anything else.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, TypeGuard

import httpx
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest
from flwr.proto.recorddict_pb2 import ConfigRecord as ConfigProto
from flwr.proto.recorddict_pb2 import ConfigRecordValue
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.constant import HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER
from flwr.supercore.inflatable.inflatable_object import (
    get_object_head_values_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.runtime import RuntimeHttpClient

from .reasons import Unusable, UnusableReply
from .records import packed

if TYPE_CHECKING:
    from flwr.superlink.grid.http_grid import HttpGrid

_MOST_OBJECTS = 4
"""A message, the record of its records, an update and a statement."""

_SPARE = 64 * 1024
"""Bytes of a reply besides its largest payload, and the most of each object that holds none."""

_ENVELOPE = 1024
"""Bytes of the SuperLink's response besides the object in it."""

_HEAD = f"{ConfigRecord.__qualname__}{HEAD_VALUE_DIVIDER}{HEAD_VALUE_DIVIDER}".encode()
"""What an object with one payload begins with: its kind, no children, and then its length."""


@dataclass
class _Arrival:
    """A reply that was announced.

    Attributes:
        name: The name of its own object.
        names: The names of all its objects; of more than it may have, one more.
        objects: Those that have been fetched.
    """

    name: str
    names: list[str]
    objects: dict[str, bytes] = field(default_factory=dict)

    @staticmethod
    def of(name: str, tree: ObjectTree) -> _Arrival:
        """Return a reply as it was announced."""
        some = islice(iterate_object_tree(tree), _MOST_OBJECTS + 1)
        return _Arrival(name, [node.object_id for node in some])


class Inbox:
    """Takes the replies to messages from a grid."""

    def __init__(self, grid: Grid, largest: int) -> None:
        """Accept replies whose largest payload has at most ``largest`` bytes."""
        self._grid = grid
        self._link = _Link(grid, largest + _SPARE) if _remote(grid) else None
        self._arriving: dict[str, _Arrival] = {}

    def look(self, asked: Mapping[str, Message]) -> Iterator[tuple[str, Message]]:
        """Yield the replies that came, each with the id of the message that it answers.

        Args:
            asked: The messages that were pushed and not answered yet, by the ids they got.
        """
        if self._link is not None:
            found = self._completed(self._link, asked)
        else:
            replies = self._grid.pull_messages(list(asked))
            found = ((reply.metadata.reply_to_message_id, reply) for reply in replies)
        for name, reply in found:
            if name in asked:
                yield name, _attributed(name, asked[name], reply)

    def _completed(
        self, link: _Link, asked: Mapping[str, Message]
    ) -> Iterator[tuple[str, Message]]:
        """Yield the replies that have come whole, or never will."""
        self._arriving = {name: it for name, it in self._arriving.items() if name in asked}
        # What was announced is not announced again: the SuperLink then knows of no such message.
        self._arriving |= link.announced([name for name in asked if name not in self._arriving])
        for name, arrival in list(self._arriving.items()):
            if name not in asked:
                continue
            try:
                reply = link.fetched(arrival)
            except UnusableReply as error:
                reply = Message(Error(error.why), reply_to=asked[name])
            if reply is not None:
                del self._arriving[name]
                link.forget(arrival)
                yield name, reply


def _remote(grid: Grid) -> TypeGuard[HttpGrid]:
    """Return whether a SuperLink in another process is behind ``grid``.

    Whoever made such a grid has loaded its module; others are spared what it loads, half a second.
    """
    module = sys.modules.get("flwr.superlink.grid.http_grid")
    return module is not None and isinstance(grid, module.HttpGrid)


class _Link:
    """The SuperLink behind Flower's grid."""

    def __init__(self, grid: HttpGrid, most: int) -> None:
        """Fetch replies of at most ``most`` bytes."""
        self._client: RuntimeHttpClient = grid._runtime_client
        self._node, self._run, self._most = grid.node, grid.run.run_id, most
        self._client._client.event_hooks = {"response": [self._check]}

    def announced(self, names: list[str]) -> dict[str, _Arrival]:
        """Return the replies that messages got, by the names of those."""
        if not names:
            return {}
        found = self._client.PullMessages(PullAppMessagesRequest(message_ids=names))
        replies = [message.metadata for message in found.messages_list]
        return {
            reply.reply_to_message_id: _Arrival.of(reply.message_id, tree)
            for reply, tree in zip(replies, found.message_object_trees, strict=True)
        }

    def fetched(self, arrival: _Arrival) -> Message | None:
        """Return a reply, or None if it is not all there yet.

        Raises:
            UnusableReply: If it is too large or cannot be read.
        """
        if len(arrival.names) > _MOST_OBJECTS:
            raise UnusableReply(Unusable.TOO_LARGE)
        for name in arrival.names:
            if name in arrival.objects:
                continue
            asked = PullObjectRequest(node=self._node, run_id=self._run, object_id=name)
            found = self._client.PullObject(asked)
            if not found.object_found:  # its sender did not send it in time
                raise UnusableReply(Unusable.UNREADABLE)
            if not found.object_available:
                return None
            arrival.objects[name] = found.object_content
            if sum(map(len, arrival.objects.values())) > self._most:
                raise UnusableReply(Unusable.TOO_LARGE)
        return read_reply(arrival.name, arrival.objects)

    def forget(self, arrival: _Arrival) -> None:
        """Let the SuperLink delete a reply, above all one that was not taken."""
        self._client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=self._node, run_id=self._run, message_object_id=arrival.name
            )
        )

    def _check(self, response: httpx.Response) -> None:
        """Refuse a large object before its bytes are taken in.

        Raises:
            UnusableReply: If it is larger than any reply.
        """
        size = int(response.headers.get("content-length", 0))
        if response.url.path.endswith("/pull-object") and size > self._most + _ENVELOPE:
            raise UnusableReply(Unusable.TOO_LARGE)


def _attributed(name: str, asked: Message, reply: Message) -> Message:
    """Return a reply if it says what it was pulled for, else an error in its place.

    All that it says of itself was written by its sender. The SuperLink checks a copy of it.
    """
    about = reply.metadata
    # Of a node that is away the SuperLink itself says so.
    authors = {asked.metadata.dst_node_id} | ({SUPERLINK_NODE_ID} if reply.has_error() else set())
    if about.src_node_id in authors and about.reply_to_message_id == name:
        return reply
    return Message(Error(Unusable.MISADDRESSED), reply_to=asked)


def read_reply(name: str, objects: Mapping[str, bytes]) -> Message:
    """Return the reply whose own object has this name, with payloads only.

    Raises:
        UnusableReply: If the objects are not those of such a reply.
    """
    try:
        message, children = _opened(objects, name)
        content = {child: _records(objects, child) for child in children}
        return Message.inflate(message, {**content})
    except UnusableReply:
        raise
    except Exception as error:  # Flower's readers raise what they like
        raise UnusableReply(Unusable.UNREADABLE) from error


def _records(objects: Mapping[str, bytes], name: str) -> RecordDict:
    data, children = _opened(objects, name)
    return RecordDict.inflate(data, {child: _payload(objects[child]) for child in children})


def _opened(objects: Mapping[str, bytes], name: str) -> tuple[bytes, dict[str, None]]:
    """Return an object that holds no payload, and the names of its children, each once.

    Raises:
        UnusableReply: If it is larger than such an object is.
    """
    data = objects[name]
    if len(data) > _SPARE:
        raise UnusableReply(Unusable.TOO_LARGE)
    return data, dict.fromkeys(get_object_head_values_from_object_content(data)[1])


def _payload(data: bytes) -> ConfigRecord:
    """Return the record of one payload that an object holds; its kind follows from its bytes.

    Read by hand: protobuf takes forty times the bytes of many small values.

    Raises:
        ValueError: If it is another record, or another object.
    """
    head, divider, _ = data[: len(_HEAD) + 32].partition(HEAD_BODY_DIVIDER)
    if not head.startswith(_HEAD) or not divider:
        raise ValueError("not a record of configuration values")
    item, rest = _field(memoryview(data)[len(head) + 1 :], ConfigProto.ITEMS_FIELD_NUMBER)
    key, value = _field(item, ConfigProto.Item.KEY_FIELD_NUMBER)
    value, more = _field(value, ConfigProto.Item.VALUE_FIELD_NUMBER)
    payload, most = _field(value, ConfigRecordValue.BYTES_FIELD_NUMBER)
    if key != b"payload" or rest or more or most:
        raise ValueError("not a record of one payload")
    return packed(bytes(payload))


def _field(data: memoryview, number: int) -> tuple[memoryview, memoryview]:
    """Return the bytes of the field that protobuf ``data`` begins with, and what follows it.

    Raises:
        ValueError: If it is another field.
        IndexError: If it ends before its length does.
    """
    if data[0] != number << 3 | 2:
        raise ValueError(f"not field {number}")
    length, place = 0, 1
    for place in range(1, 7):
        length |= (data[place] & 0x7F) << 7 * (place - 1)
        if data[place] < 0x80:
            break
    end = place + 1 + length
    if end > len(data):
        raise ValueError("a field is cut short")
    return data[place + 1 : end], data[end:]
