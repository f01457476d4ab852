"""The teacher, and what weights that learned from private data cost."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ..section import Count, Positive, Probability, Section


class Trained(Section):
    """How the weights that the task's models bring along learned from the clients' private data.

    A declaration: nobody but whoever trained them can know. Every device charges the event to its
    ledger, once for these weights, before its first release of the run.

    Attributes:
        weights: SHA-256 of the weights, which `reticent plan check` tells.
        sampling_rate: Probability q at which each unit joined a step; 1 is the plain Gaussian
            mechanism.
        noise_multiplier: Standard deviation of the noise over the bound of one unit's contribution.
        steps: Sums taken.
        unit: What the noise was meant for.
        relation: How its neighbour differed.
    """

    weights: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    sampling_rate: Probability
    noise_multiplier: Annotated[float, Field(ge=1e-9, le=1e9)]
    steps: Annotated[int, Field(ge=1, lt=2**63)]
    unit: Literal["example", "client"]
    relation: Literal["add-or-remove-one", "replace-one"]


class Teacher(Section):
    """Training of the teacher on the public split.

    Attributes:
        count: How many teachers are trained, from different initial weights; the student learns
            from the mean of their softened answers.
        precision: ``bf16`` runs the teacher's convolutions and products in bfloat16 (weights,
            optimizer and loss stay float32). It has float32's range, so no loss is scaled.
        offload: ``disk`` keeps weights, gradients and optimizer state of the teacher in files while
            it is trained, for a teacher that is larger than memory.
        trained: What the weights that the task's models begin with cost in privacy; absent: models
            begin at random, or at weights that the task declares public.
    """

    epochs: Count = 30
    learning_rate: Positive = 0.01
    count: Count = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    offload: Literal["none", "disk"] = "none"
    trained: Trained | None = None

    @model_validator(mode="after")
    def _no_half_precision(self) -> Self:
        if self.precision == "fp16":
            raise ValueError(
                'precision="fp16": must be "fp32" or "bf16": training runs on the CPU, and small '
                "gradients vanish in float16 unless the loss is scaled"
            )
        return self
