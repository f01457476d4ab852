"""What is changed of Flower's SuperNode: it takes no code, and stays in step with its messages.

What it sends for them is changed in :mod:`.replies`.

**No code.** A server may send apps of several kinds, with files in them. Here the messages of a run
are ignored unless its app is one for federations, of no files but its configuration
(:mod:`.bundles`).

**In step.** What a SuperNode sends after a message is the reply to that message.

After each message that it has received, a SuperNode (flwr 1.41) waits for a reply and sends what
there is. A message whose run ends while it is being received leaves a reply too many: the
exception that says so is not an ``Exception``, and passes by the handler that takes the message
and its task away again. From then on each reply is sent for the message after its own, a round
late, until the SuperNode is started anew: the device is charged, and its updates are never used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flwr.supercore.constant import TaskType
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supernode import start_client_internal as supernode

from reticent.core.errors import PayloadError

from .bundles import require_no_code
from .replies import replying


class RunOverError(Exception):
    """The run of a message ended before all of the message was here."""


def mend_supernode() -> None:
    """Change Flower's SuperNode in this process, before it is started."""
    supernode._pull_and_store_message = in_step(supernode._pull_and_store_message)
    supernode._push_messages = replying(supernode._push_messages)


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
        given["get_run"] = _federations_only(given["get_run"])
        given["get_fab"] = _without_code(given["get_fab"])
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


def _federations_only(get_run: Callable[[int], Run]) -> Callable[[int], Run]:
    """Return ``get_run`` such that the messages of runs of other kinds are ignored."""

    def vetted(run_id: int) -> Run:
        run = get_run(run_id)
        if run.primary_task_type != TaskType.SERVER_APP:
            print(
                f"run {run_id} is refused: {run.primary_task_type!r} is no federation", flush=True
            )
            raise RunNotRunningException
        return run

    return vetted


def _without_code(get_fab: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``get_fab`` such that the messages of a run that brings code are ignored."""

    def vetted(digest: str, run_id: int) -> Any:
        fab = get_fab(digest, run_id)
        try:
            require_no_code(fab.content)
        except PayloadError as error:
            print(f"run {run_id} is refused: {error}", flush=True)
            raise RunNotRunningException from error
        return fab

    return vetted


def _drop_replies(state: Any, object_store: Any) -> None:
    for reply in state.get_messages_legacy(is_reply=True):
        about = reply.metadata
        print(f"a reply came after its message was given up: {about.message_id}", flush=True)
        state.delete_messages(message_ids=[about.message_id, about.reply_to_message_id])
        object_store.delete(about.message_id)
