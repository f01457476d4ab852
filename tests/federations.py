"""Real federations on loopback, with devices whose seed everyone knows, for tests of faults.

Devices draw their randomness from the plan's seed (:mod:`seeded_device`), so the final model can be
compared, to the bit, with that of a simulation that nothing happened to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import loopback

from reticent.client.diary import RELEASED, Diary
from reticent.core.plan import Plan, load_plan
from reticent.core.run import Run
from reticent.privacy.ledger import Budget, Ledger
from reticent.server.home import open_home
from reticent.server.journal import Journal
from reticent.server.operate import Operation, prepare_operation
from reticent.server.registry import read_registry

TESTS = Path(__file__).resolve().parent
EXAMPLE = TESTS.parent / "examples" / "deployment"
PLAN_FILE = EXAMPLE / "plan.toml"
POLICY = "[budget]\nepsilon = 99.0\ndelta = 1e-5\n"
Committed = Callable[[Operation, dict[str, Any]], None]


def plan_of(rounds: int, *changes: str) -> Plan:
    """Return the example's plan with so many rounds and little to prepare."""
    return load_plan(PLAN_FILE, (f"federation.rounds={rounds}", "teacher.epochs=1", *changes))


@contextmanager
def federation(
    folder: Path, names: tuple[str, ...], address: Callable[[int, int], str] = lambda i, port: ""
) -> Iterator[loopback.Deployment]:
    """Make a server that does not run yet, and start devices that wait for it.

    Args:
        folder: Is made, unless it is there and empty.
        names: Of the devices.
        address: Returns what the i-th device is to connect to instead of the server's port.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = str(TESTS)  # for `seeded_device`
    running = loopback.Deployment(folder, loopback.Processes(folder), loopback.free_port())
    call, port = running.processes.run, str(running.port)
    try:
        call("cli", "reticent", "server", "init", running.server, "--port", port)
        policy = folder / "policy.toml"
        policy.write_text(POLICY)
        running.reticent("enroll", *names, "--policy", policy)
        loopback.start_superlink(running)  # which admits the devices
        running.processes.stop()
        for index, name in enumerate(names):
            bundle = running.server / "bundles" / f"{name}.bundle"
            words = ("reticent", "device", "init", bundle, "--dir", running.device(name))
            call("cli", *words, "--accept")
            if other := address(index, running.port):
                settings = running.device(name) / "device.toml"
                settings.write_text(settings.read_text().replace(f"127.0.0.1:{port}", other))
            start_agent(running, name)
        yield running
    finally:
        running.processes.stop()


def start_agent(running: loopback.Deployment, name: str) -> None:
    """Start a device, as an init system would."""
    running.processes.start(name, "reticent", "device", "run", "--dir", running.device(name))


def operation(
    running: loopback.Deployment, plan: Plan, after: Committed, resume: bool = False
) -> Operation:
    """Prepare to serve a run; ``after`` is called with each committed round's metrics."""
    holder: list[Operation] = []
    made = prepare_operation(
        open_home(running.server),
        plan,
        running.run,
        resume,
        print,
        lambda metrics: after(holder[0], metrics),
        "seeded_device:app",
    )
    holder.append(made)
    journal = Journal(made.run)
    if journal.fact("run") is None:
        journal.record("run", plan.digest[:16])  # as a simulation of the plan is called
    journal.close()
    return made


def superlinks(operation: Operation) -> list[int]:
    """Return the processes of a server's SuperLink."""
    return processes_with(str(operation.home.database))


def processes_with(word: str) -> list[int]:
    """Return the processes that have ``word`` in their command line, as one of its words."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if word.encode() in words:
            found.append(int(path.parent.name))
    return found


class Participants:
    """Notes who took part in each committed round, which a journal keeps as counts only."""

    def __init__(self, running: loopback.Deployment) -> None:
        self._running, self._counts = running, dict[str, int]()
        self.rounds: list[set[str]] = []

    def note(self) -> None:
        """Look at the journal; to be called after each round."""
        registry = read_registry(open_home(self._running.server).devices)
        names = {str(device.identity): name for name, device in registry.devices.items()}
        journal = Journal(Run(self._running.run))
        counts = {names[client]: count for client, count in journal.participations().items()}
        journal.close()
        new = {name: count - self._counts.get(name, 0) for name, count in counts.items()}
        if not all(change in (0, 1) for change in new.values()):
            raise RuntimeError(f"two rounds were committed between two looks: {new}")
        self._counts = counts
        self.rounds.append({name for name, change in new.items() if change})


def accounts(running: loopback.Deployment, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Return, by device, how many rounds it was charged and which it released.

    The chain of each ledger is walked.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        state = running.device(name) / "state"
        with Ledger.open(state) as ledger:
            ledger.verify()
            charges = ledger.overview("device", Budget(99.0, 1e-5)).charges
        released = {line.round for line in Diary(state).lines() if line.what == RELEASED}
        found[name] = {"charges": charges, "released": released}
    return found
