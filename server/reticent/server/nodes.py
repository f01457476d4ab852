"""The nodes of a run: whose they are, and how their replies are gathered."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from flwr.app import Message
from flwr.serverapp import Grid

from .replies import Inbox

_POLL_SECONDS = 0.5
_AT_ONCE = 8
"""Messages handed over before each look. The SuperLink writes to its database in every request that
a device makes while it answers: devices that are all asked in one moment wait for each other there,
and the SuperLink gives up on some of them (measured with 100 and 200; see docs/deployment.md)."""

Gather = Callable[[Grid, Iterable[Message], float, Callable[[], bool], int], Iterable[Message]]


@runtime_checkable
class LazyGrid(Protocol):
    """A grid that goes through the messages it is given once, as it needs them.

    So they need not all be there at a time; Flower's own grids go through them twice.
    """

    lazy: bool


def at_once(
    grid: Grid,
    messages: Iterable[Message],
    timeout: float,
    closed: Callable[[], bool],
    largest: int,
) -> Iterable[Message]:
    """Return replies as the grid itself collects them, all of them: who is asked trains."""
    return grid.send_and_receive(messages, timeout=timeout)


def polled(
    grid: Grid,
    messages: Iterable[Message],
    timeout: float,
    closed: Callable[[], bool],
    largest: int,
) -> Iterator[Message]:
    """Yield replies as they come in, for ``timeout`` seconds or until ``closed()``.

    Messages are handed over a few at a time (:data:`_AT_ONCE`); once the round is closed, no more
    are. A message that no device has fetched by the end is void: a device that comes back later
    does not spend budget on a round that is over. What is no reply to one of these messages, of the
    node that it was sent to, with a payload of at most ``largest`` bytes, comes as an error
    (:mod:`.replies`).
    """
    waiting = list(messages)
    for message in waiting:
        message.metadata.ttl = timeout  # from when it was made, not from when it is handed over
    deadline = time.monotonic() + timeout
    inbox, asked = Inbox(grid, largest), dict[str, Message]()
    while (waiting or asked) and time.monotonic() < deadline and not closed():
        now, waiting = waiting[:_AT_ONCE], waiting[_AT_ONCE:]
        if now:
            # In their order; an empty id: it was not taken.
            ids = zip(grid.push_messages(now), now, strict=False)
            asked |= {name: message for name, message in ids if name}
        if asked:
            for name, reply in inbox.look(asked):
                asked.pop(name, None)
                yield reply
        if (waiting or asked) and not closed():
            time.sleep(_POLL_SECONDS)


@dataclass(frozen=True)
class Nodes:
    """Who the nodes are.

    Attributes:
        gather: Sends messages and returns the replies, for so many seconds; may end sooner once
            its next argument says that the round is closed. The last is the size of the largest
            payload that a reply may have.
        identity: Returns the id that a node is counted under: participations are a device's, and
            a device may come back as another node.
        seen: Is told which nodes are connected whenever the server looks, and returns who is
            missing, in words that end a sentence; or nothing.
        named: Returns the names that people have for nodes, in words; or nothing, where they have
            none.
        welcome: Returns those of the connected nodes, sorted, that may be asked; is called whenever
            the server looks, before ``seen``, for which no others are connected.
    """

    gather: Gather = at_once
    identity: Callable[[int], int] = int
    seen: Callable[[Sequence[int]], str] = lambda nodes: ""
    named: Callable[[Sequence[int]], str] = lambda nodes: ""
    welcome: Callable[[Sequence[int]], Sequence[int]] = lambda nodes: nodes
