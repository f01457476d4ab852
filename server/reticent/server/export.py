"""Making and measuring artifacts of a run that is already there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from reticent.compression.artifact import load_artifact
from reticent.compression.bench import Latency, measure, size_on_disk
from reticent.compression.deployable import assemble, deploy
from reticent.core.errors import RunError
from reticent.core.plan import Backend
from reticent.core.run import Run
from reticent.core.signing import read_public_key
from reticent.core.tasks import load_task
from reticent.privacy.schedule import schedule_for

from .finish import build_artifact, latencies
from .job import Job
from .journal import Journal
from .optimizer import ServerState
from .preparation import prepare
from .public_training import accuracy


@contextmanager
def _finished(run: Run) -> Iterator[tuple[Job, ServerState]]:
    plan = run.plan()
    if not run.journal.is_file():
        raise RunError(f"{run.folder}: has no journal: the run has not started")
    task = load_task(plan.task, plan.seed)
    journal = Journal(run)
    try:
        state = journal.latest()
        if state is None or state.round < plan.federation.rounds:
            done = state.round if state else 0
            raise RunError(
                f"{run.folder}: {done} of {plan.federation.rounds} rounds are committed; finish it "
                f"with `reticent simulate --run {run.folder} --resume`"
            )
        start = prepare(plan, task, journal, lambda _: None)
        yield Job(run, plan, task, schedule_for(plan), start, journal), state
    finally:
        journal.close()


def export_run(run: Run, folder: Path | None, backend: Backend | None = None) -> dict[str, Any]:
    """Write the artifact of a finished run to ``folder`` (default: the run's own); return figures.

    ``backend`` replaces the engine of the run's plan.

    Raises:
        RunError: If the run has not finished or is damaged.
        ArtifactError: If the student cannot be converted or the folder cannot be written.
    """
    with _finished(run) as (job, state):
        return build_artifact(job, state, folder or run.artifact, backend)


def bench_run(run: Run, repeats: int) -> list[dict[str, Any]]:
    """Measure teacher, fp32 student and int8 student of a finished run, interleaved.

    Raises:
        RunError: If the run has not finished or is damaged.
    """
    torch.set_num_threads(1)  # before the first integer prediction, see compression/bench.py
    with _finished(run) as (job, state):
        start, final = job.start, cast(nn.Sequential, job.start.student)
        start.layout.write(final, state.average)
        section = job.plan.student.quantize
        spec, _ = deploy(final, job.task.public().inputs, section)
        integer = assemble(spec, section.backend)
        times = latencies(job, final, integer, repeats)
        test = job.task.test()
        sized = {"teacher": start.teacher, "fp32": final, "int8": spec}
        models = {"teacher": start.teacher, "fp32": final, "int8": integer}
        return [
            _row(name, size_on_disk(sized[name]), times[name], accuracy(model, test))
            for name, model in models.items()
        ]


def bench_artifact(folder: Path, key: Path, repeats: int) -> list[dict[str, Any]]:
    """Verify an artifact and measure it alone.

    Raises:
        ArtifactError: If it is damaged or signed by another key.
    """
    torch.set_num_threads(1)  # before the first integer prediction, see compression/bench.py
    artifact = load_artifact(folder, read_public_key(key))
    shape = artifact.manifest.task.input_shape
    inputs = torch.zeros(1, *shape)
    return [
        _row("int8", size_on_disk(artifact.spec), measure(artifact.model, inputs, repeats), None)
    ]


def _row(name: str, size: int, time: Latency, correct: float | None) -> dict[str, Any]:
    return {
        "model": name,
        "bytes": size,
        "median_us": time.median_us,
        "p95_us": time.p95_us,
        "accuracy": correct,
    }
