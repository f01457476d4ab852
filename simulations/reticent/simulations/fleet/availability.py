"""When the devices of a fleet may be asked: always, by the hour, or as a file says.

Every kind answers two questions for an array of devices, in virtual seconds: who is there at a
time, and when those that are there leave. Availability follows from the plan, the seed and the
device's index, never from data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from reticent.core.fleet import Availability
from reticent.core.seeds import derive_key
from reticent.core.uniforms import uniforms

Clients = NDArray[np.int64]
Floats = NDArray[np.float64]
_DAY = 86_400.0


class Presence(Protocol):
    """One kind of availability."""

    def there(self, clients: Clients, time: float) -> NDArray[np.bool_]:
        """Return which of ``clients`` are available at ``time``."""
        ...

    def leaves(self, clients: Clients, time: float, until: float) -> Floats:
        """Return when each client that is there at ``time`` leaves; infinity if after ``until``."""
        ...

    def next_change(self, time: float) -> float:
        """Return the first time after ``time`` at which anyone may come, or infinity."""
        ...


class Always:
    """Every device is always there."""

    def there(self, clients: Clients, time: float) -> NDArray[np.bool_]:
        """Return true for all."""
        return np.ones(len(clients), dtype=bool)

    def leaves(self, clients: Clients, time: float, until: float) -> Floats:
        """Return infinity for all."""
        return np.full(len(clients), math.inf)

    def next_change(self, time: float) -> float:
        """Return infinity."""
        return math.inf


@dataclass(frozen=True)
class Diurnal:
    """A device is there in a slot of time with a probability that follows its local hour.

    p(h) = low + (high - low) (1 + cos(2 pi (h - peak) / 24)) / 2 at the slot's beginning, h being
    the hour of the device's time zone; slots are drawn independently. The run begins at midnight in
    zone 0. The shape is that of Bonawitz et al. 2019 (figure 6) and Yang et al. 2018: a daily wave
    that is about four times as high by night as by day; see docs/fleet.md.
    """

    section: Availability
    seed: int

    def there(self, clients: Clients, time: float) -> NDArray[np.bool_]:
        """Return which of ``clients`` are available at ``time``."""
        return self._in_slot(clients, int(time // self.section.slot))

    def probability(self, clients: Clients, slot: int) -> Floats:
        """Return each client's probability of being there in slot ``slot``."""
        s = self.section
        coins = uniforms(derive_key(self.seed, "fleet", "zone"), clients)
        hour = slot * s.slot / 3600 + np.floor(coins * s.zones)
        wave = (1 + np.cos(2 * np.pi * (hour - s.peak) / 24)) / 2
        return s.low + (s.high - s.low) * wave

    def leaves(self, clients: Clients, time: float, until: float) -> Floats:
        """Return the beginning of the first slot in which each client is away."""
        left = np.full(len(clients), math.inf)
        slot = int(time // self.section.slot) + 1
        while slot * self.section.slot <= until and np.isinf(left).any():
            gone = np.isinf(left) & ~self._in_slot(clients, slot)
            left[gone] = slot * self.section.slot
            slot += 1
        return left

    def next_change(self, time: float) -> float:
        """Return the beginning of the next slot."""
        return (time // self.section.slot + 1) * self.section.slot

    def _in_slot(self, clients: Clients, slot: int) -> NDArray[np.bool_]:
        coins = uniforms(derive_key(self.seed, "fleet", "slot", slot), clients)
        return coins < self.probability(clients, slot)


@dataclass(frozen=True, eq=False)
class Trace:
    """Intervals from a file (:mod:`.traces`): a device is there within its own, and only then.

    Attributes:
        client: Client of each interval, ascending, and by start within a client.
        start: When it begins, seconds.
        end: When it ends; intervals of one client do not overlap.
        period: After so many seconds all of them happen again; None: once.
        digest: SHA-256 of the file.
    """

    client: Clients
    start: Floats
    end: Floats
    period: float | None
    digest: str

    def there(self, clients: Clients, time: float) -> NDArray[np.bool_]:
        """Return which of ``clients`` are available at ``time``."""
        return self._interval(clients, self._phase(time))[1]

    def leaves(self, clients: Clients, time: float, until: float) -> Floats:
        """Return the end of the interval that each client is in; at once for one that is in none.

        An interval that ends with the period goes on in the client's first one, if that begins at
        0, but not further.
        """
        phase = self._phase(time)
        found, inside = self._interval(clients, phase)
        left = np.full(len(clients), time)
        end = self.end[np.maximum(found, 0)]
        if self.period is not None:
            first = np.searchsorted(self.client, clients)
            first = np.minimum(first, len(self.client) - 1)
            again = (end == self.period) & (self.start[first] == 0)
            end = end + np.where(again, self.end[first], 0.0)
        left[inside] = time - phase + end[inside]
        return np.where(left > until, math.inf, left)

    def next_change(self, time: float) -> float:
        """Return the next beginning of an interval."""
        phase = self._phase(time)
        position = int(np.searchsorted(self._starts, phase, side="right"))
        if position < len(self._starts):
            return time - phase + float(self._starts[position])
        return math.inf if self.period is None else time - phase + self.period + self._starts[0]

    @cached_property
    def _starts(self) -> Floats:
        return np.unique(self.start)

    def _phase(self, time: float) -> float:
        return time if self.period is None else math.fmod(time, self.period)

    def _interval(self, clients: Clients, phase: float) -> tuple[Clients, NDArray[np.bool_]]:
        """Return the last interval of each client that began by ``phase``, and if it goes on."""
        low = np.searchsorted(self.client, clients, side="left")
        high = np.searchsorted(self.client, clients, side="right")
        # By bisection over each client's own intervals, all clients at once.
        while (low < high).any():
            middle = (low + high) // 2
            begun = self.start[np.minimum(middle, len(self.start) - 1)] <= phase
            active = low < high
            low = np.where(active & begun, middle + 1, low)
            high = np.where(active & ~begun, middle, high)
        found = low - 1
        safe = np.maximum(found, 0)
        own = (found >= 0) & (self.client[safe] == clients)
        return np.where(own, found, -1), own & (phase < self.end[safe])
