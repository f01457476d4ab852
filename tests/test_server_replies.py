"""What devices upload instead of a reply: it costs its sender an attempt, and nobody else anything.

The SuperLink is played by a transport of httpx: what speaks to it is Flower's own grid and client.
"""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import httpx
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.app.message.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import message_pb2, node_pb2, runtime_pb2
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid.http_grid import HttpGrid

from reticent.client.records import pack
from reticent.server import nodes as nodes_module
from reticent.server.delivery import _Trip
from reticent.server.nodes import polled
from reticent.server.offers import REFUSED, WAITING
from reticent.server.reasons import Unusable, UnusableReply
from reticent.server.replies import read_reply
from reticent.simulations.grid import enter_task

MIB = 2**20
LARGEST = 1000


@dataclass
class Upload:
    """What a device uploads: objects, the first of which is the reply's own, and their tree."""

    objects: dict[str, bytes]
    tree: message_pb2.ObjectTree
    reply: Message

    @staticmethod
    def of(reply: Message) -> Upload:
        objects = {name: it.deflate() for name, it in get_all_nested_objects(reply).items()}
        return Upload(objects, get_object_tree(reply), reply)

    @staticmethod
    def made(reply: Message, *contents: bytes) -> Upload:
        """Return a reply whose one record is ``contents[0]``, which the others belong to."""
        for content in contents:
            validate_object_content(content)  # as the SuperLink does, which admits them
        names = [get_object_id(content) for content in contents]
        records = object_of("RecordDict", names[:1], json.dumps({"update": names[0]}).encode())
        own = object_of("Message", [get_object_id(records)], body_of(reply))
        below = tree_of(contents[0], *map(tree_of, contents[1:]))
        objects = {get_object_id(content): content for content in (*contents, records, own)}
        return Upload(objects, tree_of(own, tree_of(records, below)), reply)


def object_of(kind: str, children: Iterable[str], body: bytes) -> bytes:
    return f"{kind} {','.join(children)} {len(body)}".encode() + b"\0" + body


def body_of(reply: Message) -> bytes:
    return reply.deflate().split(b"\0", 1)[1]


def tree_of(content: bytes, *below: message_pb2.ObjectTree) -> message_pb2.ObjectTree:
    return message_pb2.ObjectTree(object_id=get_object_id(content), children=below)


Answer = Callable[[Message], Upload | None]


@dataclass
class SuperLink:
    """What the ServerApp asks of a SuperLink, and what devices sent it.

    Attributes:
        answer: What each node uploads once it is asked; None for nothing.
        late: How often the objects of each node are not there yet.
    """

    answer: Answer
    late: dict[int, int] = field(default_factory=dict)
    uploads: dict[str, Upload] = field(default_factory=dict)
    announced: dict[str, str] = field(default_factory=dict)
    objects: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    forgotten: set[str] = field(default_factory=set)
    served: int = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        act = {
            "push-messages": self._push,
            "pull-messages": self._pull,
            "pull-object": self._object,
            "push-object": lambda _: runtime_pb2.GetNodesResponse(),
            "confirm-message-received": self._confirm,
        }[request.url.path.rpartition("/")[2]]
        return httpx.Response(200, content=act(request.content).SerializeToString())

    def _push(self, data: bytes) -> runtime_pb2.PushAppMessagesResponse:
        ids = []
        for proto in runtime_pb2.PushAppMessagesRequest.FromString(data).messages_list:
            message = message_from_proto(proto)
            ids.append(message.metadata.message_id)
            if (upload := self.answer(message)) is not None:
                self.uploads[ids[-1]] = upload
                node = message.metadata.dst_node_id
                self.objects |= {name: (node, it) for name, it in upload.objects.items()}
        return runtime_pb2.PushAppMessagesResponse(message_ids=ids)

    def _pull(self, data: bytes) -> runtime_pb2.PullAppMessagesResponse:
        found = runtime_pb2.PullAppMessagesResponse()
        for name in runtime_pb2.PullAppMessagesRequest.FromString(data).message_ids:
            if (upload := self.uploads.pop(name, None)) is not None:
                bare = message_to_proto(remove_content_from_message(upload.reply))
                # What it checks is this copy: it is of the node that was asked.
                bare.metadata.message_id = upload.tree.object_id
                bare.metadata.reply_to_message_id = name
                found.messages_list.append(bare)
                found.message_object_trees.append(upload.tree)
        return found

    def _object(self, data: bytes) -> message_pb2.PullObjectResponse:
        name = message_pb2.PullObjectRequest.FromString(data).object_id
        if name not in self.objects:
            return message_pb2.PullObjectResponse()
        node, content = self.objects[name]
        if self.late.get(node):
            self.late[node] -= 1
            return message_pb2.PullObjectResponse(object_found=True)
        self.served += len(content)
        return message_pb2.PullObjectResponse(
            object_found=True, object_available=True, object_content=content
        )

    def _confirm(self, data: bytes) -> message_pb2.ConfirmMessageReceivedResponse:
        name = message_pb2.ConfirmMessageReceivedRequest.FromString(data).message_object_id
        self.forgotten.add(name)
        return message_pb2.ConfirmMessageReceivedResponse()


def grid_of(link: SuperLink) -> HttpGrid:
    grid = HttpGrid(token="t")
    grid.set_run(Run.create_empty(1))
    grid.node = node_pb2.Node(node_id=SUPERLINK_NODE_ID)
    client = RuntimeHttpClient("http://link")
    client._client = httpx.Client(transport=httpx.MockTransport(link))
    grid._client = client
    return grid


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes_module, "_POLL_SECONDS", 0.01)
    enter_task()


def orders_to(*nodes: int) -> list[Message]:
    return [Message(RecordDict({"o": pack(b"order")}), n, "train", group_id="1") for n in nodes]


def asked(answer: Answer, nodes: Iterable[int] = (2, 3)) -> dict[int, Message]:
    """Ask nodes; return the replies by the node that they are counted for."""
    link = SuperLink(answer)
    found = polled(grid_of(link), orders_to(*nodes), 5.0, lambda: False, LARGEST)
    replies = {reply.metadata.src_node_id: reply for reply in found}
    assert not link.uploads and len(link.forgotten) == len(replies)
    return replies


def good(order: Message, size: int = 10) -> Message:
    content = {"update": pack(b"u" * size), "statement": pack(b"s" * 300)}
    return Message(RecordDict(content), reply_to=order)


def honest(order: Message) -> Upload:
    return Upload.of(good(order))


def two_is(answer: Answer) -> Answer:
    return lambda order: answer(order) if order.metadata.dst_node_id == 2 else honest(order)


def made(*contents: bytes) -> Answer:
    return lambda order: Upload.made(good(order), *contents)


def bomb() -> Answer:
    chunk = object_of("ArrayChunk", [], bytes(MIB // 2048))
    head = {"dtype": "u1", "shape": [1], "stype": "x", "arraychunk_ids": [0] * 1500}
    return made(object_of("Array", [get_object_id(chunk)], json.dumps(head).encode()), chunk)


def an_array(order: Message) -> Upload:
    array = Array(dtype="uint8", shape=(3,), stype="custom", data=b"abc")
    return Upload.of(Message(RecordDict({"update": ArrayRecord({"a": array})}), reply_to=order))


def many_objects(order: Message) -> Upload:
    records = {f"r{n}": pack(bytes([n])) for n in range(60)}
    return Upload.of(Message(RecordDict(records), reply_to=order))


def long_reason(order: Message) -> Upload:
    return Upload.of(Message(Error(2, "x" * 70_000), reply_to=order))


def other_values(order: Message) -> Upload:
    record = ConfigRecord({"payload": b"u", "n": 3})
    return Upload.of(Message(RecordDict({"update": record}), reply_to=order))


def missing_object(order: Message) -> Upload:
    upload = honest(order)
    del upload.objects[upload.tree.object_id]
    return upload


def records_in_brackets(order: Message) -> Upload:
    reply = good(order)
    records = object_of("RecordDict", [], b"[" * 10_000)
    own = object_of("Message", [get_object_id(records)], body_of(reply))
    objects = {get_object_id(content): content for content in (records, own)}
    return Upload(objects, tree_of(own, tree_of(records)), reply)


HOSTILE: list[tuple[str, Answer, Unusable]] = [
    ("no protobuf", made(object_of("ConfigRecord", [], b"\xff\xff\xff")), Unusable.UNREADABLE),
    ("an empty record", made(object_of("ConfigRecord", [], b"")), Unusable.UNREADABLE),
    ("no JSON", made(object_of("Array", [], b"{")), Unusable.UNREADABLE),
    ("a bomb of chunks", bomb(), Unusable.UNREADABLE),
    ("an array", an_array, Unusable.TOO_LARGE),
    ("many objects", many_objects, Unusable.TOO_LARGE),
    ("a long reason", long_reason, Unusable.TOO_LARGE),
    ("other values", other_values, Unusable.UNREADABLE),
    ("an object that never comes", missing_object, Unusable.UNREADABLE),
    ("brackets", records_in_brackets, Unusable.UNREADABLE),
    ("a large payload", lambda o: Upload.of(good(o, 70_000)), Unusable.TOO_LARGE),
]


def test_replies_come_as_they_were_sent() -> None:
    replies = asked(honest)
    assert set(replies) == {2, 3}
    assert replies[2].content["update"]["payload"] == b"u" * 10
    assert replies[3].content["statement"]["payload"] == b"s" * 300
    assert replies[2].metadata.group_id == "1"


def test_errors_come_as_they_were_sent() -> None:
    replies = asked(two_is(lambda order: Upload.of(Message(Error(1006, "no"), reply_to=order))))
    assert replies[2].error.code == 1006 and replies[3].has_content()


@pytest.mark.parametrize(
    ("answer", "why"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE]
)
def test_a_reply_that_cannot_be_read_is_an_error_of_its_sender_alone(
    answer: Answer, why: Unusable
) -> None:
    replies = asked(two_is(answer))
    assert replies[2].error.code == why and not replies[2].error.reason
    assert replies[3].has_content()


def test_the_largest_payload_is_taken_whatever_else_the_reply_holds() -> None:
    assert asked(lambda order: Upload.of(good(order, LARGEST)))[2].has_content()


class Streamed(SuperLink):
    """Objects are sent while they are read, so that what was read can be told."""

    read = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        response = super().__call__(request)
        if not request.url.path.endswith("/pull-object"):
            return response
        headers = {"content-length": str(len(response.content))}
        return httpx.Response(200, headers=headers, content=self._parts(response.content))

    def _parts(self, content: bytes) -> Iterator[bytes]:
        for first in range(0, len(content), MIB):
            part = content[first : first + MIB]
            self.read += len(part)
            yield part


def test_of_an_object_that_is_too_large_nothing_is_taken_in() -> None:
    link = Streamed(lambda order: Upload.of(good(order, 8 * MIB)))
    (reply,) = polled(grid_of(link), orders_to(2), 5.0, lambda: False, LARGEST)
    assert reply.error.code == Unusable.TOO_LARGE
    assert link.read == 0 and link.forgotten


def test_a_reply_that_is_still_on_its_way_holds_nobody_up() -> None:
    link = SuperLink(honest, late={2: 3})
    began = time.monotonic()
    found = polled(grid_of(link), orders_to(2, 3, 4), 5.0, lambda: False, LARGEST)
    authors = [reply.metadata.src_node_id for reply in found]
    assert authors == [3, 4, 2] and time.monotonic() - began < 2


def test_a_node_does_not_answer_for_another() -> None:
    """Node 2 answers its own order, and names node 3, which says nothing, as the author within."""

    def answer(order: Message) -> Upload | None:
        reply = good(order)
        reply.metadata.__dict__["_src_node_id"] = 3
        return Upload.of(reply) if order.metadata.dst_node_id == 2 else None

    grid = grid_of(SuperLink(answer))
    (reply,) = polled(grid, orders_to(2, 3), 0.3, lambda: False, LARGEST)
    assert reply.metadata.src_node_id == 2
    assert reply.error.code == Unusable.MISADDRESSED


def test_a_reply_names_the_order_that_it_was_pulled_for() -> None:
    def answer(order: Message) -> Upload:
        reply = good(order)
        reply.metadata.__dict__["_reply_to_message_id"] = "ab" * 32
        return Upload.of(reply)

    assert asked(two_is(answer))[2].error.code == Unusable.MISADDRESSED


def test_what_the_superlink_says_of_a_node_that_is_away_is_passed_on() -> None:
    def away(order: Message) -> Upload:
        reply = Message(Error(5, "away"), reply_to=order)
        reply.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
        return Upload.of(reply)

    replies = asked(two_is(away))
    assert replies[SUPERLINK_NODE_ID].error.code == 5 and 2 not in replies


def test_a_delivery_counts_an_unreadable_answer_as_a_failure_of_the_device() -> None:
    trip, order = _Trip(), Message(RecordDict(), 2, "query")
    for tries, state in enumerate((WAITING, WAITING, REFUSED)):
        trip.sent("m", order, 100.0)
        trip.read(Message(Error(Unusable.UNREADABLE), reply_to=order), 1, float(tries))
        assert trip.parcel.state == state


def test_memory_follows_the_length_of_a_reply() -> None:
    many = ConfigRecord({"n": [1] * MIB}).deflate()  # a byte each, and eight once it is read
    (order,) = orders_to(2)
    order.metadata.__dict__["_message_id"] = "m"
    upload = Upload.made(good(order), many)
    tracemalloc.start()
    with pytest.raises(UnusableReply):
        read_reply(upload.tree.object_id, upload.objects)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MIB // 4
