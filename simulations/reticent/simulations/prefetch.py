"""Loading the examples of the next clients in one thread, while the present ones are trained."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from queue import SimpleQueue
from threading import Event, Thread
from weakref import finalize

import torch

from reticent.core.tasks import Examples, Task

THREAD = "reticent-prefetch"
"""Name of the thread."""

_GRACE = 2.0  # seconds for the client at hand, after an error or Ctrl-C

_log = logging.getLogger("reticent.simulations")


@dataclass(frozen=True, eq=False)
class _Job:
    """Clients to load.

    Attributes:
        task: Whose they are.
        clients: Their indices.
        threads: What torch may use, as where clients are trained: a thread begins with its own.
        found: What the task returned, None where it raised; the thread's until ``done``.
        dropped: Nobody wants the clients that are left.
        done: The thread is outside the task for good.
    """

    task: Task
    clients: tuple[int, ...]
    threads: int
    found: dict[int, Examples | None] = field(default_factory=dict[int, Examples | None])
    dropped: Event = field(default_factory=Event)
    done: Event = field(default_factory=Event)

    def run(self) -> None:
        """Load, and raise nothing."""
        try:
            torch.set_num_threads(self.threads)
            for client in self.clients:
                if self.dropped.is_set():
                    return
                self.found[client] = _asked(self.task, client)
        finally:
            self.done.set()


def _asked(task: Task, client: int) -> Examples | None:
    try:
        return task.client(client)
    except BaseException:  # the thread that trains asks again, and raises what it is told then
        return None


class Prefetch:
    """An :class:`~reticent.client.environment.Ahead` for blocks of clients that take turns.

    Guarantees:

    - A client's examples are what the task returns, and its error is what the task raises to the
      thread that trains: it asks again wherever the other thread was told an error.
    - One thread is inside the task at a time: this class's from :meth:`start` to the next call of
      any other method, each of which waits for it, and else only while :meth:`take` waits. After
      an error or Ctrl-C :meth:`rest` waits no longer than two seconds, lest storage that hangs
      keep the process; whatever comes then waits.
    - Only examples of the present block and the next one are held.

    The thread loads all clients, also those that are not loaded ahead, so that a connection which a
    task opens for its first client belongs to the thread that uses it. Where the thread is told an
    error and the other one is not, as with a connection of the thread that made the task, the task
    does not bear a second thread: from then on it is not asked in it, which is said once.
    """

    def __init__(self) -> None:
        """Begin without a thread; the first client starts it."""
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread: Thread | None = None
        self._end = finalize(self, self._jobs.put, None)
        self._latest: _Job | None = None
        self._here: _Job | None = None
        self._ahead: _Job | None = None
        self._next: tuple[int, ...] = ()
        self._suits = True

    def turn(self, clients: Iterable[int]) -> None:
        """Begin a block; ``clients`` are those of the next one whose rounds are charged."""
        self.wait()
        self._here, self._ahead, self._next = self._ahead, None, tuple(clients)

    def start(self, task: Task) -> None:
        """Begin to load the next block's clients: the present ones are about to be trained."""
        if self._next and self._suits:
            self._ahead, self._next = self._begin(task, self._next), ()

    def take(self, task: Task, client: int) -> Examples:
        """Return, and forget, what ``task.client(client)`` returns.

        Raises:
            Exception: What that raises.
        """
        self.wait()
        if not self._suits:
            return task.client(client)
        job = self._here
        if job is None or job.task is not task or client not in job.found:
            job = self._begin(task, (client,))
            self.wait()
        examples = job.found.pop(client)
        if examples is None:
            examples = task.client(client)
            self._suits = False
            _say(task.name)
        return examples

    def wait(self) -> None:
        """Wait until the thread is outside the task."""
        if self._latest is not None:
            self._latest.done.wait()

    def rest(self) -> None:
        """Forget everything that is loaded, or was to be."""
        self._next, self._here, self._ahead = (), None, None
        if self._latest is not None:
            self._latest.dropped.set()
            if self._latest.done.wait(_GRACE):
                self._latest = None

    def close(self) -> None:
        """End the thread; one that hangs in the task ends with the process."""
        self.rest()
        if self._thread is not None:
            self._end()
            if self._latest is None:
                self._thread.join()
            self._thread = None

    def _begin(self, task: Task, clients: tuple[int, ...]) -> _Job:
        if self._thread is None:
            self._jobs = SimpleQueue()
            self._end = finalize(self, self._jobs.put, None)  # also if nobody calls `close`
            self._thread = Thread(target=_work, args=(self._jobs,), name=THREAD, daemon=True)
            self._thread.start()
        self._latest = _Job(task, clients, torch.get_num_threads())
        self._jobs.put(self._latest)
        return self._latest


def _work(jobs: SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        job.run()
        del job  # or its examples are held until the next one comes


@cache
def _say(task: str) -> None:
    """Say once in a process that nothing is loaded ahead."""
    _log.warning(
        "task %s: loading a client failed in a second thread and succeeded in the first; from now "
        "on clients' data are loaded in their turn, as with engine.prefetch=false",
        task,
    )
