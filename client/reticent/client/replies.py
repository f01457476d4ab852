"""What a SuperNode sends for a message that it received: the reply, or that there will be none.

Flower's SuperNode (1.41) waits for a reply without an end, and makes one itself only for a
ClientApp that fetched its message and then fell silent. It tells the SuperLink how long each
ClientApp took, and passes on the text of what ended one. :func:`replying` guarantees instead:

**An end.** Once nobody works on the message any more, something is sent: the reply or, if it is not
there whole, the code for a ClientApp that crashed. That code is sent in any case after as long as
the message was to live (``ttl``), and after :data:`LONGEST` at most: from then on a SuperLink takes
no reply to it, and whoever still works on it is not listened to any more.

**Nothing measured.** For the time that a ClientApp took, which depends on data, 0.0 is sent.

**Fixed words.** The text of an error depends on its code alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

from flwr.app import Error, Message
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode, Status, SubStatus
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

from reticent.core.protocol import Refusal

LONGEST = 86400.0
"""Seconds that any message is worked on: how long it lives is for the server to say."""

NO_REPLY = "the client gave no reply"
"""The text of all of Flower's own errors; their codes say which it was."""

_POLL_SECONDS = 0.5  # as Flower's
_UNFINISHED = (Status.PENDING, Status.STARTING, Status.RUNNING)


def replying(push: Callable[..., None]) -> Callable[..., None]:
    """Return ``push``, which waits for replies and sends them, with the guarantees above."""

    def pushed(state: Any, object_store: Any, send: Any, push_object: Any) -> None:
        outbox = Outbox(state, object_store)
        if outbox.fill():
            push(state=outbox, object_store=object_store, send=send, push_object=push_object)

    return pushed


@dataclass
class Outbox:
    """The state of a SuperNode, as what sends its replies sees it.

    Attributes:
        state: All of it.
        objects: Flower's object store.
        replies: What is to be sent.
    """

    state: Any
    objects: Any
    replies: Sequence[Message] = ()

    def fill(self) -> bool:
        """Wait for the replies; return whether there are any."""
        self.replies = [self._worded(reply) for reply in self._settled()]
        return bool(self.replies)

    def get_messages_legacy(self, *, is_reply: bool) -> Sequence[Message]:
        """Return the replies."""
        return self.replies

    def get_message_processing_duration(self, message_id: str) -> float:
        """Return the same for every message."""
        return 0.0

    def delete_messages(self, *, message_ids: Sequence[str]) -> None:
        """Delete messages, and what a ClientApp that crashed has left of them."""
        self.state.delete_messages(message_ids=message_ids)
        for name in message_ids:
            self.objects.delete(name)

    def _settled(self) -> list[Message]:
        found: list[Message] = []
        deadline = time.monotonic() + self._patience()
        while True:
            # In this order: who has finished pushed a reply before, or never will.
            working = self.state.get_tasks(statuses=_UNFINISHED)
            found += self.state.get_messages_legacy(is_reply=True)
            if found and all(map(self._is_whole, found)):
                return found
            if not working or time.monotonic() >= deadline:
                return self._given_up(found)
            time.sleep(_POLL_SECONDS)

    def _patience(self) -> float:
        # A duration, not a date: the clocks of server and device need not agree.
        with self.state.lock_msg_store:
            known = [entry.message.metadata for entry in self.state.msg_store.values()]
        return min([LONGEST, *(about.ttl for about in known if not about.reply_to_message_id)])

    def _is_whole(self, reply: Message) -> bool:
        tree = self.objects.get_object_tree(reply.metadata.message_id)
        return all(self.objects.get(node.object_id) for node in iterate_object_tree(tree))

    def _given_up(self, torn: Sequence[Message]) -> list[Message]:
        """Return replies that say that a ClientApp crashed, in place of ``torn`` ones."""
        print("no reply will come: the server is told that the client crashed", flush=True)
        for task in self.state.get_tasks(statuses=_UNFINISHED):
            # Its token is of no use from now on: a late reply would be taken for the next one's.
            self.state.finish_task(task.task_id, SubStatus.FAILED, "gave no reply in time")
        self.delete_messages(message_ids=[reply.metadata.message_id for reply in torn])
        # Flower answers only messages that a ClientApp fetched, and so all are fetched here.
        self.state.get_messages_legacy(is_reply=False)
        runs = {task.run_id for task in self.state.get_tasks()}
        self.state._store_error_replies(runs, Error(ErrorCode.CLIENT_APP_CRASHED, NO_REPLY))
        return list(self.state.get_messages_legacy(is_reply=True))

    def _worded(self, reply: Message) -> Message:
        """Return ``reply``; if it is an error, with the text of its code."""
        if not reply.has_error() or reply.error.reason == text_of(reply.error.code):
            return reply
        error = Error(reply.error.code, text_of(reply.error.code))
        worded = make_message(copy(reply.metadata), error=error)
        worded.metadata.__dict__["_message_id"] = worded.object_id
        self.delete_messages(message_ids=[reply.metadata.message_id])
        self.state._store_generated_message(worded)
        return worded


def text_of(code: int) -> str:
    """Return what is said of an error with a code."""
    try:
        return Refusal(code).text
    except ValueError:
        return NO_REPLY
