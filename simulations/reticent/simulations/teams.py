"""A cohort dealt to a team of workers: charged first, in whole blocks, played again if lost."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Protocol

from flwr.app import Message

from reticent.core.errors import DependencyError, NetworkError
from reticent.core.plan import Plan
from reticent.server.folding import Kept, Rules
from reticent.server.partial import decode_tally
from reticent.server.rounds import Tally

from .charging import Clerk
from .grid import InProcessGrid
from .packets import Packer
from .workers import BLOCK, Inline

Task = tuple[bytes, bytes]
"""The work of a round, one object for all of its shares, and one share."""

LOSSES = 10
"""How many workers, beyond one loss of the whole team, may be lost without a share being done."""


class Team(Protocol):
    """Workers that play shares, in any order; a share whose worker is lost is played again."""

    @property
    def size(self) -> int:
        """How many workers there are."""
        ...

    @property
    def window(self) -> int:
        """How many clients to charge and deal at a time: whole blocks."""
        ...

    def play(self, tasks: Iterable[Task]) -> Iterator[bytes]:
        """Yield the partial sum of each task as it is done, taking tasks only as workers are free.

        Raises:
            NetworkError: If too many workers were lost and nothing was done (:data:`LOSSES`).
        """
        ...


class TeamGrid(InProcessGrid):
    """A grid that folds replies in the workers that make them (:class:`.FoldingGrid`).

    Guarantee: what is folded does not depend on the team's size, on which worker plays which share,
    or on how often one is lost. Each window of clients is charged, durably, before any of it is
    handed out; asking again finds the same charge, and the same noise, and so the same update.
    """

    def __init__(self, clients: int, here: Inline, team: Team, clerk: Clerk) -> None:
        """Serve ``clients`` nodes; single messages are answered ``here``."""
        super().__init__(clients, here)
        self._team, self._clerk = team, clerk

    def fold(self, messages: Iterable[Message], rules: Rules, kept: Kept) -> Iterator[Tally]:
        """Yield partial sums as workers finish them; a window of clients is out at a time."""
        for part in self._team.play(self._tasks(messages, Packer(rules, kept))):
            yield decode_tally(part, rules.layout.size, rules.keep)

    def _tasks(self, messages: Iterable[Message], packer: Packer) -> Iterator[Task]:
        pending = iter(messages)
        while window := list(islice(pending, self._team.window)):
            grants, work = self._clerk.charge(window), packer.work(window)
            for share in shares(window, self._team.size):
                yield work, packer.share(share, grants)


def shares(window: Sequence[Message], workers: int) -> Iterator[Sequence[Message]]:
    """Yield runs of whole blocks, as equal as can be and at most one for each worker."""
    blocks = -(-len(window) // BLOCK)
    parts = min(workers, blocks)
    for part in range(parts):
        first, last = part * blocks // parts, (part + 1) * blocks // parts
        yield window[first * BLOCK : last * BLOCK]


class Backlog:
    """Tasks that no worker has finished, and how many workers were lost since one was.

    A run is not given up for what it lost, however long it is, but for losing workers and doing
    nothing: as many as the team has, since a machine takes all of its own with it, and
    :data:`LOSSES` more. A share that ends every worker is found too: in the end it is all there is.
    """

    def __init__(self, size: int, say: Callable[[str], None]) -> None:
        """Begin a run with ``size`` workers; ``say`` gets a line for each that is lost."""
        self._most, self._say = size + LOSSES, say
        self._tasks: Iterator[Task] = iter(())
        self._again: list[Task] = []
        self._losses = 0

    def begin(self, tasks: Iterable[Task]) -> None:
        """Take the tasks of a round."""
        self._tasks, self._again = iter(tasks), []

    def next(self) -> Task | None:
        """Return a task to be done, lost ones first; None when there is none."""
        return self._again.pop() if self._again else next(self._tasks, None)

    def done(self) -> None:
        """Note that a task was finished."""
        self._losses = 0

    def lost(self, task: Task | None, how: str) -> None:
        """Count a lost worker, and take back what it was playing.

        Raises:
            NetworkError: If it is one too many.
        """
        self._losses += 1
        if self._losses > self._most:
            raise NetworkError(
                f"{self._losses} workers ended one after another and none did its work, the last "
                f"one {how}; committed rounds are kept, continue with --resume"
            )
        if task is not None:
            self._again.append(task)
        then = "another is started" if task is None else "its share is played again"
        self._say(f"a worker ended {how}; {then}")


def worker_count(plan: Plan, cores: int) -> int:
    """Return how many workers a plan asks for; ``auto`` is one a core, and none without a block.

    It is one where a device other than the CPU computes: this process has it; and where the first
    replies are used, whose order workers would not keep (Flower's engine collects them all).
    """
    if plan.engine.device != "cpu" or (plan.first_come and plan.engine.kind != "flower-ray"):
        return 1
    if plan.engine.workers != "auto":
        return plan.engine.workers
    return max(1, min(cores, -(-plan.federation.clients_per_round // BLOCK)))


def require_ray(plan: Plan) -> None:
    """Check that Ray is installed.

    Raises:
        DependencyError: If it is not.
    """
    if importlib.util.find_spec("ray") is None:
        raise DependencyError(
            f"engine.kind=\"{plan.engine.kind}\" needs Ray: pip install 'reticent[simulation]'"
        )
