"""Making artifacts of a run that is already there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reticent.compression.backends import BackendName
from reticent.compression.backends.base import require_all
from reticent.compression.backends.registry import BACKENDS
from reticent.core.errors import RunError
from reticent.core.run import Run
from reticent.core.tasks import load_task
from reticent.privacy.schedule import schedule_for

from .finish import build_artifact
from .job import Job
from .journal import Journal
from .optimizer import ServerState
from .preparation import prepare
from .status import ended_early


@contextmanager
def finished_run(run: Run) -> Iterator[tuple[Job, ServerState]]:
    """Yield a finished run, prepared, and its state after the last round.

    A run that devices' budgets ended early is finished too: it has an artifact of its rounds.

    Raises:
        RunError: If the run has not finished or is damaged.
    """
    plan = run.plan()
    if not run.journal.is_file():
        raise RunError(f"{run.folder}: has no journal: the run has not started")
    task = load_task(plan.task, plan.seed)
    journal = Journal(run)
    try:
        state = journal.latest()
        if state is None or (state.round < plan.federation.rounds and not ended_early(run)):
            done = state.round if state else 0
            raise RunError(
                f"{run.folder}: {done} of {plan.federation.rounds} rounds are committed; finish it "
                f"with `{run.resume_command}`"
            )
        start = prepare(plan, task, journal, lambda _: None)
        yield Job(run, plan, task, schedule_for(plan), start, journal), state
    finally:
        journal.close()


def export_folder(run: Run, backend: BackendName) -> Path:
    """Return where an export goes if nothing is said: the run's own artifact, or beside it."""
    own = run.plan().student.quantize.backend
    return run.artifact if backend == own else run.folder / f"artifact-{backend}"


def export_run(
    run: Run, folder: Path, backend: BackendName, min_agreement: float
) -> dict[str, Any]:
    """Write the artifact of a finished run to ``folder``; return figures.

    ``min_agreement`` is the share of the test examples on which the artifact must predict what the
    fake-quantized student does.

    Raises:
        RunError: If the run has not finished or is damaged.
        ArtifactError: If the student cannot be converted, agrees too little, or the folder cannot
            be written.
        DependencyError: If the backend is not installed.
    """
    require_all(BACKENDS[backend])
    with finished_run(run) as (job, state):
        return build_artifact(job, state, folder, BACKENDS[backend], min_agreement)
