"""``simulate(plan) -> Run``: a whole federation on one machine, or on a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from flwr.serverapp import ServerApp

from reticent.client.training import LocalTrainer, trained_alone
from reticent.core.errors import RunError
from reticent.core.plan import Plan
from reticent.core.protocol import Constants
from reticent.core.run import Run, create_run, locked, open_run
from reticent.core.tasks import load_task
from reticent.privacy.ledger import Head, Ledger
from reticent.privacy.randomness import SeededRandomness
from reticent.server.app import Settings, build_server_app
from reticent.server.preparation import Prepared

from .accelerators import require_accelerator
from .charging import Clerk
from .cores import usable_cores
from .devices import Devices, devices_for
from .explain import check_plan, planned_fleet, sketched_constants
from .fleet import SimulatedFleet, charging_to
from .grid import InProcessGrid, serve
from .growing import GrowingTeam
from .processes import Processes
from .runs import forget_failure
from .teams import Team, TeamGrid, worker_count
from .workers import Inline


def simulate(
    plan: Plan,
    folder: Path,
    *,
    resume: bool = False,
    say: Callable[[str], None] = lambda _: None,
    progress: Callable[[dict[str, Any]], None] = lambda _: None,
    prepared: Prepared | None = None,
) -> Run:
    """Run a federation to its end, or continue one, and return its run directory.

    With ``prepared``, one for many runs, models that these share are trained on public data once.
    The ServerApp and the ClientApp are those of a deployment; only the grid between them is ours.
    Worker processes import the script that calls this, so it must do so below
    ``if __name__ == "__main__":``.

    Raises:
        ReticentError: Whatever went wrong; committed rounds are kept and ``resume=True`` continues
            after the last of them, to the same bits as a run that was never stopped.
    """
    # What cannot work, missing or damaged data included, is an error before anything is written.
    task, _ = check_plan(plan)
    task.test()
    sketch = sketched_constants(plan, task)
    require_accelerator(plan, task, sketch)
    run = _resumable(folder, plan) if resume else create_run(folder, plan)
    reason = trained_alone(plan, task, sketch) if plan.engine.device == "cpu" else None
    if reason and plan.engine.kind != "flower-ray":
        say(f"clients are trained one by one: {reason}")
    with locked(run):
        forget_failure(run)  # it goes on: whatever stops it now is another reason
        _quiet_flower()
        devices = devices_for(plan, run.ledger)
        if resume:
            Ledger.open(run.ledger).close()  # walks the whole chain, once for all that open it now
        # Made in the thread that the engine runs the ServerApp in: SQLite asks for that.
        app = build_server_app(lambda _: _settings(run, plan, devices, say, progress, prepared))
        _serve(app, plan, devices, say, plan.federation.rounds - (_committed(run) if resume else 0))
    return run


def _committed(run: Run) -> int:
    """Return how many rounds a run has, as far as its file tells; the journal may know more."""
    with suppress(RunError):
        return len(run.read_metrics())
    return 0


def _resumable(folder: Path, plan: Plan) -> Run:
    """Open a run that is to go on.

    Raises:
        RunError: If it is another plan's or a server's, or Flower's Ray engine ran it or is to.
    """
    run = open_run(folder, plan)
    if run.attempt.is_file():
        raise RunError(
            f"{folder}: real devices run it, and what they have spent is not known here; continue "
            f"it with `{run.resume_command}`"
        )
    if "flower-ray" in (plan.engine.kind, run.plan().engine.kind):
        raise RunError(
            f'{folder}: engine.kind="flower-ray" cannot be resumed: Flower gives every node a new '
            "id each time, so the rounds that a client took part in before would not be counted; "
            'start a new run, or use engine.kind="inprocess" or "ray" from the beginning'
        )
    return run


def _settings(
    run: Run,
    plan: Plan,
    devices: Devices,
    say: Callable[[str], None],
    progress: Callable[[dict[str, Any]], None],
    prepared: Prepared | None,
) -> Settings:
    ledger = Ledger.open(run.ledger, verify=False)
    return Settings(
        run=run,
        identity=plan.digest[:16],
        say=say,
        progress=progress,
        anchor=lambda: _text(ledger.head()),
        holds_anchor=lambda text: ledger.contains(_head(text)),
        close=ledger.close,
        randomness=SeededRandomness(plan.seed),
        prepared=prepared,
        fleet=None if plan.fleet is None else lambda c: _fleet(plan, c, devices, ledger),
    )


def _fleet(plan: Plan, constants: bytes, devices: Devices, ledger: Ledger) -> SimulatedFleet:
    task = load_task(plan.task, plan.seed)
    trainer = LocalTrainer(plan, task, Constants.decode(constants))
    return planned_fleet(plan, task, trainer, len(constants), charging_to(plan, devices, ledger))


def _serve(
    app: ServerApp, plan: Plan, devices: Devices, say: Callable[[str], None], rounds: int
) -> None:
    if plan.engine.kind == "flower-ray":
        from .flower_ray import serve_with_flower_ray

        serve_with_flower_ray(app, plan, devices)
        return
    text = plan.canonical()
    with Inline(devices, text) as here, _team(plan, devices, text, say, rounds) as team:
        if team is None:
            grid = InProcessGrid(plan.task.clients, here)
        else:
            clerk = Clerk(here.ledger, devices.budget, plan)
            grid = TeamGrid(plan.task.clients, here, team, clerk)
        serve(app, grid)


def _team(
    plan: Plan, devices: Devices, text: str, say: Callable[[str], None], rounds: int
) -> AbstractContextManager[Team | None]:
    if plan.first_come:
        if plan.engine.kind == "ray" or plan.engine.workers not in ("auto", 1):
            say("clients are trained in this process: federation.enough takes the first replies")
        return nullcontext()
    if plan.engine.kind == "ray":
        from .ray_engine import RayTeam

        team = RayTeam(devices, text, plan, say)
        say(f"{team.size} Ray actors of one thread each on {team.where}")
        return team
    workers = worker_count(plan, usable_cores())
    if workers == 1:
        return nullcontext()
    if plan.engine.workers == "auto":
        return GrowingTeam(devices, text, plan, workers, rounds, say)
    return Processes(devices, text, workers, say)


def _quiet_flower() -> None:
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")


def _text(head: Head) -> str:
    return f"{head.sequence}:{head.mac}"


def _head(text: str) -> Head:
    sequence, _, mac = text.partition(":")
    return Head(int(sequence), mac)
