"""Why a reply was not used, in a fixed number of words: they become keys of what is counted."""

from __future__ import annotations

from enum import IntEnum

from reticent.core.errors import PayloadError
from reticent.core.protocol import Refusal

_FLOWERS = range(1, 9)
"""Flower's own codes of errors (1.41); docs/errors.md says what each means."""


class Unusable(IntEnum):
    """Why a reply was refused before it was read; codes of the server's own, below the devices'."""

    UNREADABLE = 900
    TOO_LARGE = 901
    MISADDRESSED = 902

    @property
    def text(self) -> str:
        """The reason; nothing of the reply is in it."""
        return _TEXTS[self]


_TEXTS = {
    Unusable.UNREADABLE: "the reply cannot be read",
    Unusable.TOO_LARGE: "the reply is larger than any of this plan",
    Unusable.MISADDRESSED: "the reply names another author or another order",
}


class UnusableReply(PayloadError):
    """A reply that is refused before it is read.

    Attributes:
        why: The reason.
    """

    def __init__(self, why: Unusable) -> None:
        """Say why."""
        super().__init__(why.text)
        self.why = why


def reason_of(code: int) -> str:
    """Return the words for an error's code, which its sender chose: a few, whatever the code."""
    for kind in (Refusal, Unusable):
        if code in kind.__members__.values():
            return kind(code).text
    known = f"Flower error {code}" if code in _FLOWERS else "an unknown error"
    return f"the client gave no reply ({known})"
