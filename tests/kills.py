"""Killing a federation's processes at random moments, from a seed.

A :class:`Killer` is a thread that goes through its :class:`Point` s: each is due when a round is
open, waits a random time, and then sends SIGKILL to whatever its target's process is at that
moment. Nothing is told to the victims, and nobody waits until they have recovered.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import loopback
from federations import Operation, start_agent, superlinks

from reticent.server.attempt import read_attempt

SERVER = ("ServerApp", "SuperLink")
DEVICE = ("device", "SuperNode", "SuperExec", "ClientApp")
_PROGRAMS = {
    "SuperNode": "flower-supernode",
    "SuperExec": "flower-superexec",
    "ClientApp": "flwr-clientapp",
}
_FIND_SECONDS = 90.0


@dataclass(frozen=True)
class Point:
    """When to kill what.

    Attributes:
        round: Due once the round before was committed.
        delay: Seconds to wait then, or after the kill before if that was later.
        target: One of :data:`SERVER` or :data:`DEVICE`.
        device: Index of the device, where one is meant.
    """

    round: int
    delay: float
    target: str
    device: int


@dataclass(frozen=True)
class Kill:
    """A kill that was done: seconds since the beginning, and the rounds committed by then."""

    point: Point
    at: float
    committed: int


def points(seed: int, kills: int, rounds: int, devices: int, span: float) -> list[Point]:
    """Return ``kills`` points over ``rounds``: a third each on ServerApp, SuperLink and devices.

    All are due before the last round is open; delays are uniform in [0, ``span``).
    """
    draw = random.Random(seed)
    kinds = [(*SERVER, DEVICE[n // 3 % len(DEVICE)])[n % 3] for n in range(kills)]
    draw.shuffle(kinds)
    due = [1 + n * max(1, rounds - 1) // kills for n in range(kills)]
    return [
        Point(number, span * draw.random(), kind, draw.randrange(devices))
        for number, kind in zip(due, kinds, strict=True)
    ]


class Killer(threading.Thread):
    """Kills at every point of ``plan``; :attr:`done` is what was killed, :attr:`missed` not."""

    def __init__(
        self,
        plan: Sequence[Point],
        operation: Operation,
        running: loopback.Deployment,
        names: tuple[str, ...],
        committed: Callable[[], int],
    ) -> None:
        super().__init__(daemon=True)
        self._plan, self._operation, self._running = plan, operation, running
        self._names, self._committed = names, committed
        self._over, self._began = threading.Event(), time.monotonic()
        self.done: list[Kill] = []
        self.missed: list[Point] = []

    def run(self) -> None:
        while read_attempt(self._operation.run) is None and not self._over.is_set():
            time.sleep(0.05)  # before that an operator sees at once what is wrong
        for point in self._plan:
            while self._committed() < point.round - 1 and not self._over.is_set():
                time.sleep(0.05)
            self._over.wait(point.delay)
            if self._over.is_set() or not self._kill(point):
                self.missed.append(point)

    def end(self) -> None:
        """Kill no more."""
        self._over.set()
        self.join()

    def _kill(self, point: Point) -> bool:
        deadline = time.monotonic() + _FIND_SECONDS
        while time.monotonic() < deadline and not self._over.is_set():
            victims = self._victims(point)
            if victims:
                committed = self._committed()
                for pid in victims:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                self.done.append(Kill(point, time.monotonic() - self._began, committed))
                if point.target == "device":
                    self._running.processes.running[self._names[point.device]].wait()
                    start_agent(self._running, self._names[point.device])
                return True
            time.sleep(0.05)
        return False

    def _victims(self, point: Point) -> list[int]:
        if point.target == "SuperLink":
            return superlinks(self._operation)
        if point.target == "ServerApp":
            attempt = read_attempt(self._operation.run)
            return [attempt.pid] if attempt is not None and attempt.alive() else []
        family = descendants(self._running.processes.running[self._names[point.device]].pid)
        if point.target == "device":
            return family
        return [pid for pid in family if _runs(pid, _PROGRAMS[point.target])]


def descendants(pid: int) -> list[int]:
    """Return a process and all that it started, those first that can start more."""
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in children.read_text().split():
                found += descendants(int(child))
    return found


def _runs(pid: int, program: str) -> bool:
    try:
        name = Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return False
    return name == program[:15]  # the kernel keeps no more
