"""Charges that were made where the ledger is, for a process that trains elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from reticent.core.decoding import parse_json
from reticent.core.errors import LedgerError

from ..events import Event, event_from_json
from .records import Budget, BudgetExceeded, Charge


@dataclass(frozen=True)
class Grants:
    """One round's charges of some simulated devices: it can find them again, and make none.

    Whoever holds the ledger charges, synchronises, and then hands these out; training that asks
    for a charge that is not among them is refused. So *charge, fsync, train* holds although the
    ledger is in another process or on another machine.

    Attributes:
        folder: Where else than in the ledger itself a device's files lie.
        run: Identity of the run.
        round: The round that was charged.
        event: What was charged; None when nothing was.
        charged: Number of the entry of each device that was charged.
        refused: Epsilon already spent, of each device whose budget does not allow the round.
        before: What the same devices were charged first, where a round takes two charges.
    """

    folder: Path
    run: str = ""
    round: int = 0
    event: Event | None = None
    charged: Mapping[str, int] = field(default_factory=dict[str, int])
    refused: Mapping[str, float] = field(default_factory=dict[str, float])
    before: Grants | None = None

    def of(self, devices: Sequence[str]) -> Grants:
        """Return what is about ``devices`` alone."""
        charged = {d: self.charged[d] for d in devices if d in self.charged}
        refused = {d: self.refused[d] for d in devices if d in self.refused}
        before = self.before and self.before.of(devices)
        return replace(self, charged=charged, refused=refused, before=before)

    def charge(self, device: str, run: str, round: int, event: Event, budget: Budget) -> Charge:
        """Return the charge of this round, as :meth:`.Ledger.charge` returns one made before.

        Raises:
            BudgetExceeded: If the ledger refused it.
            LedgerError: If this very charge was not made.
        """
        same = (run, round, event) == (self.run, self.round, self.event)
        if not same and self.before is not None:
            return self.before.charge(device, run, round, event, budget)
        if same and device in self.refused:
            raise BudgetExceeded(device, self.refused[device], budget, event)
        if not same or device not in self.charged:
            raise LedgerError(f"device {device}, run {run}, round {round}: was not charged")
        return Charge(device, run, round, event, self.charged[device], repeated=True)

    def charge_many(
        self, devices: Sequence[str], run: str, round: int, event: Event, budget: Budget
    ) -> list[Charge | BudgetExceeded]:
        """Return the charges of a cohort, or the reasons for refusals, in order.

        Raises:
            LedgerError: If one was neither charged nor refused.
        """
        found: list[Charge | BudgetExceeded] = []
        for device in devices:
            try:
                found.append(self.charge(device, run, round, event, budget))
            except BudgetExceeded as refusal:
                found.append(refusal)
        return found

    def to_json(self) -> str:
        """Return everything but the folder."""
        event = self.event.to_json() if self.event else None
        before = self.before and self.before.to_json()
        parts = [self.run, self.round, event, dict(self.charged), dict(self.refused), before]
        return json.dumps(parts)

    @staticmethod
    def from_json(folder: Path, text: str) -> Grants:
        """Return what :meth:`to_json` made ``text`` of."""
        run, round, event, charged, refused, before = parse_json(text)
        found = None if event is None else event_from_json(event)
        first = None if before is None else Grants.from_json(folder, before)
        return Grants(folder, run, round, found, charged, refused, first)
