"""The schedule of a buffered (semi-asynchronous) run: who is asked when, and whose updates fill it.

An event loop in virtual time. Nothing in it depends on training, so it runs ahead of it, and again
from the beginning when a run is resumed: a few microseconds an event.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from reticent.server.fleet import DROPPED, LATE, LEFT, SMALL, STALE, Release
from reticent.server.sampling import LONGEST_WAIT

from .clock import Trips, Work

Available = Callable[[NDArray[np.int64], float], NDArray[np.bool_]]
TripOf = Callable[[int, float, int], Trips]

_LOOK_AHEAD = 64  # candidates whose availability is looked up at a time


@dataclass(frozen=True)
class Deals:
    """What a buffered run is dealt.

    Attributes:
        size: Updates that fill the buffer.
        concurrency: Devices that are busy at a time.
        max_staleness: Most releases that a used update may be behind.
        most: In how many rounds a device may be asked.
        stream: Yields nodes in the order in which they are to be asked.
    """

    size: int
    concurrency: int
    max_staleness: int
    most: int
    stream: Callable[[Sequence[int]], Iterator[int]]


@dataclass
class _Open:
    """What has happened since the last release."""

    started: list[int] = field(default_factory=list)
    began: list[tuple[int, int]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    unused: list[tuple[int, int]] = field(default_factory=list)
    energy: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass(order=True)
class _Event:
    """A device begins to train (``ends`` false), or ends; in order of time, then of asking."""

    time: float
    ends: bool
    asked: int
    node: int = field(compare=False)
    given: int = field(compare=False)
    trip: Trips = field(compare=False)


def schedule(
    deals: Deals,
    stream: Iterator[int],
    population: int,
    available: Available,
    next_change: Callable[[float], float],
    trip_of: TripOf,
    work: Work,
) -> Iterator[Release]:
    """Yield every release in turn; ends if no device is left that may be asked, or comes for long.

    All that ends at one instant ends before anyone else is asked, so that with devices that are
    all alike, and as many busy as fill the buffer, releases are the synchronous rounds. A device
    is not asked while it is busy or its update is in the buffer, not twice for one model, and not
    in more than ``most`` rounds. One that is lost frees its place at the deadline, as the server
    does not learn of it before; one that declines frees it when it does. Where nobody is busy and
    for :data:`LONGEST_WAIT` nobody comes that may be asked, the buffer cannot be filled.
    """
    desk = _Desk(deals, stream, population, available)
    events: list[_Event] = []
    busy: set[int] = set()
    buffer: list[tuple[int, int]] = []
    asked, released, now, now_open = 0, 0, 0.0, _Open()
    last = now  # when a device began or ended
    while True:
        while len(busy) < deals.concurrency:
            node = desk.next(now, busy | {n for n, _ in buffer})
            if node is None:
                break
            trip = trip_of(node, now, released)
            busy.add(node)
            now_open.started.append(node)
            for event in _events_of(trip, work, asked, node, released):
                heapq.heappush(events, event)
            asked += 1
        if not events:
            later = next_change(now)
            if later - last > LONGEST_WAIT or desk.spent:
                return
            now = later
            continue
        # Where a place is free because nobody is available, look again when somebody may come.
        later = next_change(now) if len(busy) < deals.concurrency else np.inf
        now = min(events[0].time, later)
        ready: list[Release] = []
        while events and events[0].time <= now:
            event = heapq.heappop(events)
            last = event.time
            if not event.ends:
                now_open.began.append((event.node, event.given))
                continue
            busy.remove(event.node)
            why = _settled(event, released, deals.max_staleness, work)
            _count(now_open, event, why, work)
            if why is None:
                buffer.append((event.node, event.given))
            if len(buffer) == deals.size:
                released += 1
                ready.append(_release(released, buffer, now_open, now))
                buffer, now_open = [], _Open()
                desk.next_model()
        yield from ready


class _Desk:
    """Chooses who is asked next."""

    def __init__(
        self, deals: Deals, stream: Iterator[int], population: int, available: Available
    ) -> None:
        self._most, self._stream = deals.most, stream
        self._population, self._available = population, available
        self._rounds = Counter[int]()
        self._of_model: set[int] = set()
        self._ahead: deque[int] = deque()
        self.spent = False

    def next_model(self) -> None:
        """Begin a new model: everybody may be asked for it once."""
        self._of_model.clear()

    def next(self, now: float, taken: set[int]) -> int | None:
        """Return the next node of the stream that may be asked now; None if there is none.

        A node that is passed over because it is busy, in the buffer or has this model is asked as
        soon as it may be; one that is away has lost its turn. ``spent`` becomes true when a whole
        population was passed over with nobody left that has rounds to go.
        """
        late: list[int] = []
        chosen, tries, left = None, 0, False
        while chosen is None and tries < 2 * self._population + _LOOK_AHEAD:
            some = self._more()
            there = self._available(np.array(some, dtype=np.int64), now)
            for i, node in enumerate(some):
                tries += 1
                if self._rounds[node] >= self._most:
                    continue
                left = True
                if node in taken or node in self._of_model:
                    late.append(node)
                elif there[i]:
                    chosen = node
                    self._ahead.extendleft(reversed(some[i + 1 :]))
                    break
        if chosen is None:  # else those that are passed over again and again would fill the tries
            late = list(dict.fromkeys(late))
        self._ahead.extendleft(reversed(late))
        self.spent = chosen is None and not left
        if chosen is not None:
            self._rounds[chosen] += 1
            self._of_model.add(chosen)
        return chosen

    def _more(self) -> list[int]:
        while len(self._ahead) < _LOOK_AHEAD:
            self._ahead.extend(islice(self._stream, _LOOK_AHEAD))
        return [self._ahead.popleft() for _ in range(_LOOK_AHEAD)]


def _events_of(trip: Trips, work: Work, asked: int, node: int, given: int) -> Iterator[_Event]:
    latest = trip.start + work.deadline
    if trip.charged(latest)[0]:
        yield _Event(float(trip.begin[0]), False, asked, node, given, trip)
    on_time = trip.answered() & (trip.finish <= latest)
    declined = trip.declined() & (trip.arrived <= latest)
    end = trip.finish if on_time[0] else trip.arrived if declined[0] else np.array([latest])
    yield _Event(float(end[0]), True, asked, node, given, trip)


def _settled(event: _Event, released: int, max_staleness: int, work: Work) -> str | None:
    """Return why an update is not used, or None if it is."""
    trip, latest = event.trip, event.trip.start + work.deadline
    if trip.lost[0] < latest:
        return LEFT if trip.left[0] else DROPPED
    if not trip.traits.fits[0]:
        return SMALL if trip.arrived[0] <= latest else LATE
    if trip.finish[0] > latest:
        return LATE
    return STALE if released - event.given > max_staleness else None


def _count(now_open: _Open, event: _Event, why: str | None, work: Work) -> None:
    latest = event.trip.start + work.deadline
    down, up = event.trip.sent(work, latest)
    now_open.energy += float(event.trip.energy(latest)[0])
    now_open.bytes_down += int(down[0])
    now_open.bytes_up += int(up[0])
    if why is not None:
        now_open.dropped[why] += 1
        if event.trip.charged(latest)[0]:
            now_open.unused.append((event.node, event.given))


def _release(number: int, buffer: list[tuple[int, int]], seen: _Open, now: float) -> Release:
    return Release(
        number=number,
        used=tuple(buffer),
        started=tuple(seen.started),
        began=tuple(seen.began),
        dropped=seen.dropped,
        unused=tuple(seen.unused),
        ends=now,
        energy=seen.energy,
        bytes_up=seen.bytes_up,
        bytes_down=seen.bytes_down,
    )
