"""A team of worker processes on this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess
from types import TracebackType

from reticent.client.family import end_with_parent
from reticent.core.errors import NetworkError

from .devices import Devices
from .player import Player
from .teams import Backlog, Task
from .workers import WINDOW

_GRACE = 10.0  # seconds


@dataclass
class _Worker:
    """A process, our end of its pipe, and the work that it has."""

    process: BaseProcess
    pipe: Connection
    work: bytes = field(default=b"")
    greeted: bool = False

    def greet(self, wait: bool) -> bool:
        """Return whether it has imported everything; EOFError or OSError if it has ended before."""
        if not self.greeted and (wait or self.pipe.poll()):
            self.pipe.recv_bytes()
            self.greeted = True
        return self.greeted

    def give(self, task: Task) -> None:
        """Send a task, and its work unless the worker has that; OSError or EOFError if it is gone.

        Waits until the worker is ready.
        """
        self.greet(wait=True)
        work, share = task
        if self.work is not work:
            self.pipe.send_bytes(b"")
            self.pipe.send_bytes(work)
            self.work = work
        self.pipe.send_bytes(share)

    def bury(self) -> str:
        """End the process for good, and say how it ended."""
        self.pipe.close()
        self.process.join(timeout=1.0)
        self.process.kill()
        self.process.join()
        return f"with exit code {self.process.exitcode}"


class Processes:
    """A :class:`.Team` of processes with one thread each.

    One that is killed is started anew, and what it was playing is played again. If this process is
    killed, or the thread ends that started them, they are killed too, whatever they play.
    """

    def __init__(
        self, devices: Devices, plan_json: str, size: int, say: Callable[[str], None]
    ) -> None:
        """Start ``size`` processes; they import while the server prepares.

        ``say`` gets a line for each that is lost.

        Raises:
            NetworkError: If one cannot be started; those that were are ended.
        """
        self._about = devices, plan_json
        self._context = multiprocessing.get_context("spawn")
        self._backlog = Backlog(size, say)
        self._workers: list[_Worker] = []
        try:
            for _ in range(size):
                self._workers.append(_start(self._context, devices, plan_json))
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.pipe.close()
            if error is not None:
                worker.process.terminate()
        for worker in self._workers:
            worker.process.join(timeout=_GRACE)

    @property
    def size(self) -> int:
        """How many processes there are."""
        return len(self._workers)

    @property
    def window(self) -> int:
        """How many clients to deal at a time."""
        return WINDOW * self.size

    def ready(self) -> bool:
        """Return whether all processes have imported everything, and can begin at once.

        Raises:
            NetworkError: If one has ended instead, telling how.
        """
        for worker in self._workers:
            try:
                if not worker.greet(wait=False):
                    return False
            except (EOFError, OSError):
                raise NetworkError(f"a worker ended {worker.bury()} before it began") from None
        return True

    @property
    def pids(self) -> list[int]:
        """Their process ids."""
        return [worker.process.pid or 0 for worker in self._workers]

    def play(self, tasks: Iterable[Task]) -> Iterator[bytes]:
        """Yield the partial sum of each task, in the order in which they are done.

        Raises:
            NetworkError: If processes keep ending and nothing is done, or none can be started.
        """
        self._backlog.begin(tasks)
        busy: dict[Connection, tuple[int, Task]] = {}
        idle = list(range(self.size))
        while True:
            while idle and (task := self._backlog.next()):
                index = idle.pop()
                try:
                    self._workers[index].give(task)
                except (EOFError, OSError):
                    self._replace(index, task)
                    idle.append(index)
                else:
                    busy[self._workers[index].pipe] = index, task
            if not busy:
                return
            for pipe in wait(list(busy)):
                index, task = busy.pop(pipe)  # type: ignore[arg-type]
                idle.append(index)
                try:
                    part = pipe.recv_bytes()  # type: ignore[union-attr]
                except (EOFError, OSError):
                    self._replace(index, task)
                else:
                    self._backlog.done()
                    yield part

    def _replace(self, index: int, task: Task) -> None:
        self._backlog.lost(task, self._workers[index].bury())
        self._workers[index] = _start(self._context, *self._about)


def _start(context: SpawnContext, devices: Devices, plan_json: str) -> _Worker:
    # Ctrl-C is for the process that the user started, which then ends the workers. They inherit the
    # mask, so that it holds from their first instruction on.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        ours, theirs = context.Pipe()
        with theirs:
            process = context.Process(target=_work, args=(theirs, devices, plan_json), daemon=True)
            process.start()
    except OSError as error:  # as many processes or open files as are allowed, or no memory
        raise NetworkError(f"a worker process cannot be started: {error}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return _Worker(process, ours)


def _work(pipe: Connection, devices: Devices, plan_json: str) -> None:
    # A pipe that nobody reads any more tells only who looks at it, which is after a whole share.
    end_with_parent(signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid != os.getppid():
        return  # it was killed before
    player = Player(devices, plan_json)
    try:
        pipe.send_bytes(b"")  # ready
        while True:
            share = pipe.recv_bytes()
            if share:
                pipe.send_bytes(player.play(share))
            else:
                player.begin(pipe.recv_bytes())
    except (EOFError, OSError):
        return  # the run ended, or was killed: nobody is listening
