"""When the devices of a fleet may be asked: always, by the hour, or as a file says.

Every kind answers two questions for an array of devices, in virtual seconds: who is there at a
time, and when those that are there leave. Availability follows from the plan, the seed and the
device's index, never from data.
"""

from __future__ import annotations

import math
from bisect import bisect_right
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
        """Return when each client leaves; infinity if after ``until``.

        One that is away at ``time``, as may be who is asked again, has left at once.
        """
        ...

    def next_change(self, time: float) -> float:
        """Return the first time after ``time`` at which anyone may come, or infinity.

        Guarantee: it is later than ``time``, so that whoever waits gets on.
        """
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
        return self._in_slot(clients, whole_parts(time, self.section.slot))

    def probability(self, clients: Clients, slot: int) -> Floats:
        """Return each client's probability of being there in slot ``slot``."""
        s = self.section
        coins = uniforms(derive_key(self.seed, "fleet", "zone"), clients)
        hour = slot * s.slot / 3600 + np.floor(coins * s.zones)
        wave = (1 + np.cos(2 * np.pi * (hour - s.peak) / 24)) / 2
        return s.low + (s.high - s.low) * wave

    def leaves(self, clients: Clients, time: float, until: float) -> Floats:
        """Return the beginning of the next slot in which each client is away; at once if it is."""
        left = np.where(self.there(clients, time), math.inf, time)
        slot = whole_parts(time, self.section.slot) + 1
        while slot * self.section.slot <= until and np.isinf(left).any():
            gone = np.isinf(left) & ~self._in_slot(clients, slot)
            left[gone] = slot * self.section.slot
            slot += 1
        return left

    def next_change(self, time: float) -> float:
        """Return the beginning of the next slot."""
        return (whole_parts(time, self.section.slot) + 1) * self.section.slot

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
        return self._interval(clients, time)[1]

    def leaves(self, clients: Clients, time: float, until: float) -> Floats:
        """Return the end of the interval that each client is in; at once for one that is in none.

        An interval that ends with the period goes on in the client's first one, if that begins at
        0; who has one interval, the whole period, never leaves.
        """
        number = self._number(time)
        found, inside = self._interval(clients, time)
        left = np.full(len(clients), time)
        end = self.end[np.maximum(found, 0)]
        ends = self._ends(number, end)
        if self.period is not None:
            first = np.searchsorted(self.client, clients)
            first = np.minimum(first, len(self.client) - 1)
            again = (end == self.period) & (self.start[first] == 0)
            ends = np.where(again, self._ends(number + 1, self.end[first]), ends)
            ends = np.where(again & (self.end[first] == self.period), math.inf, ends)
        left[inside] = ends[inside]
        return np.where(left > until, math.inf, left)

    def next_change(self, time: float) -> float:
        """Return the next beginning of an interval."""
        number = self._number(time)
        base = self._begins(number)
        # Sums are compared, as in `there`: what is left of a sum is not always what was added.
        position = bisect_right(self._starts, time, key=lambda start: base + start)
        if position < len(self._starts):
            return base + float(self._starts[position])
        if self.period is None:
            return math.inf
        return self._begins(number + 1) + float(self._starts[0])

    @cached_property
    def _starts(self) -> Floats:
        return np.unique(self.start)

    def _number(self, time: float) -> int:
        """Return the period that ``time`` is in, from 0."""
        return 0 if self.period is None else whole_parts(time, self.period)

    def _begins(self, number: int) -> float:
        return 0.0 if self.period is None else number * self.period

    def _ends(self, number: int, end: Floats) -> Floats:
        """Return when intervals that end at ``end`` of a period do so in period ``number``."""
        ends = self._begins(number) + end
        if self.period is None:
            return ends
        following = self._begins(number + 1)  # not always the same float as the sum
        return np.where(end == self.period, following, np.minimum(ends, following))

    def _interval(self, clients: Clients, time: float) -> tuple[Clients, NDArray[np.bool_]]:
        """Return each client's last interval in the period that began by ``time``, and if it lasts.

        Beginnings and ends are those that :meth:`next_change` and :meth:`leaves` return.
        """
        number = self._number(time)
        base = self._begins(number)
        low = np.searchsorted(self.client, clients, side="left")
        high = np.searchsorted(self.client, clients, side="right")
        # By bisection over each client's own intervals, all clients at once.
        while (low < high).any():
            middle = (low + high) // 2
            begun = base + self.start[np.minimum(middle, len(self.start) - 1)] <= time
            active = low < high
            low = np.where(active & begun, middle + 1, low)
            high = np.where(active & ~begun, middle, high)
        found = low - 1
        safe = np.maximum(found, 0)
        own = (found >= 0) & (self.client[safe] == clients)
        return np.where(own, found, -1), own & (time < self._ends(number, self.end[safe]))


def whole_parts(time: float, length: float) -> int:
    """Return the n with ``n * length <= time < (n + 1) * length``, the products being floats.

    A quotient of floats can be off by one at a border, where a clock that waits for the next
    border would then stand still.
    """
    number = int(time // length)
    while number * length > time:
        number -= 1
    while (number + 1) * length <= time:
        number += 1
    return number
