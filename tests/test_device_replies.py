"""A SuperNode sends something for each message, and nothing with it that was measured or said."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime, timedelta

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.corestate import in_memory_corestate
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supernode.nodestate import in_memory_nodestate
from test_device_in_step import RUN, Supernode, mended, node

from reticent.client import replies
from reticent.core.protocol import Refusal

__all__ = ["mended", "node"]

CRASHED = Error(ErrorCode.CLIENT_APP_CRASHED, replies.NO_REPLY)
SECRET = "/home/pi/data/me.csv: 'Ada'"


def still() -> None:
    """Confirm a message."""


def sends(node: Supernode, seconds: float = 20.0) -> bool:
    """Return whether the SuperNode has sent something within so many seconds."""
    thread = threading.Thread(target=node.send, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "_POLL_SECONDS", 0.01)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[timedelta], None]:
    """Move Flower's clock."""
    real = in_memory_corestate.now

    def move(by: timedelta) -> None:
        def now() -> datetime:
            return real() + by

        monkeypatch.setattr(in_memory_corestate, "now", now)
        monkeypatch.setattr(in_memory_nodestate, "now", now)

    return move


def killed_before_it_fetched(node: Supernode, order: Message) -> None:
    node.begin()


def killed_after_it_fetched(node: Supernode, order: Message) -> None:
    node.begin()
    node.fetch()


def raised_while_it_fetched(node: Supernode, order: Message) -> None:
    """An object with a sound name and an unsound body is enough; Flower makes no reply then."""
    task = node.begin()
    node.fetch()
    node.state.finish_task(task, "failed", SECRET)


def torn(node: Supernode, order: Message) -> None:
    """Killed while it pushed the parts of its reply, of which Flower waits for all."""
    node.begin()
    node.fetch()
    reply = Message(RecordDict(), reply_to=order)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    node.state.store_message(reply)
    node.store.preregister(RUN, get_object_tree(reply))


WAYS = [killed_before_it_fetched, killed_after_it_fetched, raised_while_it_fetched, torn]


@pytest.mark.usefixtures("mended", "soon")
@pytest.mark.parametrize("end", WAYS)
def test_a_client_app_that_ends_without_a_reply_is_answered_for(
    node: Supernode, clock: Callable[[timedelta], None], end: Callable[[Supernode, Message], None]
) -> None:
    order = node.order(1)
    assert node.receive(order, still) == RUN
    end(node, order)
    clock(timedelta(minutes=5))  # without a heartbeat
    assert sends(node)
    assert (node.sent, node.errors) == ([order.metadata.message_id], [CRASHED])
    assert not node.state.msg_store and not node.store.store  # nothing is left of either
    clock(timedelta())
    following = node.order(2)
    assert node.receive(following, still) == RUN
    node.begin()
    node.answer(following)
    node.send()
    assert node.sent[1:] == [following.metadata.message_id] and node.errors[1:] == [None]


@pytest.mark.usefixtures("mended", "soon")
@pytest.mark.parametrize("ttl", [0.3, 1e9])
def test_a_message_is_worked_on_for_as_long_as_it_lives_and_a_day_at_most(
    node: Supernode, monkeypatch: pytest.MonkeyPatch, ttl: float
) -> None:
    """By a ClientApp that is there; what it replies later is not sent for the next message."""
    if ttl > replies.LONGEST:
        monkeypatch.setattr(replies, "LONGEST", 0.3)
    order = node.order(1, ttl)
    assert node.receive(order, still) == RUN
    (pending,) = node.state.get_tasks()
    token = node.state.claim_task(pending.task_id)
    node.state.activate_task(pending.task_id)
    assert sends(node)
    assert (node.sent, node.errors) == ([order.metadata.message_id], [CRASHED])
    assert node.state.get_task_by_token(token) is None


@pytest.mark.usefixtures("mended", "soon")
@pytest.mark.parametrize("begun", [False, True])
def test_as_long_as_a_message_is_worked_on_its_reply_is_waited_for(
    node: Supernode, begun: bool
) -> None:
    order = node.order(1)
    assert node.receive(order, still) == RUN
    if begun:
        node.begin()
    thread = threading.Thread(target=node.send)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and not node.sent
    node.answer(order)
    thread.join(20)
    assert (node.sent, node.errors) == ([order.metadata.message_id], [None])


@pytest.mark.usefixtures("mended")
def test_what_a_message_took_is_not_told(
    node: Supernode, clock: Callable[[timedelta], None]
) -> None:
    order = node.order(1)
    assert node.receive(order, still) == RUN
    node.fetch()
    clock(timedelta(seconds=7))
    node.answer(order)
    assert node.state.get_message_processing_duration(order.metadata.message_id) > 6
    node.send()
    assert node.runtimes == [0.0]


@pytest.mark.usefixtures("mended")
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, SECRET), replies.NO_REPLY),
        (Error(ErrorCode.LOAD_CLIENT_APP_EXCEPTION), replies.NO_REPLY),
        (Error(424242, SECRET), replies.NO_REPLY),
        (Error(int(Refusal.BUDGET), SECRET), Refusal.BUDGET.text),
        (Error(int(Refusal.BUDGET), Refusal.BUDGET.text), Refusal.BUDGET.text),
    ],
)
def test_of_an_error_its_code_alone_is_told(node: Supernode, error: Error, said: str) -> None:
    """Neither the message nor its parts, which travel by themselves, hold the words."""
    order = node.order(1)
    assert node.receive(order, still) == RUN
    node.answer(order, error)
    node.send()
    assert (node.sent, node.errors) == ([order.metadata.message_id], [Error(error.code, said)])
    (sent,) = node.pushed
    inflated = Message.inflate(sent)
    assert inflated.error == Error(error.code, said)
    assert inflated.metadata.reply_to_message_id == order.metadata.message_id
    assert SECRET.encode() not in sent
    assert not node.state.msg_store


def test_every_code_of_ours_keeps_its_text() -> None:
    assert [replies.text_of(int(refusal)) for refusal in Refusal] == [r.text for r in Refusal]
