"""Measuring a run's models, or an artifact: size, latency, memory, accuracy, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import nn

from reticent.compression.adapt import merged
from reticent.compression.artifact import load_artifact
from reticent.compression.backends.apart import Measured, Subject, measure_apart
from reticent.compression.backends.base import Deployed, deploy, installed
from reticent.compression.backends.profiles import Profile
from reticent.compression.backends.registry import BACKENDS
from reticent.compression.bench import size_on_disk
from reticent.compression.deployable import Spec, quantized
from reticent.compression.integer import IntegerSpec
from reticent.core.errors import ArtifactError
from reticent.core.run import Run
from reticent.core.signing import read_public_key

from .export import finished_run
from .finish import problem_of
from .job import Job
from .public_training import accuracy


def bench_run(run: Run, repeats: int, profile: Profile) -> list[dict[str, Any]]:
    """Measure teacher, fp32 student and the int8 student on every installed backend.

    Each model runs in a process of its own within ``profile``; accuracy is measured here, without.

    Raises:
        RunError: If the run has not finished or is damaged.
        ArtifactError: If a model can be neither converted nor measured.
    """
    torch.set_num_threads(1)  # before the first integer prediction, see compression/bench.py
    with finished_run(run) as (job, state):
        problem = problem_of(job.plan, job.start.student)
        if problem is not None:
            raise ArtifactError(f"{problem} (the float model's figures are in {run.summary})")
        job.start.layout.write(job.start.student, state.average)
        teacher, final = job.start.teacher, cast(nn.Sequential, merged(job.start.student))
        spec, _ = quantized(final, job.task.public().inputs, job.plan.student.quantize)
        int8, refused = _deployed(job, spec)
        floats = _floats(job, teacher, final, spec)
        subjects = [*floats, *(Subject.of(d) for d in int8)]
        example = job.task.public().inputs[:1].numpy()
        measured = measure_apart(subjects, example, repeats, profile)
        test, models = job.task.test(), {"teacher": teacher, "fp32": final}
        plain = [models[subject.name] for subject in floats]
        return [
            *(
                _row(f.name, "torch", size_on_disk(model), m, accuracy(model, test))
                for f, model, m in zip(floats, plain, measured[: len(floats)], strict=True)
            ),
            *(
                _row("int8", d.backend.name, len(d.data), m, accuracy(d.model, test))
                for d, m in zip(int8, measured[len(floats) :], strict=True)
            ),
            *(_refused(name, reason) for name, reason in refused.items()),
        ]


def _deployed(job: Job, spec: Spec) -> tuple[list[Deployed], dict[str, str]]:
    """Return the model on every installed backend, and why others have no form of it here."""
    own, shape = job.plan.student.quantize.backend, tuple(job.task.input_shape)
    found: list[Deployed] = []
    refused: dict[str, str] = {}
    for backend in BACKENDS.values():
        fits = backend.dynamic or isinstance(spec, IntegerSpec)
        if not fits or not installed(backend):
            continue
        try:
            found.append(deploy(spec, backend, shape))
        except ArtifactError as error:
            if backend.name == own:
                raise
            refused[backend.name] = str(error)
    return found, refused


def _floats(job: Job, teacher: nn.Module, final: nn.Module, spec: Spec) -> list[Subject]:
    """Return the float models, as files from which another process builds them."""
    graph = spec.graph.model_dump_json().encode()
    files = {"model.json": graph, "weights.safetensors": _weights(final)}
    return [_teacher(job, teacher), Subject("fp32", "fp32", files)]


def bench_artifact(folder: Path, key: Path, repeats: int, profile: Profile) -> list[dict[str, Any]]:
    """Verify an artifact and measure it alone, in a process of its own within ``profile``.

    Raises:
        ArtifactError: If it is damaged, signed by another key, or cannot be measured.
        DependencyError: If what runs its backend is not installed.
    """
    torch.set_num_threads(1)  # before the first integer prediction, see compression/bench.py
    artifact = load_artifact(folder, read_public_key(key))
    backend = BACKENDS[artifact.manifest.backend]
    deployed = Deployed(backend, artifact.graph, artifact.data, artifact.model)
    example = torch.zeros(1, *artifact.manifest.task.input_shape).numpy()
    (measured,) = measure_apart([Subject.of(deployed)], example, repeats, profile)
    return [_row("int8", backend.name, len(artifact.data), measured, None)]


def _teacher(job: Job, teacher: nn.Module) -> Subject:
    plan = job.plan
    own = plan.student.model if plan.student.distill.mode == "self" else None
    files = {
        "task.json": plan.task.model_dump_json().encode(),
        "teacher.json": json.dumps({"count": plan.teacher.count, "student": own}).encode(),
        "weights.safetensors": _weights(teacher),
    }
    return Subject("teacher", "teacher", files, plan.seed)


def _weights(model: nn.Module) -> bytes:
    # Cloned, because safetensors refuses arrays that share memory (tied weights).
    state = model.state_dict()
    return safetensors.torch.save({n: v.contiguous().clone() for n, v in state.items()})


def _refused(backend: str, reason: str) -> dict[str, Any]:
    nothing = ("bytes", "median_us", "p95_us", "memory_bytes", "process_bytes", "accuracy")
    return {"model": "int8", "backend": backend, **dict.fromkeys(nothing), "misfit": reason}


def _row(
    name: str, runs_on: str, size: int, measured: Measured, correct: float | None
) -> dict[str, Any]:
    time = measured.latency
    return {
        "model": name,
        "backend": runs_on,
        "bytes": size,
        "median_us": time and time.median_us,
        "p95_us": time and time.p95_us,
        "memory_bytes": measured.memory_bytes,
        "process_bytes": measured.process_bytes,
        "misfit": measured.misfit or None,
        "accuracy": correct,
    }
