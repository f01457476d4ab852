"""Loading the examples of the next clients in one thread, while the present ones are trained."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from queue import SimpleQueue
from threading import Event, Thread

import torch

from reticent.core.errors import DataError
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
        found: What the task returned, or said of the data; None where it raised anything else. The
            thread's until ``done``.
        dropped: Nobody wants the clients that are left.
        done: The thread is outside the task for good.
    """

    task: Task
    clients: tuple[int, ...]
    threads: int
    found: dict[int, Examples | DataError | None] = field(
        default_factory=dict[int, Examples | DataError | None]
    )
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


def _asked(task: Task, client: int) -> Examples | DataError | None:
    try:
        return task.client(client)
    except DataError as error:
        return error
    except BaseException:  # the thread that trains asks again, and raises what it is told then
        return None


class Prefetch:
    """An :class:`~reticent.client.environment.Ahead` for blocks of clients that take turns.

    Guarantees:

    - A client's examples are what the task returns, and its error is what the task raises: a
      :class:`DataError` in either thread, anything else to the thread that trains, which asks
      again where the other one met it.
    - One thread is inside the task at a time: this class's from :meth:`start` to the next call of
      any other method, each of which waits for it, and else only while :meth:`take` waits. After
      an error or Ctrl-C :meth:`rest` waits no longer than two seconds, lest storage that hangs
      keep the process; whatever comes then waits.
    - Only examples of the present block and the next one are held.

    The thread is the process's, for all runs, and loads all clients, also those that are not loaded
    ahead: so a connection which a task opens for its first client belongs to the thread that uses
    it for as long as the task lives. Where it meets an error that the other one does not, as with a
    connection of the thread that made the task, the task does not bear a second thread: from then
    on it is not asked in it, which is said once.
    """

    def __init__(self) -> None:
        """Begin with nothing loaded."""
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
        found = job.found.pop(client)
        if isinstance(found, DataError):
            raise found
        if found is None:
            found = task.client(client)
            self._suits = False
            _say(task.name)
        return found

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
            else:
                _jobs.cache_clear()  # other runs do not wait for this one's storage

    def _begin(self, task: Task, clients: tuple[int, ...]) -> _Job:
        self._latest = _Job(task, clients, torch.get_num_threads())
        _jobs().put(self._latest)
        return self._latest


@cache
def _jobs() -> SimpleQueue[_Job]:
    """Return the queue of this process's thread, which starts now and ends with the process."""
    jobs: SimpleQueue[_Job] = SimpleQueue()
    Thread(target=_work, args=(jobs,), name=THREAD, daemon=True).start()
    return jobs


def _work(jobs: SimpleQueue[_Job]) -> None:
    while True:
        job = jobs.get()
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
