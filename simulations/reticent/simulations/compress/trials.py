"""One candidate of a search: a plan, measured on public data."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn

from reticent.client.training import LocalTrainer
from reticent.compression.adapt import merged
from reticent.compression.backends.base import deploy
from reticent.compression.backends.registry import BACKENDS
from reticent.compression.bench import side_by_side
from reticent.compression.deployable import quantized
from reticent.compression.fold import is_chain
from reticent.core.errors import ArtifactError
from reticent.core.plan import Plan
from reticent.core.protocol import Constants
from reticent.core.run import create_run
from reticent.privacy.schedule import schedule_for
from reticent.server.journal import Journal
from reticent.server.preparation import Prepared, Start, prepare
from reticent.server.public_training import accuracy

from ..admission import check_codecs
from ..explain import encoded_bytes, planned_step
from .moves import Candidate
from .public_half import PublicHalf
from .rehearsal import rehearse, require_rehearsal

_REPEATS = 200


@dataclass(frozen=True)
class Trial:
    """A candidate and what it came to.

    Attributes:
        candidate: The plan, and what was done to get there.
        parameters: Numbers that every client trains, noises and sends.
        size: Bytes of the deployed arrays.
        latency: Median microseconds of one int8 prediction, one thread.
        bytes: Bytes of one update on its way up.
        public_only: Accuracy before the rounds, on the held-out public examples.
        accuracy: Of the int8 model after the rehearsed rounds, on the same.
        judged: How many examples those are.
    """

    candidate: Candidate
    parameters: int
    size: int
    latency: float
    bytes: int
    public_only: float
    accuracy: float
    judged: int

    def value(self, kind: str) -> float:
        """Return the figure that a target of this kind limits."""
        return {"size": self.size, "latency": self.latency, "bytes": self.bytes}[kind]


def run_trial(candidate: Candidate, task: PublicHalf, prepared: Prepared) -> Trial:
    """Train, rehearse, convert and measure one candidate; teachers are trained once for all.

    Raises:
        ReticentError: If the plan's techniques do not fit its student, or it has no int8 form.
    """
    plan = candidate.plan
    check_codecs(plan)
    require_rehearsal(plan)
    schedule = schedule_for(plan)
    start = _prepared(plan, task, prepared)
    public_only = accuracy(start.student, task.test())
    start.layout.write(start.student, rehearse(plan, task, start, schedule))
    chain = _chain(merged(start.student))
    spec, _ = quantized(chain, task.public().inputs, plan.student.quantize)
    deployed = deploy(spec, BACKENDS[plan.student.quantize.backend], tuple(task.input_shape))
    trainer = LocalTrainer(plan, task, Constants.decode(start.constants))
    step = planned_step(plan, task, schedule)
    up, _ = encoded_bytes(plan, trainer, step, schedule)
    model = deployed.model
    return Trial(
        candidate=candidate,
        parameters=start.layout.size,
        size=len(deployed.data),
        latency=side_by_side({"": (model, task.test().inputs[:1])}, _REPEATS)[""].median_us,
        bytes=up,
        public_only=public_only,
        accuracy=accuracy(model, task.test()),
        judged=len(task.test().labels),
    )


def _prepared(plan: Plan, task: PublicHalf, prepared: Prepared) -> Start:
    # A run of its own, which holds what the rounds of a real run would begin with.
    section = plan.task.model_copy(update={"public_labels": task.labels})
    plan = plan.model_copy(update={"task": section})
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(create_run(Path(folder) / "run", plan))
        try:
            return prepare(plan, task, journal, lambda _: None, prepared)
        finally:
            journal.close()


def _chain(model: nn.Module) -> nn.Sequential:
    torch.set_num_threads(1)  # before the first integer prediction, see compression/bench.py
    if not is_chain(model):
        raise ArtifactError(
            f"student {type(model).__name__}: is not an nn.Sequential and has no int8 form"
        )
    return cast(nn.Sequential, model)
