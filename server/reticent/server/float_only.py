"""The summary of a run whose student has no integer form."""

from __future__ import annotations

from typing import Any

from reticent.compression.adapt import merged
from reticent.compression.bench import side_by_side, size_on_disk
from reticent.core.update import vector_digest

from .job import Job
from .optimizer import ServerState
from .preparation import parameter_counts
from .public_training import accuracy

_LATENCY_REPEATS = 200


def float_summary(
    job: Job, state: ServerState, problem: str, privacy: dict[str, Any]
) -> dict[str, Any]:
    """Return what a summary has without an artifact, and the reason ``problem``."""
    start = job.start
    start.layout.write(start.student, state.average)
    final = merged(start.student)
    models = {"teacher": start.teacher, "fp32": final}
    one = job.task.public().inputs[:1]
    times = side_by_side({n: (m, one) for n, m in models.items()}, repeats=_LATENCY_REPEATS)
    names = ("teacher", "public_only", "public_only_pruned")
    known = {n: float(job.journal.fact(f"accuracy:{n}") or "nan") for n in names}
    return {
        "plan": job.plan.digest,
        "model": vector_digest(state.average),
        "rounds": state.round,
        "parameters": parameter_counts(start, final),
        "privacy": privacy,
        "no_artifact": problem,
        "accuracy": {**known, "fp32": accuracy(final, job.task.test())},
        "latency_us": {n: round(t.median_us, 1) for n, t in times.items()},
        "latency_p95_us": {n: round(t.p95_us, 1) for n, t in times.items()},
        "bytes": {n: size_on_disk(m) for n, m in models.items()},
    }
