"""Testing models on the server: public and test data only."""

from __future__ import annotations

from contextlib import nullcontext

from torch import nn

from reticent.compression.quantize import quantized_weights
from reticent.core.plan import Plan
from reticent.core.tasks import Examples
from reticent.core.update import Layout, Vector

from .public_training import accuracy


def test_accuracy(
    plan: Plan, model: nn.Module, layout: Layout, weights: Vector, test: Examples
) -> float:
    """Return the accuracy of ``weights`` as they would be deployed: with quantized weights."""
    layout.write(model, weights)
    swap = quantized_weights(model) if plan.student.quantize.kind == "qat" else nullcontext()
    with swap:
        return accuracy(model, test)
