"""Testing models on the server: public and test data only."""

from __future__ import annotations

from torch import nn

from reticent.compression.quantize import evaluation_swap
from reticent.core.plan import Plan
from reticent.core.tasks import Examples
from reticent.core.update import Layout, Vector

from .public_training import accuracy


def test_accuracy(
    plan: Plan, model: nn.Module, layout: Layout, weights: Vector, test: Examples
) -> float:
    """Return the accuracy of ``weights`` as they would be deployed: with quantized weights."""
    layout.write(model, weights)
    with evaluation_swap(plan.student.quantize)(model):
        return accuracy(model, test)
