"""What may leave a device: released values, and values that are public by declaration.

Every value that a device sends is one of these two types, or a refusal with a fixed code. The
client's egress takes nothing else, so a value that nobody accounted for has no way out: there is
no place to put it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from reticent.core.errors import PrivacyError

from .events import Event

T = TypeVar("T")


@dataclass(frozen=True)
class Released(Generic[T]):
    """A value that a mechanism made and the ledger was charged for.

    Only the outcome of :func:`reticent.client.round.run_round` is wrapped in it.

    Attributes:
        value: What is sent.
        event: The event that was charged.
    """

    value: T
    event: Event


@dataclass(frozen=True)
class Public(Generic[T]):
    """A value that does not depend on any private example, by declaration.

    Nothing checks the declaration; it is listed in the privacy report, with the reason, so that a
    reader can.

    Attributes:
        value: What is sent.
        kind: Which of :data:`PUBLIC_KINDS` it is.

    Raises:
        PrivacyError: If the kind is not declared.
    """

    value: T
    kind: str

    def __post_init__(self) -> None:
        """Refuse an undeclared kind."""
        if self.kind not in PUBLIC_KINDS:
            raise PrivacyError(
                f"public value of kind {self.kind!r}: must be one of {', '.join(PUBLIC_KINDS)}"
            )


PUBLIC_KINDS = {
    "statement": (
        "the device's signed ledger head: its key, the number of its ledger entries and a keyed "
        "hash; it tells how often the device took part anywhere, and nothing about its examples"
    ),
    "receipt": (
        "the device's answer to the offer of a model: the version that is installed and how many "
        "of the offered bytes have arrived; it depends on what servers sent, on the owner's policy "
        "and on storage, and on no example"
    ),
}
"""Every kind of public value that a device may send, and why it is public."""
