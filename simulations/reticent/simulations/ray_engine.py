"""A team of Ray actors, on this machine or on a cluster: our own engine on Ray.

One long-lived actor a core. The work of a round (model, order, constants) is put into the object
store once; an actor gets a share of client numbers and returns one partial sum. The ledger stays
with the driver, which charges before it hands out, so nodes need no file system in common.

Ray serialises arguments by its own means (pickle), between machines of one cluster that its owner
trusts; what we hand to it are bytes and numbers, and what comes back is parsed as from a worker
process.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from reticent.core.errors import DataError, DependencyError, NetworkError, ReticentError
from reticent.core.plan import Plan, plan_from_json
from reticent.core.tasks import load_task

from .alike import compared, own_marks
from .cores import usable_cores
from .devices import Devices
from .player import Player
from .teams import Backlog, Task, require_ray, worker_count
from .workers import WINDOW

_PATIENCE = 300.0  # seconds until some actor must have found a place on the cluster
_ANSWER = 10.0  # seconds until somebody must have taken a connection


class _Actor:
    """What runs in an actor's process."""

    def __init__(self, devices: Devices, plan_json: str) -> None:
        self._player, self._plan = Player(devices, plan_json), plan_from_json(plan_json)
        self._number = 0

    def ready(self) -> tuple[tuple[str, ...], str]:
        """Tell that the actor has found a place and has imported everything, and what it is.

        And why its node lacks the task's data, if it does: as a client's refusals, which retries
        and a quorum of the others make good, that would only make another model.
        """
        return own_marks().plain(), _no_data(self._plan)

    def play(self, number: int, work: Any, share: bytes) -> bytes:
        """Play a share of work ``number``; ``work`` lies in the node's object store."""
        if number != self._number:
            self._player.begin(work.tobytes())
            self._number = number
        return self._player.play(share)


@dataclass(frozen=True)
class _Call:
    """A call that has not returned: of an actor, playing a task or, with None, starting."""

    actor: Any
    task: Task | None


class RayTeam:
    """A :class:`.Team` of Ray actors.

    An actor that is lost, alone or with its node, is replaced where there is room, and what it was
    playing is played by whichever actor is free next.
    """

    def __init__(
        self, devices: Devices, plan_json: str, plan: Plan, say: Callable[[str], None]
    ) -> None:
        """Connect to Ray, or start it here, and begin to start the actors.

        ``say`` gets a line for each that is lost, and one if some compute in another way.

        Raises:
            DependencyError: If Ray is not installed.
            NetworkError: If no cluster answers at the address.
        """
        require_ray(plan)
        self._owns = _connect(plan)
        import ray  # pyright: ignore[reportMissingImports]

        self.size = worker_count(plan, int(ray.cluster_resources().get("CPU", 1)))
        self.where = f"{sum(node['Alive'] for node in ray.nodes())} Ray node(s)"
        self._about = devices, plan_json
        self._backlog = Backlog(self.size, say)
        self._works = 0
        self._say = say
        self._unlike = ""
        self._idle: list[Any] = []
        self._calls: dict[Any, _Call] = {}
        for _ in range(self.size):
            self._start()

    @property
    def window(self) -> int:
        """How many clients to deal at a time."""
        return WINDOW * self.size

    def __enter__(self) -> RayTeam:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        import ray  # pyright: ignore[reportMissingImports]

        for actor in {*self._idle, *(call.actor for call in self._calls.values())}:
            ray.kill(actor)
        if self._owns:
            ray.shutdown()

    def play(self, tasks: Iterable[Task]) -> Iterator[bytes]:
        """Yield the partial sum of each task, in the order in which they are done.

        Raises:
            NetworkError: If actors are lost and nothing is done, or none finds a place.
            DependencyError: If a node has another reticent or another torch, or none.
            DataError: If a node cannot read the task's data.
        """
        self._backlog.begin(tasks)
        latest: Task | None = None
        stored: Any = None
        while True:
            while self._idle and (task := self._backlog.next()):
                if latest is None or latest[0] is not task[0]:
                    latest, stored = task, self._put(task[0])
                self._hand(self._idle.pop(), task, stored)
            if all(call.task is None for call in self._calls.values()) and self._idle:
                return  # whoever still starts is for the next round
            yield from self._next_part()

    def _put(self, work: bytes) -> Any:
        import ray  # pyright: ignore[reportMissingImports]

        self._works += 1
        return ray.put(np.frombuffer(work, dtype=np.uint8))  # an array is not copied by readers

    def _hand(self, actor: Any, task: Task, stored: Any) -> None:
        reference = actor.play.remote(self._works, stored, task[1])
        self._calls[reference] = _Call(actor, task)

    def _next_part(self) -> Iterator[bytes]:
        """Wait for a call to return; yield what it gave, unless it was lost or only started."""
        import ray  # pyright: ignore[reportMissingImports]
        from ray.exceptions import RayError, RayTaskError  # pyright: ignore[reportMissingImports]

        done, _ = ray.wait(list(self._calls), num_returns=1, timeout=_PATIENCE)
        if not done and all(call.task is None for call in self._calls.values()):
            raise NetworkError(
                f"no actor found a free core on the Ray cluster within {_PATIENCE:g} s; committed "
                "rounds are kept, continue with --resume"
            )
        for reference in done:
            call = self._calls.pop(reference)
            try:
                part = ray.get(reference)
            except RayTaskError:
                raise
            except RayError as error:
                if call.task is None and (why := no_start(error)):
                    raise DependencyError(why) from error
                self._backlog.lost(call.task, f"with {type(error).__name__}")
                self._start()
                continue
            self._idle.append(call.actor)
            if call.task is None:
                self._compare(part)
            else:
                self._backlog.done()
                yield part

    def _compare(self, told: Any) -> None:
        """Refuse a node that has other code or no data; say once that one is of another kind."""
        unlike = admitted(told)
        if unlike and not self._unlike:
            self._say(unlike)
        self._unlike = self._unlike or unlike

    def _start(self) -> None:
        import ray  # pyright: ignore[reportMissingImports]

        actor = ray.remote(num_cpus=1, max_restarts=0)(_Actor).remote(*self._about)
        self._calls[actor.ready.remote()] = _Call(actor, None)


def _no_data(plan: Plan) -> str:
    try:
        load_task(plan.task, plan.seed).test()
    except ReticentError as error:
        return str(error)
    return ""


def admitted(told: Any) -> str:
    """Return how a node differs that may play all the same, in words; or nothing.

    Args:
        told: What its actor gave for ``ready``; that of an older reticent gave anything.

    Raises:
        DependencyError: If the code or torch is another one.
        DataError: If it cannot read the task's data.
    """
    marks, problem = told if type(told) is tuple and len(told) == 2 else (told, "")
    unlike = compared(own_marks(), marks)
    if problem:
        raise DataError(f"a Ray node cannot read the task's data: {problem}")
    return unlike


def no_start(error: Exception) -> str:
    """Return why no actor can start on some node, in words; or nothing, if one was merely lost.

    Ray places the next one there again, as often as one is asked for: the node has free cores.
    """
    if not getattr(error, "actor_init_failed", False):
        return ""
    last = str(error).strip().splitlines()[-1].strip()  # of a traceback: what was raised
    return (
        f"a Ray node cannot start an actor: {last}; the same reticent has to be installed on every "
        "node, pip install 'reticent[simulation]' from the same source"
    )


def _connect(plan: Plan) -> bool:
    """Connect to Ray and return whether this process started it or connected itself.

    Raises:
        NetworkError: If no cluster answers at the address.
    """
    import ray  # pyright: ignore[reportMissingImports]

    if ray.is_initialized():
        return False
    address = plan.engine.address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {}
    if address == "local":
        cores = worker_count(plan, usable_cores())
        options = {"num_cpus": cores, "include_dashboard": False}
    try:
        _require_answer(address)
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=True,
            **options,
        )
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        raise NetworkError(
            f"engine.address={address!r}: no Ray cluster answers: {error}"
        ) from error
    return True


def _require_answer(address: str) -> None:
    """Raise OSError where nobody listens at a host and port: Ray itself waits for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER).close()
