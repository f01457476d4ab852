"""Tasks that tell which threads load their clients; worker processes import them by name."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from test_cohort import SmallTask
from torch import nn
from torch.nn import functional as F

from reticent.core.tasks import Examples

LOADS = "RETICENT_TEST_LOADS"
"""Names the file of :class:`Telling`."""


@dataclass
class Diary:
    """What was seen of the tasks of this process since the test began."""

    hook: Callable[[int], None] = lambda _: None
    loads: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    inside: threading.Lock = field(default_factory=threading.Lock)
    overlaps: int = 0

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Count who comes while another is inside."""
        mine = self.inside.acquire(blocking=False)
        self.overlaps += not mine
        try:
            yield
        finally:
            if mine:
                self.inside.release()

    def clients(self, thread: str) -> list[int]:
        """Return the clients that a thread loaded, in order."""
        return [index for index, name in self.loads if name == thread]


DIARY = Diary()


class Watched(SmallTask):
    """Writes its clients down, and does as the test at hand says before it loads one."""

    def client(self, index: int) -> Examples:
        DIARY.loads.append((index, threading.current_thread().name))
        with DIARY.alone():
            DIARY.hook(index)
            return super().client(index)

    def student(self, model: str) -> nn.Module:
        with DIARY.alone():
            return super().student(model)


class Bound(Watched):
    """Has a connection that serves the thread that opened it, and no other."""

    def __init__(self, *, early: bool) -> None:
        super().__init__()
        self._connection: sqlite3.Connection | None = None
        if early:
            self._query()

    def client(self, index: int) -> Examples:
        DIARY.loads.append((index, threading.current_thread().name))
        with DIARY.alone():
            DIARY.hook(index)
            self._query()  # first, as one asks a database what it has
            return SmallTask.client(self, index)

    def _query(self) -> None:
        if self._connection is None:
            self._connection = sqlite3.connect(":memory:")
        self._connection.execute("SELECT 1").fetchone()


class Telling(SmallTask):
    """Writes into a file which threads load its clients, in whatever process."""

    def client(self, index: int) -> Examples:
        with Path(os.environ[LOADS]).open("a", encoding="utf-8") as file:
            file.write(threading.current_thread().name + "\n")
        return super().client(index)


class Joined(nn.Sequential):
    """No plain chain, as nobody knows what it does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore
        return super().forward(1 * x)


class Drawing(nn.Sequential):
    """Draws in training."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore
        return super().forward(F.dropout(x, 0.5, self.training))


class Odd(Watched):
    """Has a student of another kind."""

    def __init__(self, kind: type[nn.Sequential]) -> None:
        super().__init__()
        self._kind = kind

    def student(self, model: str) -> nn.Module:
        layers = super().student(model)
        assert isinstance(layers, nn.Sequential)
        return self._kind(*layers)


def joined(section: object, seed: int) -> Odd:
    return Odd(Joined)


def drawing(section: object, seed: int) -> Odd:
    return Odd(Drawing)


def watched(section: object, seed: int) -> Watched:
    return Watched()


def bound_early(section: object, seed: int) -> Bound:
    return Bound(early=True)


def bound_late(section: object, seed: int) -> Bound:
    return Bound(early=False)


def telling(section: object, seed: int) -> Telling:
    return Telling()
