"""Training on a graphics processor: the passes of a cohort at once, and everything else here.

Batches, noise, rounding of weights, local rules and the moves of the weights stay on the host, by
the code that every client runs (:mod:`.together`); only gradient sums come from the device.
"""

from __future__ import annotations

import torch
from torch import nn

from reticent.compression.adapt import Frozen
from reticent.core.plan import Plan
from reticent.core.update import Layout
from reticent.privacy.clipping import FunctionalGradients, unfit
from reticent.privacy.clipping.bounds import Clipping

_EXAMPLES, _NUMBERS = 4096, 2**27
"""Most examples of a pass on a device other than the CPU, and most numbers in one copy of their
gradients: half a GiB, of which a pass has a few."""


def accelerated(
    model: nn.Module, layout: Layout, clipping: Clipping, accelerator: str
) -> FunctionalGradients:
    """Return what computes gradient sums on ``accelerator``, a name of a torch device."""
    device = torch.device(accelerator)
    examples = 64 if device.type == "cpu" else min(_EXAMPLES, max(1, _NUMBERS // layout.total))
    return FunctionalGradients(model, layout, examples, clipping, device)


def unaccelerated(
    plan: Plan, model: nn.Module, shape: tuple[int, ...], accelerator: str = "cpu"
) -> str | None:
    """Return why a plan's student cannot be trained there; None if it can. Reads no data.

    Args:
        plan: The plan.
        model: Its student.
        shape: Of one example.
        accelerator: Name of a torch device.
    """
    held = any(isinstance(layer, Frozen) for layer in model.modules())
    if held and plan.student.quantize.kind == "qat":
        return "the merged weights of its adapted layers are rounded in training"
    return unfit(model, shape, torch.device(accelerator))
