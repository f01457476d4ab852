"""Flower's Grid without Flower's servers: the one module that touches Flower's internals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Protocol

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run as FlowerRun
from flwr.supercore.task_identity import TaskIdentity

_RUN_ID = 1
_SERVER_NODE = 1
_FIRST_NODE = 2


def enter_task() -> None:
    """Give this process the identity that Flower's messages are stamped with."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = _RUN_ID
    TaskIdentity.node_id = _SERVER_NODE


def node_of(client: int) -> int:
    """Return the node id of a client."""
    return client + _FIRST_NODE


def client_of(node: int) -> int:
    """Return the client index of a node id."""
    return node - _FIRST_NODE


def to_bytes(message: Message) -> bytes:
    """Serialise a message as Flower does on the wire (protobuf)."""
    return message_to_proto(message).SerializeToString()


def from_bytes(data: bytes) -> Message:
    """Parse what :func:`to_bytes` made."""
    return message_from_proto(ProtoMessage.FromString(data))


def numbered(message: Message, number: int) -> Message:
    """Give a message the id that Flower's links would give it, so that it can be replied to."""
    message.metadata.__dict__["_message_id"] = str(number)
    return message


class Backend(Protocol):
    """Runs the ClientApp for messages that are ready to be sent."""

    @property
    def window(self) -> int:
        """How many messages to hand over at a time."""
        ...

    def answer(self, messages: list[Message]) -> Iterator[Message]:
        """Yield the replies in the order of ``messages``."""
        ...


class InProcessGrid(Grid):
    """A grid whose nodes are the clients of a simulation.

    ``send_and_receive`` is lazy: replies are computed as they are consumed, a window of messages at
    a time, so memory does not depend on the cohort. Replies come in the order of the messages. It
    is a :class:`~reticent.server.nodes.LazyGrid`.
    """

    lazy = True

    def __init__(self, clients: int, backend: Backend) -> None:
        """Serve ``clients`` nodes through ``backend``."""
        self._nodes = range(_FIRST_NODE, _FIRST_NODE + clients)
        self._backend = backend
        self._run = FlowerRun.create_empty(_RUN_ID)
        self._replies: dict[str, Message] = {}
        self._sent = 0

    def set_run(self, run: FlowerRun) -> None:
        """Set the run this grid works in."""
        self._run = run

    @property
    def run(self) -> FlowerRun:
        """Run information."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a new message from the server to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return every node: simulated clients are always connected."""
        return self._nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages now and keep their replies for :meth:`pull_messages`."""
        ids: list[str] = []
        for reply in self.send_and_receive(messages):
            ids.append(reply.metadata.reply_to_message_id)
            self._replies[ids[-1]] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return, and forget, the replies to messages that were pushed."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Yield the replies to ``messages`` as they are computed; simulated time has no timeout."""
        pending = iter(messages)
        while window := [self._stamped(m) for m in islice(pending, self._backend.window)]:
            yield from self._backend.answer(window)

    def _stamped(self, message: Message) -> Message:
        self._sent += 1
        return numbered(message, self._sent)


def serve(app: ServerApp, grid: Grid) -> None:
    """Run a ServerApp to its end on ``grid``."""
    enter_task()
    context = Context(_RUN_ID, _SERVER_NODE, {}, RecordDict(), {})
    app(grid=grid, context=context)


def call_client(app: ClientApp, message: Message, state: RecordDict) -> Message:
    """Run a ClientApp on one message, as Flower's runtime does; any exception is error code 2."""
    try:
        return app(message=message, context=context_of(message, state))
    except Exception:
        return Message(Error(2, "the client failed"), reply_to=message)


def context_of(message: Message, state: RecordDict) -> Context:
    """Return the context in which Flower's runtime would handle ``message``."""
    node = message.metadata.dst_node_id
    return Context(_RUN_ID, node, {"partition-id": client_of(node)}, state, {})
