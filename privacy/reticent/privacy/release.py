"""What may leave a device."""

from __future__ import annotations

from dataclasses import dataclass

from .events import Event


@dataclass(frozen=True)
class Released:
    """Bytes that a mechanism made and the ledger was charged for.

    Only the outcome of :func:`reticent.client.round.run_round` is wrapped in it. The client's
    egress sends nothing else.

    Attributes:
        payload: The encoded update.
        event: The event that was charged.
    """

    payload: bytes
    event: Event
