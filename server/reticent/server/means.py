"""What public data are learned with: the device, the precision, and where the state lies."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from reticent.core.errors import DependencyError
from reticent.core.plan import Plan


@dataclass(frozen=True)
class Means:
    """How one model is trained on public data; the keys of the plan's ``teacher`` section.

    Attributes:
        device: ``cpu`` or ``cuda``.
        precision: ``fp32``, ``bf16`` or ``fp16``, for convolutions and matrix products.
        offload: ``none``, ``disk``, ``cpu`` or ``zero``. A plan allows the last two on a GPU only;
            they run on a CPU too, without being of use there.
    """

    device: str = "cpu"
    precision: str = "fp32"
    offload: str = "none"


PLAIN = Means()
"""The CPU, float32, and everything in memory."""


def teacher_means(plan: Plan) -> Means:
    """Return what the plan's teachers are trained with."""
    section = plan.teacher
    return Means(section.device, section.precision, section.offload)


def student_means(plan: Plan) -> Means:
    """Return what the dense student is trained with, always in float32.

    It is on the teacher's device, as it asks the teacher in every step; but on the CPU after a
    teacher that may be larger than that device's memory.
    """
    section = plan.teacher
    return Means(section.device if section.offload == "none" else "cpu")


def require_means(plan: Plan) -> None:
    """Check that this machine has what the plan's teacher is trained with.

    Raises:
        DependencyError: If it is to be trained on a GPU and torch sees none, or DeepSpeed is
            needed and not installed.
    """
    section = plan.teacher
    if section.offload == "zero" and importlib.util.find_spec("deepspeed") is None:
        raise DependencyError(
            'teacher.offload="zero" needs the Python package deepspeed: '
            "pip install 'reticent[deepspeed]'"
        )
    if section.device == "cuda" and not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        raise DependencyError(
            'teacher.device="cuda": must be "cpu" on this machine: torch '
            f"{torch.__version__} ({built}) sees no GPU"
        )


@contextmanager
def moved(device: str, *modules: nn.Module) -> Iterator[None]:
    """Have modules on a device while the block runs, and in CPU memory afterwards."""
    try:
        for module in modules:
            module.to(device)
        yield
    finally:
        for module in modules:
            module.to("cpu")
