"""Clipped sums of per-example gradients: the guarantee's table, row by row, for every method."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.optimizers.perlayeroptimizer import DPPerLayerOptimizer
from torch import nn
from torch.nn import functional as F

from reticent.compression.fold import fold_batchnorm
from reticent.compression.quantize import quantized_weights
from reticent.core.models import student
from reticent.core.update import Layout
from reticent.privacy.clipping import ClippedGradients
from reticent.privacy.clipping.bounds import Bounds, Clipping
from reticent.privacy.clipping.sums import Method

METHODS, CLIPPINGS = get_args(Method), get_args(Clipping)
every_method = pytest.mark.parametrize("method", METHODS)
every_clipping = pytest.mark.parametrize("clipping", CLIPPINGS)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


def model_of(kind: str = "tiny", seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    if kind == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))
    if kind == "sequence":  # a linear layer at eight places of each example
        return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Flatten(), nn.Linear(96, 10))
    model = student(kind, (1, 8, 8), 10)
    assert isinstance(model, nn.Sequential)
    return fold_batchnorm(model.eval())


def batch_of(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 1, 8, 8, generator=generator)
    return inputs, torch.randint(0, 10, (count,), generator=generator)


def blocks(layout: Layout, vector: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    return np.split(vector, np.cumsum(layout.blocks)[:-1])


def clipped_by_hand(
    layout: Layout, gradient: NDArray[np.float64], clip: float, clipping: str
) -> NDArray[np.float64]:
    if clipping == "flat":
        return gradient * min(1.0, clip / np.linalg.norm(gradient))
    parts = [
        part * min(1.0, clip * (len(part) / layout.size) ** 0.5 / np.linalg.norm(part))
        for part in blocks(layout, gradient)
        if len(part)
    ]
    return np.concatenate(parts)


def micro_batch_sum(
    model: nn.Module,
    layout: Layout,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    clip: float,
    clipping: str = "flat",
) -> NDArray[np.float64]:
    """The same sum by a plain loop over examples, in float64."""
    total = np.zeros(layout.size)
    for one in range(len(labels)):
        loss = cross_entropy(model(inputs[one : one + 1]), labels[one : one + 1])
        gradient = layout.gather(list(torch.autograd.grad(loss, list(model.parameters()))))
        total += clipped_by_hand(layout, gradient.astype(np.float64), clip, clipping)
    return total


def random_mask(layout: Layout, seed: int = 0) -> NDArray[np.bool_]:
    return np.random.default_rng(seed).random(layout.total) < 0.5


def mask_without_a_tensor(layout: Layout) -> NDArray[np.bool_]:
    mask = random_mask(layout)
    mask[: layout.sizes[0]] = False
    return mask


@every_method
@every_clipping
@pytest.mark.parametrize("kind", ["tiny", "tiny-gn", "wide", "mlp", "sequence"])
@pytest.mark.parametrize("clip", [0.1, 1e6])
@pytest.mark.parametrize("masking", [None, random_mask, mask_without_a_tensor])
def test_equals_a_micro_batch_loop(
    kind: str,
    clip: float,
    masking: Callable[[Layout], NDArray[np.bool_]] | None,
    clipping: Clipping,
    method: Method,
) -> None:
    model = model_of(kind)
    layout = Layout.of(model, masking(Layout.of(model)) if masking else None)
    inputs, labels = batch_of(11)
    expected = micro_batch_sum(model, layout, inputs, labels, clip, clipping)
    gradients = ClippedGradients(model, layout, 4, clipping, method)
    found = gradients.sum(inputs, labels, cross_entropy, clip)
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(1.0, np.abs(expected).max()))


@every_method
def test_equals_opacus_own_flat_optimizer(method: Method) -> None:
    check_against_opacus(DPOptimizer, "flat", 0.5, method)


@every_method
def test_equals_opacus_own_per_layer_optimizer(method: Method) -> None:
    layout = Layout.of(model_of())
    clips = [0.5 * (size / layout.total) ** 0.5 for size in layout.sizes]
    check_against_opacus(DPPerLayerOptimizer, "per-layer", clips, method)


def check_against_opacus(
    kind: type[DPOptimizer], clipping: Clipping, clip: float | list[float], method: Method
) -> None:
    model = model_of()
    inputs, labels = batch_of(12)
    layout = Layout.of(model)
    gradients = ClippedGradients(model, layout, clipping=clipping, method=method)
    found = gradients.sum(inputs, labels, cross_entropy, 0.5)
    twin = model_of().train()
    wrapped = GradSampleModule(twin, loss_reduction="sum")
    optimizer = kind(
        torch.optim.SGD(wrapped.parameters(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=clip,  # pyright: ignore[reportArgumentType]
        expected_batch_size=1,
        loss_reduction="sum",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        cross_entropy(wrapped(inputs), labels).backward()
    optimizer.clip_and_accumulate()
    summed = [p.summed_grad for p in twin.parameters()]  # pyright: ignore
    np.testing.assert_allclose(found, layout.gather(summed), atol=1e-5)


@every_method
def test_quantized_weights_are_those_of_a_micro_batch_loop(method: Method) -> None:
    model = model_of()
    layout = Layout.of(model)
    inputs, labels = batch_of(9)
    before = layout.read(model)
    with quantized_weights(model):
        expected = micro_batch_sum(model, layout, inputs, labels, 1.0)
    plain = micro_batch_sum(model, layout, inputs, labels, 1.0)
    found = ClippedGradients(model, layout, method=method).sum(
        inputs, labels, cross_entropy, 1.0, quantized_weights
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - plain).max() > 1e-4, "the weights were not quantized"
    assert (layout.read(model) == before).all()


NASTY = (0.0, 1e-45, 1e-30, 1.0, -3.0, 1e9, 1e17, 1e20, 3e38, float("inf"), float("nan"))
nasty = st.lists(st.sampled_from(NASTY), min_size=1, max_size=6)


@every_method
@every_clipping
@settings(max_examples=40, deadline=None)
@given(
    scales=nasty,
    weights=nasty,
    clip=st.sampled_from([1e-12, 1e-3, 1.0, 1e6]),
    kind=st.sampled_from(["tiny", "mlp"]),
    masked=st.booleans(),
)
@example(scales=[1e17, 1.0], weights=[1e-30, 3e38], clip=1e-12, kind="mlp", masked=True)
def test_adding_or_removing_one_example_moves_the_sum_by_at_most_the_clip(
    scales: list[float],
    weights: list[float],
    clip: float,
    kind: str,
    masked: bool,
    clipping: Clipping,
    method: Method,
) -> None:
    """Inputs and losses are multiplied by anything: zero, denormal, huge, infinite or NaN."""
    model = model_of(kind)
    layout = Layout.of(model, random_mask(Layout.of(model)) if masked else None)
    count = min(len(scales), len(weights))
    inputs, classes = batch_of(count)
    inputs = inputs * torch.tensor(scales[:count]).view(-1, 1, 1, 1)
    factors = torch.tensor(weights[:count])

    def loss(logits: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        return (factors[which] * F.cross_entropy(logits, classes[which], reduction="none")).sum()

    gradients = ClippedGradients(model, layout, 64, clipping, method)
    whole = gradients.sum(inputs, torch.arange(count), loss, clip)
    without = gradients.sum(inputs[1:], torch.arange(1, count), loss, clip)
    # Float32 rounding of sums of up to 6 gradients is not part of the guarantee.
    assert np.linalg.norm(whole - without) <= clip * (1 + 1e-4)
    if clipping == "per-layer":
        shares = Bounds.of(layout, clipping).shares
        for part, share in zip(blocks(layout, whole - without), shares, strict=True):
            assert np.linalg.norm(part) <= clip * (share + 1e-4)


@every_method
@every_clipping
def test_the_bound_holds_where_a_factor_would_be_rounded_up_among_denormal_numbers(
    clipping: Clipping, method: Method
) -> None:
    """A gradient of 3000 is 1e-35 times 3e38: scaling the first would give 1.7 times the clip."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    inputs, clip = torch.tensor([[3e38]]), 2.5e-7
    gradients = ClippedGradients(model, Layout.of(model), 64, clipping, method)
    found = gradients.sum(inputs, torch.zeros(1), lambda out, _: 1e-35 * out.sum(), clip)
    assert np.abs(found).max() <= clip * (1 + 1e-6)


@every_method
def test_sum_without_clipping_breaks_the_bound(method: Method) -> None:
    """The bound above is not true of just any sum."""
    model = model_of()
    layout = Layout.of(model)
    inputs, labels = batch_of(3)
    gradients = ClippedGradients(model, layout, method=method)
    whole = gradients.sum(inputs * 100, labels, cross_entropy, 1e9)
    without = gradients.sum(inputs[1:] * 100, labels[1:], cross_entropy, 1e9)
    assert np.linalg.norm(whole - without) > 1.0


@every_method
@every_clipping
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["tiny", "mlp"])
def test_a_non_finite_gradient_counts_as_zero(
    kind: str, value: float, clipping: Clipping, method: Method
) -> None:
    model = model_of(kind)
    layout = Layout.of(model)
    inputs, labels = batch_of(4)
    gradients = ClippedGradients(model, layout, 64, clipping, method)
    expected = gradients.sum(inputs[1:], labels[1:], cross_entropy, 1.0)
    inputs[0, 0, 3, 3] = value
    found = gradients.sum(inputs, labels, cross_entropy, 1.0)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@every_method
@every_clipping
def test_a_gradient_that_is_non_finite_in_one_tensor_counts_as_zero_in_all(
    clipping: Clipping, method: Method
) -> None:
    """The last layer's input is huge, and so is its weight's gradient, but not its bias's."""
    last = nn.Linear(4, 2)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), last)
    layout = Layout.of(model)
    nn.init.zeros_(last.weight)
    inputs = torch.full((2, 4), 1e30)
    inputs[1] = 1.0
    labels = torch.zeros(2, dtype=torch.int64)
    gradients = ClippedGradients(model, layout, 64, clipping, method)
    found = gradients.sum(inputs, labels, cross_entropy, 1.0)
    alone = gradients.sum(inputs[1:], labels[1:], cross_entropy, 1.0)
    np.testing.assert_allclose(found, alone, atol=1e-7)
    assert np.abs(alone[-2:]).max() > 0.01


@every_method
@every_clipping
def test_an_empty_batch_gives_zero(clipping: Clipping, method: Method) -> None:
    model = model_of()
    inputs, labels = batch_of(0)
    gradients = ClippedGradients(model, Layout.of(model), 64, clipping, method)
    found = gradients.sum(inputs, labels, cross_entropy, 1.0)
    assert found.shape == (Layout.of(model).size,) and (found == 0).all()


@every_method
@every_clipping
def test_zero_gradients_stay_zero(clipping: Clipping, method: Method) -> None:
    model = model_of()
    inputs, labels = batch_of(3)
    gradients = ClippedGradients(model, Layout.of(model), 64, clipping, method)
    zero = gradients.sum(inputs, labels, lambda logits, _: 0 * logits.sum(), 1.0)
    assert (zero == 0).all()


@every_method
@every_clipping
@pytest.mark.parametrize("kind", ["tiny", "tiny-gn", "mlp"])
def test_pruned_coordinates_have_no_gradient_and_no_share_of_the_norm(
    kind: str, clipping: Clipping, method: Method
) -> None:
    model = model_of(kind)
    layout = Layout.of(model, mask_without_a_tensor(Layout.of(model)))
    inputs, labels = batch_of(1)
    gradients = ClippedGradients(model, layout, 64, clipping, method)
    found = gradients.sum(inputs, labels, cross_entropy, 1e-6)
    assert found.shape == (layout.size,)
    assert np.linalg.norm(found) == pytest.approx(1e-6, rel=1e-4)


@every_method
@every_clipping
def test_a_mask_that_keeps_nothing_gives_an_empty_vector(
    clipping: Clipping, method: Method
) -> None:
    model = model_of("mlp")
    layout = Layout.of(model, np.zeros(Layout.of(model).total, dtype=bool))
    gradients = ClippedGradients(model, layout, 64, clipping, method)
    assert gradients.sum(*batch_of(3), cross_entropy, 1.0).shape == (0,)


@every_method
def test_per_layer_bounds_of_a_single_tensor_are_flat_clipping(method: Method) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    layout = Layout.of(model)
    batch = batch_of(7)
    flat = ClippedGradients(model, layout, 64, "flat", method)
    expected = flat.sum(*batch, cross_entropy, 0.3)
    twin = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    twin.load_state_dict(model.state_dict())
    layers = ClippedGradients(twin, layout, 64, "per-layer", method)
    assert np.array_equal(layers.sum(*batch, cross_entropy, 0.3), expected)


@every_method
def test_bounds_above_every_norm_make_per_layer_flat_and_both_the_plain_gradient(
    method: Method,
) -> None:
    inputs, labels = batch_of(7)
    found = []
    for clipping in CLIPPINGS:
        model = model_of()
        gradients = ClippedGradients(model, Layout.of(model), 64, clipping, method)
        found.append(gradients.sum(inputs, labels, cross_entropy, 1e9))
    model = model_of()
    loss = cross_entropy(model(inputs), labels)
    plain = Layout.of(model).gather(list(torch.autograd.grad(loss, list(model.parameters()))))
    assert np.array_equal(*found)
    np.testing.assert_allclose(found[0], plain, rtol=1e-4, atol=1e-5)


def test_the_squares_of_the_per_layer_bounds_sum_to_the_square_of_the_clip() -> None:
    layout = Layout.of(model_of(), mask_without_a_tensor(Layout.of(model_of())))
    shares = Bounds.of(layout, "per-layer").shares
    assert (shares**2).sum() == pytest.approx(1.0, rel=1e-12)
    assert shares[0] == 0 and (shares[1:] > 0).all()
