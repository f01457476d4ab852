"""A network that fails all the time: faults and flapping devices, from a seed.

A :class:`Storm` is a thread over the proxies of a federation's devices (:mod:`faulty_network`), and
:func:`replay` is what must have come out: the same plan in a simulation in which each round has the
updates of just those devices that took part in it.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from faulty_network import KINDS, Proxy
from flwr.app import Message
from flwr.serverapp import Grid

from reticent.core.plan import Plan
from reticent.core.run import create_run
from reticent.server.app import build_server_app
from reticent.server.nodes import Nodes
from reticent.simulations import simulate as engine
from reticent.simulations.devices import devices_for
from reticent.simulations.grid import client_of


@dataclass(frozen=True)
class Gust:
    """One fault: after which committed round, how long after it, at which device, of which kind."""

    round: int
    delay: float
    device: int
    kind: str


def gusts(seed: int, faults: int, rounds: int, devices: int, span: float) -> list[Gust]:
    """Return ``faults`` faults, as many of each kind, spread over all rounds but the last."""
    draw = random.Random(seed)
    kinds = [KINDS[n % len(KINDS)] for n in range(faults)]
    draw.shuffle(kinds)
    due = [n * max(1, rounds - 1) // faults for n in range(faults)]
    return [
        Gust(number, span * draw.random(), draw.randrange(devices), kind)
        for number, kind in zip(due, kinds, strict=True)
    ]


class Storm(threading.Thread):
    """Injects ``plan``, and takes the network from ``flapping`` devices again and again.

    A flapping device has a network for U(0, ``up``) seconds, then none for U(0, ``off``).
    """

    def __init__(
        self,
        plan: Sequence[Gust],
        proxies: Sequence[Proxy],
        flapping: Sequence[int],
        committed: Callable[[], int],
        seed: int = 0,
        up: float = 60.0,
        off: float = 20.0,
    ) -> None:
        super().__init__(daemon=True)
        self._plan, self._proxies, self._committed = plan, proxies, committed
        self._over = threading.Event()
        self._flaps = [
            threading.Thread(target=self._flap, args=(i, random.Random(f"{seed} {i}"), up, off))
            for i in flapping
        ]
        self.flaps = 0
        self.injected = 0

    def run(self) -> None:
        for thread in self._flaps:
            thread.start()
        for gust in self._plan:
            while self._committed() < gust.round and not self._over.wait(0.05):
                pass
            if self._over.wait(gust.delay):
                break
            self._proxies[gust.device].inject(gust.kind)
            self.injected += 1
        for thread in self._flaps:
            thread.join()

    def end(self) -> None:
        """Let the network be as it should."""
        self._over.set()
        self.join()

    def _flap(self, device: int, draw: random.Random, up: float, off: float) -> None:
        while not self._over.wait(up * draw.random()):
            self._proxies[device].down(True)
            self.flaps += 1
            self._over.wait(off * draw.random())
            self._proxies[device].down(False)


def replay(plan: Plan, folder: Path, rounds: Sequence[set[int]]) -> str:
    """Return the digest of the model when just ``rounds[i]``, clients, reply in round ``i + 1``."""

    def gather(
        grid: Grid,
        messages: Iterable[Message],
        timeout: float,
        closed: Callable[[], bool],
        largest: int,
    ) -> Iterable[Message]:
        wanted = [
            message
            for message in messages
            if client_of(message.metadata.dst_node_id) in rounds[int(message.metadata.group_id) - 1]
        ]
        return grid.send_and_receive(wanted, timeout=timeout)

    run = create_run(folder, plan)
    devices = devices_for(plan, run.ledger)
    settings = lambda _: replace(  # noqa: E731
        engine._settings(run, plan, devices, print, lambda _: None, None), nodes=Nodes(gather)
    )
    engine._serve(build_server_app(settings), plan, devices, print, plan.federation.rounds)
    return run.read_summary()["model"]
