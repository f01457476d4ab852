"""The nodes of a run: whose they are, and how their replies are gathered."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

_POLL_SECONDS = 0.5

Gather = Callable[[Grid, Iterable[Message], float, Callable[[], bool]], Iterable[Message]]


def at_once(
    grid: Grid, messages: Iterable[Message], timeout: float, closed: Callable[[], bool]
) -> Iterable[Message]:
    """Return replies as the grid itself collects them, all of them: who is asked trains."""
    return grid.send_and_receive(messages, timeout=timeout)


def polled(
    grid: Grid, messages: Iterable[Message], timeout: float, closed: Callable[[], bool]
) -> Iterator[Message]:
    """Yield replies as they come in, for ``timeout`` seconds or until ``closed()``.

    A message that no device has fetched by then is void: a device that comes back later does not
    spend budget on a round that is over.
    """
    waiting = list(messages)
    for message in waiting:
        message.metadata.ttl = timeout
    deadline = time.monotonic() + timeout
    open_ids = {i for i in grid.push_messages(waiting) if i}  # an empty id: it was not taken
    while open_ids and time.monotonic() < deadline and not closed():
        for reply in grid.pull_messages(open_ids):
            open_ids.discard(reply.metadata.reply_to_message_id)
            yield reply
        if open_ids and not closed():
            time.sleep(_POLL_SECONDS)


@dataclass(frozen=True)
class Nodes:
    """Who the nodes are.

    Attributes:
        gather: Sends messages and returns the replies, for so many seconds; may end sooner once
            its last argument says that the round is closed.
        identity: Returns the id that a node is counted under: participations are a device's, and
            a device may come back as another node.
        seen: Is told which nodes are connected whenever the server looks, and returns who is
            missing, in words that end a sentence; or nothing.
    """

    gather: Gather = at_once
    identity: Callable[[int], int] = int
    seen: Callable[[Sequence[int]], str] = lambda nodes: ""
