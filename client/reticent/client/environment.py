"""What the client's owner decides, as opposed to what the server asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from reticent.core.errors import LedgerError
from reticent.privacy.ledger import Budget, Grants, Ledger
from reticent.privacy.randomness import Randomness

from .guard import Guard
from .identity import Identity

if TYPE_CHECKING:  # it imports torch
    from reticent.core.tasks import Examples, Task


class Ahead(Protocol):
    """Loads the examples of simulated clients, if it can before their turn."""

    def take(self, task: Task, client: int) -> Examples:
        """Return what ``task.client(client)`` returns, or raise what it raises."""
        ...

    def start(self, task: Task) -> None:
        """Take note that those that are about to be trained have all they need of ``task``."""
        ...


@dataclass(frozen=True)
class Environment:
    """One device, as its owner set it up. Nothing in it can be set by a message.

    Attributes:
        client: Index of the client's data in the task.
        device: The device's name in its ledger.
        ledger: The device's ledger; in the workers of a simulation, what was charged to it.
        budget: The hard stop.
        randomness: Where noise and batches come from.
        keeps_releases: Whether encoded updates are stored before they are sent, so that a retry
            sends the same bytes. Not needed when the randomness is seeded, because training again
            gives the same bytes.
        identity: The device's key and the anchors it has met; None in a simulation, where one
            ledger holds every device and its head is anchored in the run's journal.
        guard: Holds the owner's policy against every order; None in a simulation.
        accelerator: Name of the torch device that computes gradients by
            :class:`~reticent.privacy.clipping.FunctionalGradients`; None for the ordinary ways.
        ahead: Where a simulation's examples come from; None for the task itself, asked in turn.
    """

    client: int
    device: str
    ledger: Ledger | Grants
    budget: Budget
    randomness: Randomness
    keeps_releases: bool
    identity: Identity | None = None
    guard: Guard | None = None
    accelerator: str | None = None
    ahead: Ahead | None = None

    @property
    def own_ledger(self) -> Ledger:
        """The device's ledger itself.

        Raises:
            LedgerError: If it is elsewhere.
        """
        if isinstance(self.ledger, Grants):
            raise LedgerError(f"device {self.device}: its ledger is kept elsewhere")
        return self.ledger
