"""What the server asks of a simulated fleet: who is there, who answers in time, and at what cost.

The fleet itself is :mod:`reticent.simulations.fleet`; on a real federation there is none. Its clock
is virtual: nothing here waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from reticent.core.plan import Federation

DROPPED = "the client gave no reply (it dropped out)"
LEFT = "the client gave no reply (it was no longer available)"
LATE = "the client gave no reply (it missed the deadline)"
SURPLUS = "the client gave no reply (enough others were faster)"
SMALL = "the client gave no reply (its memory does not hold the training)"
STALE = "the client gave no reply (its model was too old)"


@dataclass(frozen=True)
class Outcome:
    """What asking some devices comes to, decided by public figures and coins before any trains.

    Attributes:
        replied: The nodes whose update arrives in time to be used.
        charged: The nodes that train, be it after the round has closed, and so are charged, but
            whose update is not used.
        dropped: Devices whose update is not used, by reason.
        ends: Virtual time at which the server has what it waited for, seconds since the run began.
        energy: Joules of all devices asked: a proxy, see docs/fleet.md.
        bytes_up: Bytes sent up, those in vain included.
        bytes_down: Bytes sent down, those in vain included.
    """

    replied: tuple[int, ...]
    charged: tuple[int, ...]
    dropped: Counter[str]
    ends: float
    energy: float
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True)
class Release:
    """One filled buffer of a semi-asynchronous run.

    Attributes:
        number: Number of the release, from 1: the round in which it is committed.
        used: The nodes whose updates fill the buffer, each with the number of releases before the
            model that it was given.
        started: Nodes that were asked since the last release.
        began: Those that began to train since then, and so were charged, each with the number of
            its model; with the last release of a run also those that will begin.
        dropped: Devices whose update was lost since then, by reason; with the last release of a run
            also those that are still busy.
        unused: Those of them that train, and so are charged, each with the number of
            its model.
        ends: Virtual time of the release.
        energy: Joules of the devices in ``used`` and ``dropped``.
        bytes_up: Bytes that they sent up.
        bytes_down: Bytes that they were sent.
    """

    number: int
    used: tuple[tuple[int, int], ...]
    started: tuple[int, ...]
    began: tuple[tuple[int, int], ...]
    dropped: Counter[str]
    unused: tuple[tuple[int, int], ...]
    ends: float
    energy: float
    bytes_up: int
    bytes_down: int


class Fleet(Protocol):
    """A simulated fleet. Every answer is a function of the plan and the arguments alone."""

    @property
    def identity(self) -> str:
        """What it was made from besides the plan, as text: a run has one fleet."""
        ...

    def available(self, nodes: NDArray[np.int64], time: float) -> NDArray[np.bool_]:
        """Return which of ``nodes`` may be asked at virtual time ``time``."""
        ...

    def next_change(self, time: float) -> float:
        """Return the first time after ``time`` at which availability may change, or infinity."""
        ...

    def ask(
        self,
        number: int,
        attempt: int,
        nodes: Sequence[int],
        time: float,
        want: int,
        first: Collection[int] = (),
    ) -> Outcome:
        """Return what asking ``nodes`` at ``time`` comes to, if ``want`` replies are enough.

        To those in ``first``, who were asked in no round before, the constants are sent, too.
        """
        ...

    def releases(self, nodes: Sequence[int]) -> Iterator[Release]:
        """Yield the releases of a buffered run over ``nodes``, from the first."""
        ...

    def charge(
        self, run: str, number: int, noise_multiplier: float, nodes: Sequence[int]
    ) -> Sequence[int]:
        """Charge a round to devices that begin to train, whatever becomes of their updates.

        Returns:
            The nodes that could bear it. A round that was charged is not charged again.
        """
        ...


@dataclass
class Virtual:
    """What a round costs on the fleet.

    Attributes:
        ends: Virtual time at its end.
        energy: Joules.
        bytes_up: Bytes sent up.
        bytes_down: Bytes sent down.
        unused: Devices that were charged and whose update is not used.
        stale: With buffered aggregation, the most that a used update was behind.
    """

    ends: float = 0.0
    energy: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    unused: int = 0
    stale: int | None = None
    began: float = field(default=0.0, repr=False)

    def add(self, part: Outcome | Release) -> None:
        """Count what one asking, or one release, came to."""
        self.ends = part.ends
        self.energy += part.energy
        self.bytes_up += part.bytes_up
        self.bytes_down += part.bytes_down

    def figures(self) -> dict[str, Any]:
        """Return the figures for the metrics of the round."""
        figures = {
            "time": self.ends,  # exact: a resumed run goes on from it
            "seconds": round(self.ends - self.began, 3),
            "energy": round(self.energy, 3),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "charged_unused": self.unused,
        }
        return figures if self.stale is None else figures | {"stalest": self.stale}


def once_back(
    fleet: Fleet, federation: Federation, left: Sequence[int], accepted: int, now: float
) -> float:
    """Return when a round is asked again, of which ``accepted`` updates came by ``now``.

    As a real server does (:func:`.waiting.wait_for_return`), once so many of those ``left`` are
    there that a quorum can answer, and after ``federation.timeout`` virtual seconds at the latest.
    """
    latest, nodes = now + federation.timeout, np.array(left, dtype=np.int64)
    while now < latest and accepted + fleet.available(nodes, now).sum() < federation.quorum:
        now = min(fleet.next_change(now), latest)
    return now


LEVELS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99)
"""Test accuracies whose time is stated."""


def fleet_summary(metrics: Sequence[dict[str, Any]], start: float) -> dict[str, Any]:
    """Return what a run took on its fleet, and after how long it first reached each accuracy.

    Accuracies are those of the rounds that were tested, so a time to accuracy is known to within
    ``eval_every`` rounds, from above. What the model had before any round, ``start`` (nan if that
    is not known), was reached after 0 s.
    """
    virtual = [line["virtual"] for line in metrics]
    dropped = sum((Counter(line["dropped"]) for line in metrics), Counter[str]())
    tested = [(start, 0.0)]
    tested += [(m["accuracy"], m["virtual"]["time"]) for m in metrics if m["accuracy"] is not None]
    reached = {
        f"{level:.0%}": min(time for accuracy, time in tested if accuracy >= level)
        for level in LEVELS
        if any(accuracy >= level for accuracy, _ in tested)
    }
    return {
        "seconds": virtual[-1]["time"],
        **{key: sum(v[key] for v in virtual) for key in ("energy", "bytes_up", "bytes_down")},
        "charged_unused": sum(v["charged_unused"] for v in virtual),
        "dropped": dict(dropped),
        "seconds_to_accuracy": reached,
    }
