"""What a ledger tells without being changed: who spent what, and where its chain ends."""

from __future__ import annotations

from ..accounting import epsilon
from ..events import Event
from .afford import merged
from .files import mapped
from .overview import overview
from .records import Budget, Head, Overview, Spent
from .store import Store
from .windows import View


class Account:
    """The half of a ledger that only reads."""

    def __init__(self, store: Store) -> None:
        """Use :meth:`Ledger.open` instead."""
        self._store = store

    def events(self, device: str) -> list[Event]:
        """Return everything charged to ``device``, merged; empty for an unknown device."""
        with mapped(self._store.folder):
            return list(merged(self._store.lifetimes([device]).get(device, ())))

    def spent(self, device: str, delta: float) -> float:
        """Return the ``pld`` epsilon of everything ever charged to ``device``."""
        return epsilon(self.events(device), delta)

    def spent_in_window(self, device: str, budget: Budget) -> float:
        """Return the ``pld`` epsilon of what counts against ``budget`` now.

        Raises:
            LedgerError: If the budget has a window and there is no clock for it.
        """
        store = self._store
        with mapped(store.folder):
            now = store.observed(needed=budget.window is not None)
            counted = View.of(store, [device], budget, now.at).counted(device)
        return epsilon(merged(counted), budget.delta)

    def overview(self, device: str, budget: Budget) -> Overview:
        """Return what ``device`` spent and may still spend; zeros for an unknown device.

        Raises:
            LedgerError: If the budget has a window and there is no clock for it.
        """
        with mapped(self._store.folder):
            return overview(self._store, device, budget)

    def devices(self) -> list[str]:
        """Return the names of all devices that were ever charged, sorted."""
        with mapped(self._store.folder):
            rows = self._store.db.execute("SELECT DISTINCT device FROM totals ORDER BY 1")
            return [row[0] for row in rows]

    def summary(self, delta: float) -> list[Spent]:
        """Return what devices spent, one row for each distinct history, the largest first."""
        with mapped(self._store.folder):
            groups = self._store.histories()
        rows = [(names, merged(history)) for history, names in groups.items()]
        spent = [Spent(names, events, epsilon(events, delta)) for names, events in rows]
        return sorted(spent, key=lambda row: (-row.epsilon, row.devices))

    def head(self) -> Head:
        """Return the end of the chain, to be kept somewhere else as an anchor."""
        with mapped(self._store.folder):
            return self._store.end().head

    def contains(self, head: Head) -> bool:
        """Tell whether ``head`` is in the chain: False after a rollback, a cut or a fork."""
        with mapped(self._store.folder):
            return self._store.contains(head)
