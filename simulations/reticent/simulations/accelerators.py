"""Whether a plan's student can be trained on the device that the plan names."""

from __future__ import annotations

import torch

from reticent.client.accelerated import unaccelerated
from reticent.client.training import student_model
from reticent.core.errors import DataError, DependencyError
from reticent.core.plan import Plan
from reticent.core.protocol import Constants
from reticent.core.tasks import Task

from .devices import ACCELERATORS


def require_suited(plan: Plan, task: Task, constants: Constants, accelerator: str = "cpu") -> None:
    """Check on random inputs that gradients of many clients at once are those of each.

    Args:
        plan: The plan; nothing is asked of it with ``engine.device = "cpu"``.
        task: Its task.
        constants: The run's, or a sketch of them.
        accelerator: Name of the torch device to try; by default one that every machine has.

    Raises:
        DataError: If they are not, or torch cannot compute them.
    """
    if ACCELERATORS[plan.engine.device] is None:
        return
    with torch.random.fork_rng(devices=[]):
        model = student_model(task, plan, constants)
        reason = unaccelerated(plan, model, task.input_shape, accelerator)
    if reason:
        raise DataError(
            f'engine.device="{plan.engine.device}": must be "cpu" with this student: {reason}'
        )


def require_accelerator(plan: Plan, task: Task, constants: Constants) -> None:
    """Check that the plan's device is there, and computes what the CPU does.

    Raises:
        DependencyError: If it is not there.
        DataError: If it does not.
    """
    accelerator = ACCELERATORS[plan.engine.device]
    if accelerator is None:
        return
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise DependencyError(
            f'engine.device="cuda": torch {torch.__version__} finds no GPU here; use '
            'engine.device="cpu", or a machine with one, its driver and a torch built for CUDA'
        )
    require_suited(plan, task, constants, accelerator)
