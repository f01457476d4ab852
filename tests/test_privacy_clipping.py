"""Clipped sums of per-example gradients: the guarantee's table, row by row."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.nn import functional as F

from reticent.compression.fold import fold_batchnorm
from reticent.compression.quantize import quantized_weights
from reticent.core.errors import DataError
from reticent.core.models import student
from reticent.core.update import Layout
from reticent.privacy.clipping import ClippedGradients


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


def model_of(kind: str = "tiny", seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return fold_batchnorm(student(kind, (1, 8, 8), 10).eval())


def batch_of(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 1, 8, 8, generator=generator)
    return inputs, torch.randint(0, 10, (count,), generator=generator)


def micro_batch_sum(
    model: nn.Module, layout: Layout, inputs: torch.Tensor, labels: torch.Tensor, clip: float
) -> np.ndarray:
    """The same sum by a plain loop over examples, in float64."""
    total = np.zeros(layout.size)
    for one in range(len(labels)):
        loss = cross_entropy(model(inputs[one : one + 1]), labels[one : one + 1])
        gradient = layout.gather(list(torch.autograd.grad(loss, list(model.parameters()))))
        norm = np.linalg.norm(gradient.astype(np.float64))
        total += gradient * min(1.0, clip / norm)
    return total


def random_mask(layout: Layout, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(layout.total) < 0.5


@pytest.mark.parametrize("kind", ["tiny", "tiny-gn"])
@pytest.mark.parametrize("clip", [0.1, 1.0, 1e6])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_a_micro_batch_loop(kind: str, clip: float, masked: bool) -> None:
    model = model_of(kind)
    mask = random_mask(Layout.of(model)) if masked else None
    layout = Layout.of(model, mask)
    inputs, labels = batch_of(17)
    expected = micro_batch_sum(model, layout, inputs, labels, clip)
    found = ClippedGradients(model, layout, microbatch=5).sum(inputs, labels, cross_entropy, clip)
    np.testing.assert_allclose(found, expected, atol=2e-5 * max(1.0, np.abs(expected).max()))


def test_equals_opacus_own_optimizer() -> None:
    model, clip = model_of(), 0.5
    inputs, labels = batch_of(12)
    layout = Layout.of(model)
    found = ClippedGradients(model, layout).sum(inputs, labels, cross_entropy, clip)
    twin = model_of().train()
    wrapped = GradSampleModule(twin, loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(wrapped.parameters(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=clip,
        expected_batch_size=1,
        loss_reduction="sum",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        cross_entropy(wrapped(inputs), labels).backward()
    optimizer.clip_and_accumulate()
    summed = [p.summed_grad for p in twin.parameters()]  # pyright: ignore
    np.testing.assert_allclose(found, layout.gather(summed), atol=1e-5)


def test_quantized_weights_are_those_of_a_micro_batch_loop() -> None:
    model = model_of()
    layout = Layout.of(model)
    inputs, labels = batch_of(9)
    before = layout.read(model)
    with quantized_weights(model):
        expected = micro_batch_sum(model, layout, inputs, labels, 1.0)
    plain = micro_batch_sum(model, layout, inputs, labels, 1.0)
    found = ClippedGradients(model, layout).sum(
        inputs, labels, cross_entropy, 1.0, quantized_weights
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - plain).max() > 1e-4, "the weights were not quantized"
    assert (layout.read(model) == before).all()


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 12),
    clip=st.floats(1e-3, 10),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 1000),
)
def test_adding_or_removing_one_example_moves_the_sum_by_at_most_the_clip(
    count: int, clip: float, scale: float, seed: int
) -> None:
    model = model_of(seed=seed % 3)
    layout = Layout.of(model)
    inputs, labels = batch_of(count, seed)
    inputs = inputs * scale
    gradients = ClippedGradients(model, layout)
    whole = gradients.sum(inputs, labels, cross_entropy, clip)
    without = gradients.sum(inputs[1:], labels[1:], cross_entropy, clip)
    # Float32 rounding of sums of up to 12 gradients is not part of the guarantee.
    assert np.linalg.norm(whole - without) <= clip * (1 + 1e-4)


def test_sum_without_clipping_breaks_the_bound() -> None:
    """The bound above is not true of just any sum."""
    model = model_of()
    layout = Layout.of(model)
    inputs, labels = batch_of(3)
    gradients = ClippedGradients(model, layout)
    whole = gradients.sum(inputs * 100, labels, cross_entropy, 1e9)
    without = gradients.sum(inputs[1:] * 100, labels[1:], cross_entropy, 1e9)
    assert np.linalg.norm(whole - without) > 1.0


def test_a_non_finite_gradient_counts_as_zero() -> None:
    model = model_of()
    layout = Layout.of(model)
    inputs, labels = batch_of(4)
    gradients = ClippedGradients(model, layout)
    expected = gradients.sum(inputs[1:], labels[1:], cross_entropy, 1.0)
    inputs[0] = float("nan")
    found = gradients.sum(inputs, labels, cross_entropy, 1.0)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_an_empty_batch_gives_zero() -> None:
    model = model_of()
    inputs, labels = batch_of(0)
    found = ClippedGradients(model, Layout.of(model)).sum(inputs, labels, cross_entropy, 1.0)
    assert (found == 0).all()


def test_zero_gradients_stay_zero() -> None:
    model = model_of()
    inputs, labels = batch_of(3)
    zero = ClippedGradients(model, Layout.of(model)).sum(
        inputs, labels, lambda logits, _: 0 * logits.sum(), 1.0
    )
    assert (zero == 0).all()


def test_pruned_coordinates_have_no_gradient_and_no_share_of_the_norm() -> None:
    model = model_of()
    mask = random_mask(Layout.of(model))
    layout = Layout.of(model, mask)
    inputs, labels = batch_of(1)
    found = ClippedGradients(model, layout).sum(inputs, labels, cross_entropy, 1e-3)
    assert found.shape == (int(mask.sum()),)
    assert np.linalg.norm(found) == pytest.approx(1e-3, rel=1e-4)


def test_batch_normalisation_is_refused() -> None:
    torch.manual_seed(0)
    model = student("tiny", (1, 8, 8), 10)
    with pytest.raises(DataError, match="batch normalisation"):
        ClippedGradients(model, Layout.of(model))


def test_a_parameter_that_is_not_used_is_refused() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = Unused()
    gradients = ClippedGradients(model, Layout.of(model))
    with pytest.raises(DataError, match="no per-example gradient"):
        gradients.sum(torch.randn(3, 4), torch.zeros(3, dtype=torch.int64), cross_entropy, 1.0)
