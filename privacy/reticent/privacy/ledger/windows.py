"""What of a device's history counts against a budget now, and when that changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .afford import Afford, History
from .records import Budget
from .store import Store, window_seconds

Timed = list[tuple[int, str, int]]


@dataclass(frozen=True)
class View:
    """Histories of some devices, as one budget sees them at one moment.

    Attributes:
        budget: The budget.
        now: Device time in seconds.
        lifetimes: Everything ever charged, by device.
        timed: What lies in the window, by device; None when the budget has no window.
        oldest: Number of the first entry that lies in the window; 0 without a window.
    """

    budget: Budget
    now: int
    lifetimes: dict[str, History]
    timed: dict[str, Timed] | None
    oldest: int = 0

    @staticmethod
    def of(store: Store, devices: Sequence[str], budget: Budget, now: int) -> View:
        """Read the histories; a window costs a look at the entries inside it."""
        lifetimes = store.lifetimes(devices)
        if budget.window is None:
            return View(budget, now, lifetimes, None)
        # A charge counts until more than a window has passed for certain: device time may be
        # ahead of the truth by less than a second, and both ends are whole seconds.
        since = now - window_seconds(budget.window)
        timed = dict(store.since(devices, since))
        return View(budget, now, lifetimes, timed, store.first_at(since))

    def lifetime(self, device: str) -> History:
        """Return everything ever charged to ``device``."""
        return self.lifetimes.get(device, ())

    def counted(self, device: str) -> History:
        """Return what counts against the budget."""
        if self.timed is None:
            return self.lifetime(device)
        return _summed(self.timed.get(device, []))

    def renews(self, device: str, afford: Afford | None = None) -> int | None:
        """Return when enough has left the window.

        Args:
            device: Its name.
            afford: For what it must be enough; None: for anything to change.

        Returns:
            Device time in seconds; None if that does not happen, or there is no window.
        """
        timed = (self.timed or {}).get(device, [])
        if self.budget.window is None or not timed:
            return None
        times = sorted({when for when, _, _ in timed})
        low, high = 0, len(times)
        while afford is not None and low < high:
            middle = (low + high) // 2
            rest = _summed([row for row in timed if row[0] > times[middle]])
            fits = afford.fits(self.lifetime(device), rest)
            low, high = (low, middle) if fits else (middle + 1, high)
        if low == len(times):
            return None
        return times[low] + window_seconds(self.budget.window) + 1


def _summed(timed: Timed) -> History:
    counts: Counter[str] = Counter()
    for _, event, charges in timed:
        counts[event] += charges
    return tuple(counts.items())
