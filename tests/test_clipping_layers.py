"""Layers written out by hand give what torch's own give, and their gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from reticent.core.update import Layout
from reticent.privacy.clipping import ClippedGradients, convolutions, positions
from reticent.privacy.clipping.convolutions import (
    KERNEL_ORDER,
    convolution_terms,
    convolved,
    input_gradient,
    rows_of,
)
from reticent.privacy.clipping.ghost import GhostGradients, pooled_first
from reticent.privacy.clipping.group_norms import normalised
from reticent.privacy.clipping.positions import Positions
from reticent.privacy.clipping.terms import Owners, Rows


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


def inner(*shape: int) -> torch.Tensor:
    """Random values with their channels innermost."""
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


@given(
    n=st.integers(1, 4),
    groups=st.integers(1, 3),
    width=st.integers(1, 3),
    height=st.integers(1, 5),
    common=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_a_group_norm_by_passes_is_torchs(
    n: int, groups: int, width: int, height: int, common: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    channels, layer = groups * width, nn.GroupNorm(groups, groups * width)
    before, back = inner(n, channels, height, 3), inner(n, channels, height, 3)
    rows = 1 if common else n
    scale, shift = torch.randn(rows, channels), torch.randn(rows, channels)
    with torch.no_grad():
        after, backward = normalised(layer, before, scale, shift, True)
        found = backward(back)

    exact = before.double().requires_grad_()
    weights = [w.double().expand(n, -1).clone().requires_grad_() for w in (scale, shift)]
    plain = F.group_norm(exact, groups, eps=layer.eps)
    expected = plain * weights[0][..., None, None] + weights[1][..., None, None]
    wanted = torch.autograd.grad(expected, [exact, *weights], back.double())
    assert found.before is not None
    torch.testing.assert_close(after.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.before.double(), wanted[0], rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(found.scale.double(), wanted[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.shift.double(), wanted[2], rtol=1e-4, atol=1e-4)


def test_the_variance_does_not_cancel_where_the_mean_is_large() -> None:
    torch.manual_seed(0)
    layer, before = nn.GroupNorm(2, 8), inner(3, 8, 6, 6) + 3000
    one, zero = torch.ones(1, 8), torch.zeros(1, 8)
    with torch.no_grad():
        after, _ = normalised(layer, before, one, zero, False)
    torch.testing.assert_close(after.double(), F.group_norm(before.double(), 2), rtol=0, atol=2e-3)


def test_a_gradient_that_nobody_needs_is_not_computed() -> None:
    layer, before = nn.GroupNorm(2, 8), inner(3, 8, 6, 6)
    with torch.no_grad():
        _, backward = normalised(layer, before, torch.ones(1, 8), torch.zeros(1, 8), False)
        assert backward(torch.ones_like(before)).before is None


@pytest.mark.parametrize("at_once", [1, 3000, 2**18])
@pytest.mark.parametrize("channels", [2, 8])
def test_a_convolutions_gradients_do_not_depend_on_how_many_are_made_at_once(
    monkeypatch: pytest.MonkeyPatch, channels: int, at_once: int
) -> None:
    monkeypatch.setattr(convolutions, "_AT_ONCE", at_once)
    torch.manual_seed(0)
    layer, before = nn.Conv2d(channels, 4, 3, 2, 1), inner(9, channels, 6, 5)
    leaf = before.clone().requires_grad_()
    expected = layer(leaf)
    back = inner(*expected.shape)
    with torch.no_grad():
        after = convolved(layer, layer.weight, layer.bias, before)
        of_input = input_gradient(layer, layer.weight, before, back)
        weight, bias = convolution_terms(layer, before, rows_of(back))
    torch.testing.assert_close(after, expected)
    torch.testing.assert_close(of_input, torch.autograd.grad(expected, leaf, back)[0])
    assert isinstance(weight, Rows) and isinstance(bias, Rows)
    for i in range(len(before)):
        single = torch.autograd.grad(
            layer(before[i : i + 1]), list(layer.parameters()), back[i : i + 1]
        )
        own = weight.values[i].view(3, 3, channels, 4).permute(3, 2, 0, 1)
        torch.testing.assert_close(own, single[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bias.values[i], single[1], rtol=1e-4, atol=1e-5)


SMALL = {
    "few places": (lambda: nn.Conv2d(16, 32, 3), (16, 4, 4), True),
    "one place": (lambda: nn.Conv2d(8, 9, 2, bias=False), (8, 2, 2), True),
    "strides": (lambda: nn.Conv2d(16, 24, (3, 2), (2, 3), (1, 0)), (16, 3, 4), True),
    "one channel": (lambda: nn.Conv2d(1, 64, 3), (1, 3, 3), True),
    "many places": (lambda: nn.Conv2d(8, 9, 2), (8, 6, 5), False),
}


@pytest.mark.parametrize("kind", list(SMALL))
@pytest.mark.parametrize("at_once", [1, 2**21])
def test_a_convolution_at_few_places_is_clipped_without_its_gradients(
    monkeypatch: pytest.MonkeyPatch, kind: str, at_once: int
) -> None:
    monkeypatch.setattr(positions, "_AT_ONCE", at_once)
    make, shape, short = SMALL[kind]
    torch.manual_seed(0)
    layer, before = make(), inner(7, *shape)
    back = inner(*layer(before).shape)
    single = [
        torch.autograd.grad(layer(x[None]), layer.weight, g[None])[0].detach()
        for x, g in zip(before, back, strict=True)
    ]
    with torch.no_grad():
        term = convolution_terms(layer, before, rows_of(back))[0]
    assert isinstance(term, Positions) == short
    norms = torch.stack([g.double().square().sum() for g in single])
    torch.testing.assert_close(term.squares(None), norms, rtol=1e-4, atol=0)
    assert not short or (term.squares(None) >= norms).all()  # no gradient is taken for shorter
    kept, factors, owners = torch.tensor([0, 2, 3, 6]), torch.rand(4), Owners((0, 1, 1, 4))
    total = torch.randn(3, layer.weight.numel() + 2)
    expected = total.clone()
    for owner, span in enumerate(owners.spans):
        for i in range(span.start, span.stop):
            expected[owner, 1:-1] += factors[i] * single[kept[i]].flatten()
    term.add_weighted(total[:, 1:-1], kept, factors, owners)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)
    assert "rows" not in vars(term)
    mask = (torch.rand(layer.weight.shape) < 0.5).float()
    norms = torch.stack([(mask * g).double().square().sum() for g in single])
    found = term.squares(mask.permute(KERNEL_ORDER).contiguous())
    torch.testing.assert_close(found, norms, rtol=1e-4, atol=0)


def test_clipping_a_large_convolution_takes_less_memory_than_its_gradients() -> None:
    torch.manual_seed(0)
    layer, inputs = nn.Conv2d(96, 128, 3), torch.randn(32, 96, 3, 3)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(128, 3))
    gradients = ClippedGradients(model, Layout.of(model))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        gradients.sum(inputs, torch.arange(32) % 3, cross_entropy, 1.0)
    largest = max(event.cpu_memory_usage for event in seen.events() or [])
    assert largest < 4 * 32 * layer.weight.numel() / 4  # all of them written out, and a quarter


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1, ceil_mode=True)])
def test_a_relu_behind_its_max_pooling_gives_the_same_bits(pool: nn.MaxPool2d) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.ReLU(), pool, nn.Conv2d(8, 4, 2), nn.ReLU(), nn.Flatten()),
        nn.LazyLinear(3),
    )
    inputs, labels = torch.randn(6, 1, 11, 9).round(), torch.arange(6) % 3  # with ties
    model(inputs)
    kinds = [type(layer) for layer in pooled_first(tuple(model))]
    assert kinds[1:3] == [nn.MaxPool2d, nn.ReLU] and kinds[4] is nn.ReLU

    def found(layers: tuple[nn.Module, ...], swapped: bool) -> list[torch.Tensor]:
        gradients = GhostGradients(layers)
        if not swapped:
            gradients._layers = layers
        terms = gradients.terms(inputs, labels, lambda a, b: F.cross_entropy(a, b, reduction="sum"))
        return [term.squares(None) for term in terms]

    for ours, plain in zip(found(tuple(model), True), found(tuple(model), False), strict=True):
        assert torch.equal(ours, plain)


def test_an_example_that_is_not_finite_stays_alone_behind_a_group_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        nn.Linear(72, 3),
    )
    inputs, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    gradients = ClippedGradients(model, Layout.of(model))
    loss = lambda a, b: F.cross_entropy(a, b, reduction="sum")  # noqa: E731
    expected = gradients.sum(inputs[:3], labels[:3], loss, 1.0)
    inputs[3, 0, 2, 2] = torch.nan
    found = gradients.sum(inputs, labels, loss, 1.0)
    torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(expected))
