"""The schedule of a buffered (semi-asynchronous) run: who is asked when, and whose updates fill it.

An event loop in virtual time. Nothing in it depends on training, so it runs ahead of it, and again
from the beginning when a run is resumed: 0.3 ms for each device that is asked where 100 are busy at
a time, 0.4 ms with 1,000 and 0.75 ms with 4,000. Where fewer are awake than are to be busy, two
passes of candidates are looked through besides, once for each model and each time that somebody may
have come: half a second for a million of them.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from reticent.server.fleet import DROPPED, LATE, LEFT, SMALL, STALE, Release
from reticent.server.sampling import LONGEST_WAIT

from .clock import Trips, Work, reasons

Available = Callable[[NDArray[np.int64], float], NDArray[np.bool_]]
TripOf = Callable[[int, float, int], Trips]

_LOOK_AHEAD = 64  # candidates whose availability is looked up at first
_LARGEST = 1 << 16  # and at most, where many of them are away
_NOBODY = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Deals:
    """What a buffered run is dealt.

    Attributes:
        size: Updates that fill the buffer.
        concurrency: Devices that are busy at a time.
        max_staleness: Most releases that a used update may be behind.
        most: In how many rounds a device may be asked.
        rounds: Releases after which the run ends.
        stream: Yields nodes in the order in which they are to be asked.
    """

    size: int
    concurrency: int
    max_staleness: int
    most: int
    rounds: int
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
    """Yield every release of the run; fewer if no device is left to ask, or none comes for long.

    All that ends at one instant ends before anyone else is asked, so that with devices that are
    all alike, and as many busy as fill the buffer, releases are the synchronous rounds. A device
    is not asked while it is busy or its update is in the buffer, not twice for one model, and not
    in more than ``most`` rounds. One that is lost frees its place at the deadline, as the server
    does not learn of it before; one that declines frees it when it does. Where nobody is busy and
    for :data:`LONGEST_WAIT` nobody comes that may be asked, the buffer cannot be filled.
    Whoever is busy at the last release goes on in vain, and counts in it.
    """
    desk = _Desk(deals, stream, population, available, next_change)
    events: list[_Event] = []
    busy: dict[int, _Event] = {}  # when each will end
    training: set[int] = set()  # those of them that have begun to
    buffer: list[tuple[int, int]] = []
    asked, released, now, now_open = 0, 0, 0.0, _Open()
    last = now  # when a device began or ended
    while True:
        while len(busy) < deals.concurrency:
            node = desk.next(now, {*busy, *(n for n, _ in buffer)})
            if node is None:
                break
            trip = trip_of(node, now, released)
            now_open.started.append(node)
            for event in _events_of(trip, work, asked, node, released):
                heapq.heappush(events, event)
                busy[node] = event
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
                training.add(event.node)
                continue
            del busy[event.node]
            training.discard(event.node)
            why = _settled(event, released, deals.max_staleness, work)
            _count(now_open, event, why, work)
            if why is None:
                buffer.append((event.node, event.given))
            if len(buffer) == deals.size:
                released += 1
                if released == deals.rounds:
                    _stop(now_open, busy.values(), training, now, work)
                    yield from [*ready, _release(released, buffer, now_open, now)]
                    return
                ready.append(_release(released, buffer, now_open, now))
                buffer, now_open = [], _Open()
                desk.next_model()
        yield from ready


class _Desk:
    """Chooses who is asked next.

    Where many are awake it looks at a few candidates. Where fewer are than places it looks through
    two passes, in growing pieces, once for each model and each time that somebody may have come.
    """

    def __init__(
        self,
        deals: Deals,
        stream: Iterator[int],
        population: int,
        available: Available,
        next_change: Callable[[float], float],
    ) -> None:
        self._most, self._stream = deals.most, stream
        self._population, self._available = population, available
        self._next_change = next_change
        self._rounds: dict[int, int] = {}
        self._done = 0  # who have no rounds to go
        self._of_model: set[int] = set()
        self._ahead: list[int] = []  # passed over, before all that the stream has still to deal
        self._dealt = np.zeros(0, dtype=np.int64)  # by the stream, and from `_at` not looked at
        self._at = 0
        self._nobody_until = -np.inf  # nobody but who was passed over may be asked before

    @property
    def spent(self) -> bool:
        """Whether nobody has rounds to go."""
        return self._done >= self._population

    def next_model(self) -> None:
        """Begin a new model: everybody may be asked for it once."""
        self._of_model.clear()
        self._nobody_until = -np.inf

    def next(self, now: float, taken: set[int]) -> int | None:
        """Return the next node of the stream that may be asked now; None if there is none.

        A node that is passed over because it is busy, in the buffer or has this model is asked as
        soon as it may be; one that is away has lost its turn.
        """
        late: list[int] = []
        ahead = np.array(self._ahead, dtype=np.int64)
        found = self._first(ahead, now, taken, late)
        if found is not None:
            self._ahead = late + self._ahead[found + 1 :]
            return self._asked(int(ahead[found]))
        left = 0 if now < self._nobody_until else 2 * self._population + _LOOK_AHEAD
        size = _LOOK_AHEAD
        while left > 0:
            some = self._more(min(size, left))
            found = self._first(some, now, taken, late)
            if found is not None:
                self._at -= len(some) - found - 1
                self._ahead = late
                return self._asked(int(some[found]))
            left -= len(some)
            size = min(2 * size, _LARGEST)
        # Once each: else those that are passed over again and again would grow without end.
        self._ahead = list(dict.fromkeys(late))
        self._nobody_until = max(self._nobody_until, self._next_change(now))
        return None

    def _first(
        self, some: NDArray[np.int64], now: float, taken: set[int], late: list[int]
    ) -> int | None:
        """Return the index of the first of ``some`` that may be asked; add who is passed over."""
        there = self._available(some, now)
        where = np.arange(len(some))
        if len(some) > _LOOK_AHEAD:  # of many that are away most need not be looked at one by one
            held = np.array([*taken, *self._of_model], dtype=np.int64)
            where = np.flatnonzero(there | np.isin(some, held))
        columns = where.tolist(), some[where].tolist(), there[where].tolist()
        for i, node, here in zip(*columns, strict=True):
            if self._rounds.get(node, 0) >= self._most:
                continue
            if node in taken or node in self._of_model:
                late.append(node)
            elif here:
                return i
        return None

    def _asked(self, node: int) -> int:
        self._rounds[node] = self._rounds.get(node, 0) + 1
        self._done += self._rounds[node] == self._most
        self._of_model.add(node)
        return node

    def _more(self, size: int) -> NDArray[np.int64]:
        """Take at most ``size`` from the stream, at least one."""
        if self._at == len(self._dealt):
            self._dealt, self._at = np.fromiter(islice(self._stream, size), dtype=np.int64), 0
        some = self._dealt[self._at : self._at + size]
        self._at += len(some)
        return some


def _events_of(trip: Trips, work: Work, asked: int, node: int, given: int) -> Iterator[_Event]:
    latest = trip.start + work.deadline
    if trip.charged(work)[0]:
        begin = min(float(trip.begin[0]), latest)  # one that is late by then will begin
        yield _Event(begin, False, asked, node, given, trip)
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


def _count(seen: _Open, event: _Event, why: str | None, work: Work) -> None:
    _spend(seen, event.trip, work)
    if why is not None:
        seen.dropped[why] += 1
        if event.trip.charged(work)[0]:
            seen.unused.append((event.node, event.given))


def _stop(
    seen: _Open, busy: Iterable[_Event], training: set[int], close: float, work: Work
) -> None:
    """Count those that are busy when the run ends, at `close`: their updates are not used."""
    for event in busy:
        _spend(seen, event.trip, work)
        seen.dropped.update(reasons(event.trip, _NOBODY, close, work.deadline))
        if event.trip.charged(work)[0]:
            seen.unused.append((event.node, event.given))
            if event.node not in training:
                seen.began.append((event.node, event.given))


def _spend(seen: _Open, trip: Trips, work: Work) -> None:
    down, up = trip.sent(work)
    seen.energy += float(trip.energy(work)[0])
    seen.bytes_down += int(down[0])
    seen.bytes_up += int(up[0])


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
