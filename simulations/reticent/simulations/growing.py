"""A team that begins as this process and becomes several if a measurement says that it pays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from time import perf_counter

import torch

from reticent.core.errors import NetworkError
from reticent.core.plan import Plan

from .devices import Devices
from .packets import clients_in
from .player import Player
from .processes import Processes
from .teams import Task
from .workers import BLOCK, WINDOW

START = 5.0
"""Seconds of work that processes must save, as many as it takes to start them: they import torch
and Flower anew (4 s on a virtual x86-64 core)."""


class GrowingTeam:
    """A :class:`.Team` for ``engine.workers = "auto"``.

    The first shares are played here, on one thread, and all that are a block or more are timed but
    the first of them, in which data, models and methods are new. If the clients that are left, at
    the best pace that was measured, take so long that more processes would save :data:`START`,
    these are started, and shares are played here until all are there. If one of them ends instead,
    or cannot be started, there will be no others. Where shares are played changes no result
    (:class:`.TeamGrid`), so neither does a measurement.
    """

    def __init__(
        self,
        devices: Devices,
        plan_json: str,
        plan: Plan,
        most: int,
        rounds: int,
        say: Callable[[str], None],
    ) -> None:
        """Begin alone.

        Args:
            devices: The simulated devices.
            plan_json: The plan, as workers get it.
            plan: The plan.
            most: Processes to become.
            rounds: How many are left of the run.
            say: Gets a line when the team grows, or cannot.
        """
        self._about, self._most, self._say = (devices, plan_json), most, say
        self._left = rounds * plan.federation.clients_per_round
        self._warm = False
        self._pace = float("inf")
        self._player: Player | None = None
        self._work = b""
        self._others: Processes | None = None
        self._grown = False
        self._open = ExitStack()

    def __enter__(self) -> GrowingTeam:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.__exit__(*error)  # type: ignore[arg-type]

    @property
    def size(self) -> int:
        """How many workers there are."""
        others = self._team()
        return others.size if others else 1

    @property
    def window(self) -> int:
        """How many clients to deal at a time: few until the pace is known."""
        if self._pace == float("inf"):
            return 2 * BLOCK
        waiting = self._team() is None and self._others is not None
        return 4 * BLOCK if waiting else WINDOW * self.size

    def play(self, tasks: Iterable[Task]) -> Iterator[bytes]:
        """Yield the partial sum of each task, here until there are others."""
        pending = iter(tasks)
        while (others := self._team()) is None:
            task = next(pending, None)
            if task is None:
                return
            with _one_thread():
                player = self._prepared(task[0])
                begun = perf_counter()
                part = player.play(task[1])
                seconds = perf_counter() - begun
            self._consider(clients_in(task[1]), seconds)
            yield part
        self._player = None
        yield from others.play(pending)

    def _team(self) -> Processes | None:
        """Return the others once all can begin: from then on they play."""
        if self._others is None or self._grown:
            return self._others
        try:
            self._grown = self._others.ready()
        except NetworkError as error:
            self._open.__exit__(type(error), error, None)  # ends those that are still starting
            self._stay_alone(error)
        return self._others if self._grown else None

    def _stay_alone(self, error: NetworkError) -> None:
        self._say(f"{error}; clients go on being trained in this process")
        self._others, self._most = None, 1

    def _prepared(self, work: bytes) -> Player:
        if self._player is None:
            self._player = Player(*self._about)
        if self._work is not work:
            self._player.begin(work)
            self._work = work
        return self._player

    def _consider(self, clients: int, seconds: float) -> None:
        """Note a share that was played; start the others if that saves time."""
        self._left = max(0, self._left - clients)
        if clients < BLOCK:
            return  # the end of a cohort, whose clients take longer each, or which is new again
        if not self._warm:
            self._warm = True
            return
        self._pace = min(self._pace, seconds / clients)
        if self._others is None and saved(self._left, self._pace, self._most) > START:
            self._say(
                f"{self._most} worker processes of one thread each: one would take another "
                f"{self._left * self._pace:.0f} s"
            )
            try:
                team = Processes(*self._about, self._most, self._say)
            except NetworkError as error:
                self._stay_alone(error)
            else:
                self._others = self._open.enter_context(team)


def saved(clients: int, pace: float, workers: int) -> float:
    """Return the seconds that ``workers`` save of ``pace`` seconds for each client, started."""
    return clients * pace * (1 - 1 / workers)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
