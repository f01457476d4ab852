"""Recorded gradients of layers joined in any way: the sums of hooks and of a plain loop."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from graph_students import CLASSES, LENGTH, Block, Places, Residual, With
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from owned_students import Codes
from torch import nn
from torch.nn import functional as F

from reticent.compression.quantize import quantized_weights
from reticent.core.errors import DataError
from reticent.core.update import Layout
from reticent.privacy.clipping import ClippedGradients
from reticent.privacy.clipping.bounds import Bounds, Clipping
from reticent.privacy.clipping.terms import Owners

IMAGE, CODES = (2, 8, 7), (LENGTH,)

STUDENTS: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    "block": (CODES, Block),
    "residual": (IMAGE, Residual),
    "places": (IMAGE, Places),
    "linear": (CODES, lambda: With(nn.Linear(5, 4), 4)),
    "linear-at-positions": (IMAGE, lambda: With(nn.Linear(7, 2), 32)),
    "convolution": (IMAGE, lambda: With(nn.Conv2d(2, 3, (3, 2), (2, 1), (1, 0)), 72)),
    "group-norm": (IMAGE, lambda: With(nn.GroupNorm(1, 2), 112)),
    "layer-norm": (CODES, lambda: With(nn.LayerNorm(5), 5)),
    "layer-norm-without-bias": (CODES, lambda: With(nn.LayerNorm(5, bias=False), 5)),
    "padded": (CODES, lambda: nn.Sequential(Codes(4), With(nn.Embedding(4, 4, padding_idx=3), 20))),
    "layer-norm-of-images": (IMAGE, lambda: With(nn.LayerNorm((8, 7)), 112)),
}

NOT_FOR_OPACUS = ("residual", "layer-norm-without-bias", "padded")
"""It wants a bias, nothing changed in place behind a layer, and tables without a row for padding.
"""


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


def made(kind: str) -> nn.Module:
    torch.manual_seed(1)
    return STUDENTS[kind][1]()


def batch_of(kind: str, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    inputs = 2 * torch.randn(count, *STUDENTS[kind][0], generator=draws)
    return inputs, torch.randint(0, CLASSES, (count,), generator=draws)


def layout_of(model: nn.Module, share: float) -> Layout:
    return Layout.of(model, np.random.default_rng(0).random(Layout.of(model).total) < share)


def recorded(kind: str, model: nn.Module, layout: Layout, *args: object) -> ClippedGradients:
    gradients = ClippedGradients(model, layout, *args, shape=STUDENTS[kind][0])  # pyright: ignore
    assert gradients.method == "graph"
    return gradients


def by_hand(
    model: nn.Module,
    layout: Layout,
    batch: tuple[torch.Tensor, torch.Tensor],
    clip: float,
    clipping: Clipping,
) -> NDArray[np.float64]:
    total, shares = np.zeros(layout.size), Bounds.of(layout, clipping).shares
    for one, label in zip(*batch, strict=True):
        loss = cross_entropy(model(one[None]), label[None])
        gradient = layout.gather(list(torch.autograd.grad(loss, list(model.parameters()))))
        gradient = gradient.astype(np.float64)
        parts, bounds = [gradient], np.array([clip])
        if clipping == "per-layer":
            parts, bounds = np.split(gradient, np.cumsum(layout.blocks)[:-1]), clip * shares
        total += np.concatenate(
            [
                p * min(1.0, b / max(1e-300, float(np.linalg.norm(p))))
                for p, b in zip(parts, bounds, strict=True)
            ]
        )
    return total


@pytest.mark.parametrize("kind", list(STUDENTS))
@settings(max_examples=8, deadline=None)
@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    clipping=st.sampled_from(["flat", "per-layer"]),
    clip=st.sampled_from([1e-3, 0.5, 1e6]),
    share=st.sampled_from([1.0, 0.4]),
    rounded=st.booleans(),
    microbatch=st.sampled_from([1, 3, 64]),
    seed=st.integers(0, 1000),
)
def test_every_owner_gets_the_sum_of_hooks_and_of_a_loop_over_examples(
    kind: str,
    counts: list[int],
    clipping: Clipping,
    clip: float,
    share: float,
    rounded: bool,
    microbatch: int,
    seed: int,
) -> None:
    model, twin = made(kind), made(kind)
    layout = layout_of(model, share)
    inputs, labels = batch_of(kind, sum(counts), seed)
    swap = [quantized_weights] if rounded else []
    gradients = recorded(kind, model, layout, microbatch, clipping)
    found = gradients.sums(inputs, labels, counts, cross_entropy, clip, *swap)
    assert found.shape == (len(counts), layout.size) and found.dtype == np.float32
    again = gradients.sums(inputs, labels, counts, cross_entropy, clip, *swap)
    assert (found == again).all()
    hooked = kind not in NOT_FOR_OPACUS and ClippedGradients(twin, layout, 64, clipping, "hooks")
    for row, span in zip(found, Owners.of(counts).spans, strict=True):
        own = (inputs[span], labels[span])
        # Of 750 rows the furthest of either way was 3e-5 from float64, relative to the largest.
        atol = 5e-5 * max(1e-3, float(np.abs(row).max()))
        if hooked:
            expected = hooked.sum(*own, cross_entropy, clip, *swap)
            np.testing.assert_allclose(row, expected, atol=atol)
        if not rounded:
            expected = by_hand(made(kind), layout, own, clip, clipping)
            np.testing.assert_allclose(row, expected, atol=atol)


@pytest.mark.parametrize("kind", list(STUDENTS))
@pytest.mark.parametrize("clipping", ["flat", "per-layer"])
def test_one_example_moves_the_sum_by_at_most_the_bound(kind: str, clipping: Clipping) -> None:
    model = made(kind)
    gradients = recorded(kind, model, Layout.of(model), 64, clipping)
    inputs, labels = batch_of(kind, 5)
    whole = gradients.sum(inputs, labels, cross_entropy, 0.01)
    less = gradients.sum(inputs[1:], labels[1:], cross_entropy, 0.01)
    assert np.linalg.norm(whole - less) <= 0.01 * (1 + 1e-5)
    assert np.linalg.norm(whole - less) > 0.01 * 0.5  # these gradients are longer


@pytest.mark.parametrize("kind", ["residual", "places", "linear", "layer-norm"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("clipping", ["flat", "per-layer"])
def test_what_is_not_finite_is_left_out_and_changes_nothing_else(
    kind: str, bad: float, clipping: Clipping
) -> None:
    model = made(kind)
    gradients = recorded(kind, model, layout_of(model, 0.7), 4, clipping)
    inputs, labels = batch_of(kind, 6)
    spoilt = inputs.clone()
    spoilt[1].view(-1)[2] = bad
    found = gradients.sums(spoilt, labels, (3, 3), cross_entropy, 0.5)
    kept = [0, 2]
    np.testing.assert_allclose(
        found[0], gradients.sum(inputs[kept], labels[kept], cross_entropy, 0.5), atol=2e-6
    )
    np.testing.assert_allclose(
        found[1], gradients.sum(inputs[3:], labels[3:], cross_entropy, 0.5), atol=2e-6
    )


def test_a_row_of_a_table_that_is_not_finite_harms_only_those_who_look_it_up() -> None:
    model = made("block")
    with torch.no_grad():
        model.table.weight[3] = float("nan")  # pyright: ignore
    gradients = ClippedGradients(model, Layout.of(model), method="graph")
    inputs = torch.tensor([[0.0, 1, 2, 0, 1], [0, 3, 2, 1, 1], [2, 2, 0, 0, 0]])
    labels = torch.tensor([0, 1, 2])
    found = gradients.sum(inputs, labels, cross_entropy, 0.5)
    alone = gradients.sum(inputs[[0, 2]], labels[[0, 2]], cross_entropy, 0.5)
    np.testing.assert_allclose(found, alone, atol=1e-6)
    assert np.linalg.norm(alone) > 0.1


@pytest.mark.parametrize("kind", ["block", "residual"])
def test_an_empty_batch_gives_zero(kind: str) -> None:
    model = made(kind)
    layout = Layout.of(model)
    found = recorded(kind, model, layout).sums(*batch_of(kind, 0), (0, 0), cross_entropy, 1.0)
    assert (found == np.zeros((2, layout.size))).all()


def test_nothing_stays_on_the_model_even_after_an_abort() -> None:
    model = made("residual")
    before = {name: set(vars(m)) for name, m in model.named_modules()}
    gradients = recorded("residual", model, Layout.of(model), 2)
    calls = []

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls.append(len(labels))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return cross_entropy(logits, labels)

    batch = batch_of("residual", 4)
    with pytest.raises(KeyboardInterrupt):
        gradients.sum(*batch, loss, 1.0)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == before
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None and not vars(p) for p in model.parameters())
    fresh = recorded("residual", made("residual"), Layout.of(model), 2)
    expected = fresh.sum(*batch, cross_entropy, 1.0)
    assert np.array_equal(gradients.sum(*batch, cross_entropy, 1.0), expected)


def test_a_loss_that_ignores_a_layer_is_refused() -> None:
    model = made("block")
    constant = torch.zeros(1, requires_grad=True)
    gradients = recorded("block", model, Layout.of(model))
    for loss in (lambda a, b: constant.sum(), lambda a, b: torch.zeros(())):
        with pytest.raises(DataError, match=r"layer table: the loss must depend"):
            gradients.sum(*batch_of("block", 2), loss, 1.0)


class Sometimes(With):
    """Uses its layer twice where an example is large: no trial need find it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return self.head(self.layer(y) if (x.abs() > 100).any() else y)


def test_a_layer_that_is_used_twice_only_sometimes_is_refused_when_it_is() -> None:
    model = Sometimes(nn.Linear(4, 4), 4)
    gradients = ClippedGradients(model, Layout.of(model), shape=(4,))
    assert gradients.method == "graph"
    labels = torch.zeros(2, dtype=torch.int64)
    gradients.sum(torch.ones(2, 4), labels, cross_entropy, 1.0)
    with pytest.raises(DataError, match="layer layer, which is used 2 times"):
        gradients.sum(torch.full((2, 4), 1e3), labels, cross_entropy, 1.0)


def test_opacus_is_not_loaded_for_attention() -> None:
    code = (
        "import sys; from reticent.core.sequences import student; "
        "from reticent.core.update import Layout; "
        "from reticent.privacy.clipping import ClippedGradients; "
        "m = student('attention', (5,), 4); "
        "assert ClippedGradients(m, Layout.of(m), shape=(5,)).method == 'graph'; "
        "assert 'opacus' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
