"""The virtual clock: what becomes of devices that are asked, in virtual seconds.

A device that is asked downloads the model, trains, and uploads its update:

    start -- latency, bytes / rate --> arrived -- start-up --> begin -- steps --> trained
    trained -- latency, bytes / rate --> finish

It is *charged* when it begins to train. On the way it may be lost, at a uniform point of its trip,
with its class's probability of dropping out, or when it ceases to be available. One whose memory
does not hold the training answers so when it has the model.

A round that closes withdraws no order, as on real devices: whoever has the model by the deadline
trains to the end. At the deadline an order that was not fetched is void, and no update is taken any
more.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reticent.server.fleet import DROPPED, LATE, LEFT, SMALL, SURPLUS

from .availability import Presence
from .devices import Clients, Description, Floats, Traits

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Work:
    """What a round asks of one device: public constants of the run.

    Attributes:
        bytes_down: Size of the model.
        bytes_up: Size of an update.
        steps: Training steps.
        deadline: Seconds after which the server waits no longer.
        constants: Size of the constants, which come with a device's first model.
    """

    bytes_down: int
    bytes_up: int
    steps: int
    deadline: float
    constants: int = 0

    @property
    def text(self) -> str:
        """The sizes, for the identity of a fleet."""
        more = f" and {self.constants} at first" if self.constants else ""
        return f"{self.bytes_down} bytes down{more}, {self.bytes_up} bytes up"


@dataclass(frozen=True)
class Trips:
    """What becomes of some devices if nobody stops them, one value a device.

    Attributes:
        start: When all of them are asked.
        bytes_down: What each is sent.
        arrived: When each has the model.
        begin: When it begins to train, unless ``fits`` is false.
        trained: When it has trained.
        finish: When the server has its update.
        lost: When it drops out or leaves; infinity if it does not before ``finish``.
        left: Whether it is lost because it leaves.
        traits: Its figures.
    """

    start: float
    bytes_down: NDArray[np.int64]
    arrived: Floats
    begin: Floats
    trained: Floats
    finish: Floats
    lost: Floats
    left: Flags
    traits: Traits

    def answered(self) -> Flags:
        """Return who sends an update, if the server waits for it."""
        return self.traits.fits & np.isinf(self.lost)

    def declined(self) -> Flags:
        """Return who answers that its memory does not hold the training."""
        return ~self.traits.fits & (self.lost > self.arrived)

    def charged(self, work: Work) -> Flags:
        """Return who trains: has the model in time, whenever the round closes, and is not lost."""
        return self._has_order(work) & (self.begin < self.lost)

    def energy(self, work: Work) -> Floats:
        """Return the joules of each device until its end."""
        traits, stop = self.traits, np.minimum(self.lost, self.start + work.deadline)
        radio = np.minimum(self.arrived, stop) - self.start
        sending = np.clip(np.minimum(self.finish, stop) - self.trained, 0, None)
        computing = np.clip(np.minimum(self.trained, self.lost) - self.arrived, 0, None)
        has = self._has_order(work)
        radio, computing = radio + np.where(has, sending, 0), np.where(has, computing, 0)
        return radio * traits.radio_watts + computing * traits.compute_watts

    def sent(self, work: Work) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the bytes that went down to, and up from, each device until its end."""
        latency, stop = self.traits.latency, np.minimum(self.lost, self.start + work.deadline)
        down = _part(stop, self.start + latency, self.arrived, self.bytes_down)
        up = _part(stop, self.trained + latency, self.finish, work.bytes_up)
        return down, np.where(self._has_order(work), up, 0)

    def _has_order(self, work: Work) -> Flags:
        """Return whose memory holds the training, and who has the model before the deadline."""
        return self.traits.fits & (self.arrived <= self.start + work.deadline)


def trips(
    description: Description,
    presence: Presence,
    work: Work,
    clients: Clients,
    start: float,
    path: tuple[int, int],
    first: Flags,
) -> Trips:
    """Return the trips of ``clients`` asked at ``start``; ``path`` names this round's coins.

    To those that are asked for the ``first`` time the constants are sent, too.
    """
    traits = description.traits(clients)
    jitter = description.factors(clients, description.fleet.jitter, "jitter", *path)
    fleet = description.fleet
    bytes_down = work.bytes_down + work.constants * first.astype(np.int64)
    arrived = start + traits.latency + bytes_down / traits.down
    begin = arrived + fleet.startup * (traits.slowdown * jitter)
    trained = begin + work.steps * fleet.step_seconds * (traits.step_slowdown * jitter)
    finish = trained + traits.latency + work.bytes_up / traits.up
    drops = description.coins(clients, "drop", *path) < traits.dropout
    where = start + (finish - start) * description.coins(clients, "when", *path)
    dropped = np.where(drops, where, np.inf)
    end = np.where(traits.fits, finish, arrived)
    leaves = presence.leaves(clients, start, float(end.max(initial=start)))
    lost = np.minimum(dropped, leaves)
    lost = np.where(lost < end, lost, np.inf)
    left = leaves <= dropped
    return Trips(start, bytes_down, arrived, begin, trained, finish, lost, left, traits)


def closing(found: Trips, want: int, deadline: float) -> tuple[float, NDArray[np.int64]]:
    """Return when the server closes a round, and the positions of the updates that it uses.

    It closes at the earliest of: ``want`` updates have come; every device has answered, with an
    update or a refusal; the deadline. It does not learn that a device was lost. Of updates that
    come at once it takes those asked first. A round in which nobody is asked lasts until the
    deadline: if it took no time, all that follow would find the same devices awake.
    """
    latest = found.start + deadline
    answered = found.answered() & (found.finish <= latest)
    order = np.argsort(found.finish, kind="stable")
    used = order[answered[order]][:want]
    if len(used) == want and want:
        return float(found.finish[used[-1]]), used
    declined = found.declined() & (found.arrived <= latest)
    if not len(found.begin) or int(answered.sum() + declined.sum()) < len(found.begin):
        return latest, used
    ends = np.where(found.traits.fits, found.finish, found.arrived)
    return float(ends.max()), used


def reasons(found: Trips, used: NDArray[np.int64], close: float, deadline: float) -> Counter[str]:
    """Return why the updates of all others are not used, each device once."""
    rest = np.ones(len(found.begin), dtype=bool)
    rest[used] = False
    lost = rest & (found.lost < close)
    small = rest & ~lost & found.declined() & (found.arrived <= close)
    other = rest & ~lost & ~small
    late = LATE if close >= found.start + deadline else SURPLUS
    counts = {
        LEFT: int((lost & found.left).sum()),
        DROPPED: int((lost & ~found.left).sum()),
        SMALL: int(small.sum()),
        late: int(other.sum()),
    }
    return Counter({reason: count for reason, count in counts.items() if count})


def _part(
    stop: Floats, begin: Floats, end: Floats, size: int | NDArray[np.int64]
) -> NDArray[np.int64]:
    share = np.clip((stop - begin) / np.maximum(end - begin, 1e-300), 0, 1)
    return np.floor(share * size).astype(np.int64)
