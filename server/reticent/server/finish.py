"""After the last round: the int8 artifact, its measurements and the run's summary."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from reticent.compression.adapt import merged
from reticent.compression.artifact import SelfTest, write_artifact
from reticent.compression.backends.base import Backend, Deployed, deploy
from reticent.compression.backends.registry import BACKENDS
from reticent.compression.bench import Latency, side_by_side, size_on_disk
from reticent.compression.convert import Agreement, compare
from reticent.compression.deployable import Spec, assemble, quantized
from reticent.compression.fold import is_chain
from reticent.compression.forms import integer_problem
from reticent.compression.manifest import TaskInfo
from reticent.core.errors import ArtifactError
from reticent.core.plan import Plan, Quantize
from reticent.core.run import write_atomic
from reticent.core.signing import make_signing_key, private_key_file, read_private_key
from reticent.core.update import vector_digest
from reticent.privacy.report.adversaries import READERS, SERVER
from reticent.privacy.report.against import epsilons_spent

from .fleet import fleet_summary
from .float_only import float_summary
from .job import Job
from .optimizer import ServerState
from .preparation import parameter_counts
from .public_training import accuracy, logits_of

_SELF_TEST = 8
_LATENCY_REPEATS = 200


def finish(
    job: Job,
    state: ServerState,
    say: Callable[[str], None],
    stopped: dict[str, Any] | None = None,
) -> None:
    """Write ``artifact/`` and ``summary.json``; doing it again gives the same model.

    ``stopped`` are the figures of the round that could not be held, if budgets ended the training.

    A student that has no integer form leaves no artifact; the summary says why, and has figures of
    the float model only.
    """
    problem = problem_of(job.plan, job.start.student)
    if problem is None:
        summary = build_artifact(job, state, job.run.artifact)
        said = f"artifact written to {job.run.artifact}"
    else:
        summary = float_summary(job, state, problem, _privacy(job, state))
        said = f"no int8 artifact: {problem}"
    if stopped is not None:
        summary["stopped"] = stopped
    if job.plan.fleet is not None:
        before = float(job.journal.fact("accuracy:public_only_pruned") or "nan")
        summary["fleet"] = fleet_summary(job.journal.metrics(), before)
    write_atomic(job.run.summary, json.dumps(summary, indent=2).encode())
    say(said)


def problem_of(plan: Plan, student: nn.Module) -> str | None:
    """Return why a plan's student has no integer form, or None if it has one."""
    if plan.student.quantize.kind == "dynamic":
        return None  # checked before anything was trained
    return integer_problem(merged(student))


def build_artifact(
    job: Job,
    state: ServerState,
    folder: Path,
    backend: Backend | None = None,
    min_agreement: float | None = None,
) -> dict[str, Any]:
    """Convert the final model to int8, measure it, write it to ``folder`` and return the summary.

    Args:
        job: The run.
        state: Its state after the last round.
        folder: Where to write.
        backend: What the model is stored for and measured with; by default the plan's.
        min_agreement: If given, the share of the test examples on which the model must predict what
            the fake-quantized student does; below it nothing is written.

    Raises:
        ArtifactError: If the student has a layer that has no integer form, or none in this backend,
            or the agreement is too small.
        DependencyError: If the backend is not installed.
    """
    start = job.start
    start.layout.write(start.student, state.average)
    final = merged(start.student)
    if not is_chain(final):
        raise ArtifactError(
            f"student {type(final).__name__}: only nn.Sequential students can be converted to "
            "int8; write the student as an nn.Sequential of Conv2d, Linear, GroupNorm, ReLU, "
            "MaxPool2d and Flatten"
        )
    # QNNPACK sizes its thread pool at the first integer prediction of a process, for good.
    torch.set_num_threads(1)
    section = job.plan.student.quantize
    spec, simulated = quantized(final, job.task.public().inputs, section)
    backend = backend or BACKENDS[section.backend]
    deployed = deploy(spec, backend, tuple(job.task.input_shape))
    tested = {}
    if min_agreement is not None:
        tested = _check_agreement(job, simulated, deployed, min_agreement)
    summary: dict[str, Any] = {
        "plan": job.plan.digest,
        "model": vector_digest(state.average),
        "rounds": state.round,
        "parameters": parameter_counts(start, final),
        "privacy": _privacy(job, state),
        "accuracy": _accuracies(job, final, deployed),
        **_measured(job, final, simulated, deployed),
    }
    summary["agreement"] |= tested
    _write_artifact(job, spec, deployed, summary, folder)
    return summary


def agreement_on_test(job: Job, simulated: nn.Module, deployed: Deployed) -> Agreement:
    """Return how near a deployed model is to the fake-quantized student on the whole test set."""
    return compare(simulated, deployed.model, job.task.test().inputs)


def _check_agreement(
    job: Job, simulated: nn.Module, deployed: Deployed, least: float
) -> dict[str, float]:
    found = agreement_on_test(job, simulated, deployed)
    if not found.argmax >= least:  # written so that nan on either side refuses
        raise ArtifactError(
            f"backend {deployed.backend.name} predicts as the fake-quantized student on "
            f"{found.argmax:.2%} of the test examples (logits differ by up to "
            f"{found.max_difference:.3g}): must be at least {least:.2%}; use another --backend, or "
            "allow less with --min-agreement"
        )
    return {"test": found.argmax, "test_largest_logit_difference": found.max_difference}


def _accuracies(job: Job, final: nn.Sequential, deployed: Deployed) -> dict[str, float]:
    names = ("teacher", "public_only", "public_only_pruned")
    known = {n: float(job.journal.fact(f"accuracy:{n}") or "nan") for n in names}
    # The public-only student is converted too, always at 8 bits: the baseline to beat is int8 as
    # well, and was not trained for fewer.
    section = job.plan.student.quantize
    section = section if section.kind == "dynamic" else Quantize()
    student = cast(nn.Sequential, job.start.public_only)
    baseline = assemble(quantized(student, job.task.public().inputs, section)[0])
    test = job.task.test()
    return {
        **known,
        "public_only_int8": accuracy(baseline, test),
        "fp32": accuracy(final, test),
        "int8": accuracy(deployed.model, test),
    }


def _measured(
    job: Job, final: nn.Sequential, simulated: nn.Module, deployed: Deployed
) -> dict[str, dict[str, Any]]:
    public = job.task.public().inputs
    agreement = compare(simulated, deployed.model, public)
    against_float = compare(final, deployed.model, public)
    latency = latencies(job, final, deployed)
    floats = {"teacher": job.start.teacher, "fp32": final}
    return {
        "agreement": {
            "fake_quantized": agreement.argmax,
            "largest_logit_difference": agreement.max_difference,
            "fp32": against_float.argmax,
        },
        "latency_us": {n: round(t.median_us, 1) for n, t in latency.items()},
        "latency_p95_us": {n: round(t.p95_us, 1) for n, t in latency.items()},
        "bytes": {n: size_on_disk(m) for n, m in floats.items()} | {"int8": len(deployed.data)},
    }


def latencies(job: Job, final: nn.Module, deployed: Deployed) -> dict[str, Latency]:
    """Return single-thread latencies of teacher, fp32 and int8 student, measured in turns."""
    one = job.task.public().inputs[:1]
    models = {"teacher": job.start.teacher, "fp32": final, "int8": deployed.model}
    return side_by_side({n: (m, one) for n, m in models.items()}, repeats=_LATENCY_REPEATS)


def _privacy(job: Job, state: ServerState) -> dict[str, Any]:
    """Return epsilon of the client that spent most, against both adversaries, as the report has it.

    Where the devices' ledgers are elsewhere, that is the client that was asked most often: an
    update that came too late to be used was charged all the same, and the server saw it.
    """
    if job.schedule is None or job.plan.private is None:
        return {"trust": "off", "epsilon": "infinity", "server_epsilon": "infinity"}
    s = job.schedule
    used = max(job.journal.participations().values(), default=0)
    asked = job.journal.most_charged()
    spent = epsilons_spent(job.run, job.plan, s, used, asked)
    return {
        "trust": s.trust,
        "unit": s.unit,
        "relation": s.relation,
        "delta": s.delta,
        "noise_multiplier": s.noise_multiplier,
        "epsilon": _number(spent[READERS]),
        "server_epsilon": _number(spent[SERVER]),
        "largest_participation": used,
        "largest_asked": asked,
        **_client_level(job, state),
    }


def _published(job: Job, privacy: dict[str, Any]) -> dict[str, Any]:
    """Return what of it travels with the model: of a secret draw nothing that tells its outcome."""
    if job.schedule is None or not job.schedule.secret:
        return privacy
    drawn = ("largest_participation", "largest_asked")
    return {key: value for key, value in privacy.items() if key not in drawn}


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
    job: Job, spec: Spec, deployed: Deployed, summary: dict[str, Any], folder: Path
) -> None:
    task, keys = job.task, job.run.keys
    file = private_key_file(keys)
    # A key that is elsewhere and cannot be read is an error: nobody would trust another one.
    known = file.exists() or file.parent != keys
    key = read_private_key(file) if known else make_signing_key(keys)
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
        privacy="off" if job.plan.private is None else _published(job, summary["privacy"]),
        sizes=summary["bytes"],
        self_test=SelfTest(inputs, logits_of(deployed.model, inputs)),
        private_key=key,
        deployed=deployed,
        replace=True,
    )
