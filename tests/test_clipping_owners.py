"""Sums of many owners in common passes: each is the owner's own, whatever else is in the pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from reticent.compression.quantize import quantized_weights
from reticent.core.errors import DataError
from reticent.core.sequences import Attention, LastGRU, LastLSTM, OneHot
from reticent.core.update import Layout
from reticent.privacy.clipping import ClippedGradients
from reticent.privacy.clipping.bounds import Clipping
from reticent.privacy.clipping.terms import Owners

CLIP, CLASSES = 0.5, 3
IMAGE, CODES = (2, 8, 7), (5,)

MODELS: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    "linear": (IMAGE, lambda: nn.Sequential(nn.Flatten(), nn.Linear(112, CLASSES))),
    "two-linear": (
        IMAGE,
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(112, 9, bias=False), nn.SiLU(), last(9)),
    ),
    "places": (IMAGE, lambda: nn.Sequential(nn.Linear(7, 4), nn.ReLU(), nn.Flatten(), last(64))),
    "convolution": (
        IMAGE,
        lambda: nn.Sequential(nn.Conv2d(2, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), last(128)),
    ),
    "two-convolutions": (
        IMAGE,
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 8, (3, 2), (2, 1), (1, 0), bias=False), nn.Tanh()),
            *(nn.Conv2d(8, 6, 2, dilation=2, padding="valid"), nn.Flatten(), last(48)),
        ),
    ),
    "group-norm": (
        IMAGE,
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 8, 3, 2, 1), nn.GroupNorm(4, 8), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), last(8)),
        ),
    ),
    "lstm": (CODES, lambda: nn.Sequential(OneHot(4), LastLSTM(4, 6), last(6))),
    "gru": (CODES, lambda: nn.Sequential(OneHot(4), nn.Linear(4, 5), LastGRU(5, 6), last(6))),
    "attention": (CODES, lambda: Attention(5, CLASSES, 8)),
    "residual": (
        IMAGE,
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 8, 3, padding=1), Shortcut(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())),
            *(Shortcut(nn.GroupNorm(2, 8), nn.ReLU()), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            *(Shortcut(nn.LayerNorm(8), nn.Linear(8, 8)), last(8)),
        ),
    ),
    "table": (
        CODES,
        lambda: nn.Sequential(Codes(4), nn.Embedding(4, 6), nn.Flatten(), nn.Tanh(), last(30)),
    ),
}


class Shortcut(nn.Sequential):
    """A chain around which its input is added (He et al. 2016)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore
        return x + super().forward(x)


class Codes(nn.Module):
    """Takes numbers as codes of symbols."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.symbols = symbols

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.long().clamp(0, self.symbols - 1)


def last(inputs: int) -> nn.Module:
    return nn.Linear(inputs, CLASSES)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


def distilling(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    soft = torch.eye(CLASSES)[labels] * 0.7 + 0.1
    mimic = F.kl_div(F.log_softmax(logits / 2, dim=1), soft, reduction="sum")
    return 0.7 * cross_entropy(logits, labels) + 0.3 * 4 * mimic


def made(kind: str) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[kind][1]()


def batch_of(kind: str, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    inputs = 2 * torch.randn(count, *MODELS[kind][0], generator=draws)
    return inputs, torch.randint(0, CLASSES, (count,), generator=draws)


def layout_of(model: nn.Module, share: float) -> Layout:
    return Layout.of(model, np.random.default_rng(0).random(Layout.of(model).total) < share)


def one_by_one(
    model: nn.Module, layout: Layout, batch: Sequence[torch.Tensor], clipping: str
) -> NDArray[np.float64]:
    """The clipped sum by a plain loop over examples."""
    total = np.zeros(layout.size)
    shares = np.sqrt(np.array(layout.blocks) / layout.size)
    for one in range(len(batch[1])):
        loss = distilling(model(batch[0][one : one + 1]), batch[1][one : one + 1])
        parts = layout.gather(list(torch.autograd.grad(loss, list(model.parameters()))))
        gradient = parts.astype(np.float64)
        if clipping == "flat":
            total += gradient * min(1.0, CLIP / max(1e-300, float(np.linalg.norm(gradient))))
            continue
        for block, share in zip(blocks_of(layout), shares, strict=True):
            norm = max(1e-300, float(np.linalg.norm(gradient[block])))
            total[block] += gradient[block] * min(1.0, CLIP * share / norm)
    return total


def blocks_of(layout: Layout) -> list[slice]:
    ends = np.cumsum((0, *layout.blocks))
    return [slice(a, b) for a, b in pairwise(ends)]


@pytest.mark.parametrize("kind", list(MODELS))
@settings(max_examples=8, deadline=None)
@given(
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    clipping=st.sampled_from(["flat", "per-layer"]),
    share=st.sampled_from([1.0, 0.4]),
    rounded=st.booleans(),
    microbatch=st.sampled_from([1, 4, 64]),
    seed=st.integers(0, 1000),
)
def test_every_owner_gets_the_sum_that_opacus_hooks_and_a_loop_over_examples_give(
    kind: str,
    counts: list[int],
    clipping: Clipping,
    share: float,
    rounded: bool,
    microbatch: int,
    seed: int,
) -> None:
    model, twin = made(kind), made(kind)
    layout = layout_of(model, share)
    inputs, labels = batch_of(kind, sum(counts), seed)
    swap = [quantized_weights] if rounded else []
    gradients = ClippedGradients(model, layout, microbatch, clipping, shape=MODELS[kind][0])
    found = gradients.sums(inputs, labels, counts, distilling, CLIP, *swap)
    assert found.shape == (len(counts), layout.size) and found.dtype == np.float32
    assert (found == gradients.sums(inputs, labels, counts, distilling, CLIP, *swap)).all()
    # Opacus has no hooks for torch's recurrent layers.
    hooked = kind not in ("lstm", "gru") and ClippedGradients(twin, layout, 64, clipping, "hooks")
    for row, span in zip(found, Owners.of(counts).spans, strict=True):
        own = (inputs[span], labels[span])
        if hooked:
            np.testing.assert_allclose(row, hooked.sum(*own, distilling, CLIP, *swap), atol=5e-6)
        np.testing.assert_allclose(row, gradients.sum(*own, distilling, CLIP, *swap), atol=5e-6)
        if not rounded and kind != "attention":
            expected = one_by_one(made(kind), layout, own, clipping)
            np.testing.assert_allclose(row, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["two-linear", "group-norm"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_what_is_not_finite_is_left_out_for_its_owner_and_changes_nothing_for_others(
    kind: str, bad: float
) -> None:
    model = made(kind)
    gradients = ClippedGradients(model, Layout.of(model))
    inputs, labels = batch_of(kind, 9, 0)
    spoilt = inputs.clone()
    spoilt[4, 0, 0, 0] = bad
    counts = (2, 4, 3)
    found = gradients.sums(spoilt, labels, counts, cross_entropy, CLIP)
    clean = gradients.sums(inputs, labels, counts, cross_entropy, CLIP)
    np.testing.assert_allclose(found[[0, 2]], clean[[0, 2]], atol=2e-6)
    kept = [2, 3, 5]
    without = gradients.sum(inputs[kept], labels[kept], cross_entropy, CLIP)
    if bad == 1e30 and kind == "group-norm":  # a norm makes it finite again
        return
    np.testing.assert_allclose(found[1], without, atol=2e-6)


@pytest.mark.parametrize("counts", [(3,), (2, 3), (5, -1), ()])
def test_owners_must_have_all_the_examples(counts: tuple[int, ...]) -> None:
    model = made("linear")
    with pytest.raises(DataError, match=r"counts=.*must be whole and sum to 4"):
        ClippedGradients(model, Layout.of(model)).sums(
            *batch_of("linear", 4, 0), counts, cross_entropy, CLIP
        )


def test_owners_without_any_example_get_zeros() -> None:
    model = made("convolution")
    layout = Layout.of(model)
    found = ClippedGradients(model, layout).sums(
        *batch_of("convolution", 0, 0), (0, 0), cross_entropy, CLIP
    )
    assert (found == np.zeros((2, layout.size))).all()
