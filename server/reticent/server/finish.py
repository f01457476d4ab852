"""After the last round: the int8 artifact, its measurements and the run's summary."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from reticent.compression.artifact import (
    SelfTest,
    TaskInfo,
    write_artifact,
)
from reticent.compression.bench import Latency, side_by_side, size_on_disk
from reticent.compression.convert import compare
from reticent.compression.deployable import Model, Spec, assemble, deploy
from reticent.compression.fold import is_chain
from reticent.core.errors import ArtifactError
from reticent.core.plan import Backend, Quantize
from reticent.core.run import write_atomic
from reticent.core.signing import make_signing_key, read_private_key
from reticent.core.update import vector_digest
from reticent.privacy.accounting import epsilon

from .job import Job
from .optimizer import ServerState
from .public_training import accuracy, logits_of

_SELF_TEST = 8
_LATENCY_REPEATS = 200


def finish(job: Job, state: ServerState, say: Callable[[str], None]) -> None:
    """Write ``artifact/`` and ``summary.json``; doing it again gives the same model.

    Raises:
        ArtifactError: If the student has a layer that has no integer form.
    """
    summary = build_artifact(job, state, job.run.artifact)
    write_atomic(job.run.summary, json.dumps(summary, indent=2).encode())
    say(f"artifact written to {job.run.artifact}")


def build_artifact(
    job: Job, state: ServerState, folder: Path, backend: Backend | None = None
) -> dict[str, Any]:
    """Convert the final model to int8, measure it, write it to ``folder`` and return the summary.

    ``backend`` replaces the engine of the plan.

    Raises:
        ArtifactError: If the student has a layer that has no integer form.
    """
    start, final = job.start, job.start.student
    start.layout.write(final, state.average)
    if not is_chain(final):
        raise ArtifactError(
            f"student {type(final).__name__}: only nn.Sequential students can be converted to "
            "int8; write the student as an nn.Sequential of Conv2d, Linear, GroupNorm, ReLU, "
            "MaxPool2d and Flatten"
        )
    # QNNPACK sizes its thread pool at the first integer prediction of a process, for good.
    torch.set_num_threads(1)
    section = job.plan.student.quantize
    section = section.model_copy(update={"backend": backend or section.backend})
    spec, simulated = deploy(final, job.task.public().inputs, section)
    integer = assemble(spec, section.backend)
    summary = {
        "plan": job.plan.digest,
        "model": vector_digest(state.average),
        "rounds": state.round,
        "parameters": {"kept": start.layout.size, "total": start.layout.total},
        "privacy": _privacy(job, state),
        "accuracy": _accuracies(job, final, integer),
        **_measured(job, final, simulated, integer, spec),
    }
    _write_artifact(job, spec, integer, summary, folder)
    return summary


def _accuracies(job: Job, final: nn.Sequential, integer: Model) -> dict[str, float]:
    names = ("teacher", "public_only", "public_only_pruned")
    known = {n: float(job.journal.fact(f"accuracy:{n}") or "nan") for n in names}
    # The public-only student is converted too, always at 8 bits: the baseline to beat is int8 as
    # well, and was not trained for fewer.
    section = job.plan.student.quantize
    section = section if section.kind == "dynamic" else Quantize()
    student = cast(nn.Sequential, job.start.public_only)
    baseline = assemble(deploy(student, job.task.public().inputs, section)[0])
    test = job.task.test()
    return {
        **known,
        "public_only_int8": accuracy(baseline, test),
        "fp32": accuracy(final, test),
        "int8": accuracy(integer, test),
    }


def _measured(
    job: Job, final: nn.Sequential, simulated: nn.Module, integer: Model, spec: Spec
) -> dict[str, dict[str, Any]]:
    public = job.task.public().inputs
    agreement = compare(simulated, integer, public)
    against_float = compare(final, integer, public)
    latency = latencies(job, final, integer)
    sizes = {"teacher": job.start.teacher, "fp32": final, "int8": spec}
    return {
        "agreement": {
            "fake_quantized": agreement.argmax,
            "largest_logit_difference": agreement.max_difference,
            "fp32": against_float.argmax,
        },
        "latency_us": {n: round(t.median_us, 1) for n, t in latency.items()},
        "latency_p95_us": {n: round(t.p95_us, 1) for n, t in latency.items()},
        "bytes": {n: size_on_disk(m) for n, m in sizes.items()},
    }


def latencies(
    job: Job, final: nn.Module, integer: Model, repeats: int = _LATENCY_REPEATS
) -> dict[str, Latency]:
    """Return single-thread latencies of teacher, fp32 and int8 student, measured in turns."""
    one = job.task.public().inputs[:1]
    rows = {"teacher": (job.start.teacher, one), "fp32": (final, one), "int8": (integer, one)}
    with torch.no_grad():
        return side_by_side(rows, repeats=repeats)


def _privacy(job: Job, state: ServerState) -> dict[str, Any]:
    """Return epsilon of the client that was asked most often, against both adversaries.

    An update that came too late to be used was charged all the same, and the server saw it.
    """
    rounds = max(job.journal.asked().values(), default=0)
    if job.schedule is None or job.plan.private is None:
        return {"trust": "off", "epsilon": "infinity", "server_epsilon": "infinity"}
    s = job.schedule
    readers = epsilon([s.over(s.round_event(), rounds)], s.delta) if rounds else 0.0
    server = epsilon([s.over(s.server_event(), rounds)], s.delta) if rounds else 0.0
    return {
        "trust": s.trust,
        "unit": s.unit,
        "relation": s.relation,
        "delta": s.delta,
        "noise_multiplier": s.noise_multiplier,
        "epsilon": _number(readers),
        "server_epsilon": _number(server),
        "largest_participation": max(job.journal.participations().values(), default=0),
        "largest_asked": rounds,
        **_client_level(job, state),
    }


def _client_level(job: Job, state: ServerState) -> dict[str, Any]:
    """Return what only client-level privacy has: bounds, the noise of the sum, its source."""
    s = job.schedule
    if s is None or s.unit != "client":
        return {}
    return {
        "clip": s.clip,
        "final_clip": state.clip,
        "clip_quantile": s.clip_quantile,
        "sum_multiplier": s.sum_multiplier,
        "count_noise": s.count_noise,
        "denominator": job.plan.federation.clients_per_round,
        "server_randomness": job.journal.fact("randomness"),
    }


def _number(value: float) -> float | str:
    return "infinity" if math.isinf(value) else value


def _write_artifact(
    job: Job, spec: Spec, integer: Model, summary: dict[str, Any], folder: Path
) -> None:
    task, keys = job.task, job.run.keys
    key_file = keys / "signing_key.pem"
    key = read_private_key(key_file) if key_file.exists() else make_signing_key(keys)
    inputs = task.public().inputs[:_SELF_TEST]
    write_artifact(
        folder,
        spec,
        task=TaskInfo(
            name=task.name,
            classes=task.classes,
            input_shape=tuple(task.input_shape),
            preprocessing=getattr(task, "preprocessing", "as the task's loader gives them"),
        ),
        plan_digest=job.plan.digest,
        metrics={k: summary[k] for k in ("accuracy", "agreement", "latency_us", "rounds", "model")},
        privacy="off" if job.plan.private is None else summary["privacy"],
        sizes=summary["bytes"],
        self_test=SelfTest(inputs, logits_of(integer, inputs)),
        engine=cast(Backend, integer.engine),
        private_key=key,
        replace=True,
    )
