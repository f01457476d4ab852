"""The simulated fleet: a description, its availability and the virtual clock, put together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reticent.server.fleet import Outcome, Release

from ..grid import client_of, node_of
from .availability import Presence, Trace
from .buffered import Deals, schedule
from .clock import Flags, Trips, Work, closing, reasons, trips
from .devices import Clients, Description

Charge = Callable[[str, int, float, Sequence[int]], Sequence[int]]
"""Charges a round of a run to clients, and returns those that could bear it."""


def granting(run: str, number: int, noise_multiplier: float, clients: Sequence[int]) -> list[int]:
    """Charge nothing and grant everything: for prices, which are about no ledger."""
    return list(clients)


@dataclass(frozen=True)
class SimulatedFleet:
    """Devices of a description, on a virtual clock.

    Guarantee: every answer but the charges is a function of the plan, the sizes and the arguments,
    so a run does not depend on workers, and a resumed one meets the same fleet.

    Attributes:
        description: The population.
        presence: When devices are there.
        work: What a round asks of a device.
        charging: Charges a round to devices, by client index.
        dealt: What a buffered run is dealt.
    """

    description: Description
    presence: Presence
    work: Work
    charging: Charge
    dealt: Deals

    @property
    def identity(self) -> str:
        """What the fleet was made from besides the plan."""
        trace = f", trace {self.presence.digest}" if isinstance(self.presence, Trace) else ""
        return f"{self.work.text}{trace}"

    def available(self, nodes: NDArray[np.int64], time: float) -> NDArray[np.bool_]:
        """Return which of ``nodes`` may be asked at ``time``."""
        return self.presence.there(_clients(nodes), time)

    def next_change(self, time: float) -> float:
        """Return the first time after ``time`` at which anyone may come, or infinity."""
        return self.presence.next_change(time)

    def ask(
        self,
        number: int,
        attempt: int,
        nodes: Sequence[int],
        time: float,
        want: int,
        first: Collection[int] = (),
    ) -> Outcome:
        """Return what asking ``nodes`` at ``time`` comes to, if ``want`` replies are enough."""
        asked = np.array(nodes, dtype=np.int64)
        new = np.array([node in first for node in nodes], dtype=bool)
        found = self.trips(_clients(asked), time, (number, attempt), new)
        close, used = closing(found, want, self.work.deadline)
        down, up = found.sent(self.work)
        charged = found.charged(self.work)
        charged[used] = False  # their own ClientApp charges them
        return Outcome(
            replied=tuple(sorted(asked[used].tolist())),
            charged=tuple(asked[charged].tolist()),
            dropped=reasons(found, used, close, self.work.deadline),
            ends=close,
            energy=float(found.energy(self.work).sum()),
            bytes_up=int(up.sum()),
            bytes_down=int(down.sum()),
        )

    def trips(
        self, clients: Clients, start: float, path: tuple[int, int], first: Flags | None = None
    ) -> Trips:
        """Return the trips of ``clients`` asked at ``start``, be it for the ``first`` time."""
        new = np.zeros(len(clients), dtype=bool) if first is None else first
        return trips(self.description, self.presence, self.work, clients, start, path, new)

    def releases(self, nodes: Sequence[int]) -> Iterator[Release]:
        """Yield the releases of a buffered run over ``nodes``, from the first."""
        asked = set[int]()

        def trip_of(node: int, time: float, model: int) -> Trips:
            new = np.array([node not in asked])
            asked.add(node)
            return self.trips(_clients(np.array([node])), time, (model + 1, 0), new)

        return schedule(
            self.dealt,
            self.dealt.stream(nodes),
            len(nodes),
            lambda some, time: self.available(some, time),
            self.presence.next_change,
            trip_of,
            self.work,
        )

    def charge(
        self, run: str, number: int, noise_multiplier: float, nodes: Sequence[int]
    ) -> Sequence[int]:
        """Charge a round to devices that begin to train, and return those that could bear it."""
        clients = [client_of(node) for node in nodes]
        return [node_of(client) for client in self.charging(run, number, noise_multiplier, clients)]


def _clients(nodes: NDArray[np.int64]) -> Clients:
    return nodes - node_of(0)
