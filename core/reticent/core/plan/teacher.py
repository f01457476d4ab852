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
        device: Where the teacher and the dense student are trained: ``cuda`` is the first NVIDIA
            GPU. What comes of it lies in CPU memory, as float32.
        precision: ``bf16`` runs the teacher's convolutions and products in bfloat16 (weights,
            optimizer and loss stay float32). It has float32's range, so no loss is scaled.
            ``fp16`` does so in float16, and scales the loss, as small gradients vanish there.
        offload: Where what belongs to the teacher lies while it is trained. ``disk``, on the CPU:
            weights, gradients and optimizer state in files, for a teacher that is larger than
            memory. On a GPU: ``cpu`` keeps all three in the host's memory (PyTorch's FSDP2), and
            ``zero`` gradients and optimizer state (DeepSpeed's ZeRO-Offload).
        trained: What the weights that the task's models begin with cost in privacy; absent: models
            begin at random, or at weights that the task declares public.
    """

    epochs: Count = 30
    learning_rate: Positive = 0.01
    count: Count = 1
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    offload: Literal["none", "disk", "cpu", "zero"] = "none"
    trained: Trained | None = None

    @model_validator(mode="after")
    def _offload_fits(self) -> Self:
        if self.device == "cpu" and self.offload in ("cpu", "zero"):
            raise ValueError(
                f'offload="{self.offload}": must be "none" or "disk" when teacher.device is "cpu", '
                "because it moves to the host's memory what lies there already and keeps a copy; "
                'use "disk" for a teacher that is larger than memory'
            )
        if self.device == "cuda" and self.offload == "disk":
            raise ValueError(
                'offload="disk": must be "none", "cpu" or "zero" when teacher.device is "cuda", '
                "because a GPU computes on nothing that lies in a file"
            )
        if self.precision == "fp16" and self.offload == "zero":
            raise ValueError(
                'precision="fp16": must be "fp32" or "bf16" when teacher.offload is "zero", '
                "because DeepSpeed takes the steps then and nothing here scales its loss"
            )
        return self
