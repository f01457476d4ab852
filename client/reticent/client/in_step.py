"""Flower's SuperNode, kept in step: what it sends after a message is the reply to that message.

After each message that it has received, a SuperNode (flwr 1.41) waits for a reply and sends what
there is. A message whose run ends while it is being received leaves a reply too many: the
exception that says so is not an ``Exception``, and passes by the handler that takes the message
and its task away again. From then on each reply is sent for the message after its own, a round
late, until the SuperNode is started anew: the device is charged, and its updates are never used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flwr.supercore.run import RunNotRunningException
from flwr.supernode import start_client_internal as supernode


class RunOverError(Exception):
    """The run of a message ended before all of the message was here."""


def keep_in_step() -> None:
    """Mend Flower's SuperNode in this process, before it is started."""
    supernode._pull_and_store_message = in_step(supernode._pull_and_store_message)


def in_step(pull: Callable[..., int | None]) -> Callable[..., int | None]:
    """Return ``pull``, which receives a message, such that nothing is left of one given up.

    A reply that is there before a message was received belongs to one that was given up: in step,
    replies are waited for and sent before the next message. The ledger holds what it would have
    released, and sends that when the round is asked again.
    """

    def received(**given: Any) -> int | None:
        _drop_replies(given["state"], given["object_store"])
        for name in ("pull_object", "confirm_message_received"):
            given[name] = _told(given[name])
        return pull(**given)

    return received


def _told(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``call`` with an exception that Flower's handler catches."""

    def told(*arguments: Any) -> Any:
        try:
            return call(*arguments)
        except RunNotRunningException as error:
            raise RunOverError("the run is over") from error

    return told


def _drop_replies(state: Any, object_store: Any) -> None:
    for reply in state.get_messages_legacy(is_reply=True):
        about = reply.metadata
        print(f"a reply came after its message was given up: {about.message_id}", flush=True)
        state.delete_messages(message_ids=[about.message_id, about.reply_to_message_id])
        object_store.delete(about.message_id)
