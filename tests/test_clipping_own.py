"""Sums at weights of one's own: each owner's row is what it would get alone, at its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from reticent.compression.quantize import quantized_weights, training_swap
from reticent.compression.stacked import stacked_rounding
from reticent.core.errors import DataError, PlanError
from reticent.core.plan import Quantize
from reticent.core.sequences import Attention, LastGRU, OneHot
from reticent.core.update import Layout
from reticent.privacy.clipping import ClippedGradients, OwnGradients, own_chain_of, own_layers
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
    "codes": (
        CODES,
        lambda: nn.Sequential(OneHot(4), nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), last(25)),
    ),
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
    "few-channels": (
        IMAGE,
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 2, 3, (3, 2), (2, 1)), nn.ELU(), nn.Conv2d(2, 3, 2, bias=False)),
            *(nn.Conv2d(3, 2, 1), nn.Flatten(), last(18)),
        ),
    ),
    "few-places": (
        IMAGE,
        lambda: nn.Sequential(nn.Conv2d(2, 24, (7, 6)), nn.ReLU(), nn.Flatten(), last(96)),
    ),
    "group-norm": (
        IMAGE,
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 8, 3, 2, 1), nn.GroupNorm(4, 8), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), last(8)),
        ),
    ),
}


def last(inputs: int) -> nn.Module:
    return nn.Linear(inputs, CLASSES)


def distilling(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    soft = torch.eye(CLASSES)[labels] * 0.7 + 0.1
    mimic = F.kl_div(F.log_softmax(logits / 2, dim=1), soft, reduction="sum")
    return 0.7 * F.cross_entropy(logits, labels, reduction="sum") + 0.3 * 4 * mimic


def made(kind: str) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[kind][1]()


def batch_of(kind: str, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    inputs = 2 * torch.randn(count, *MODELS[kind][0], generator=draws)
    return inputs, torch.randint(0, CLASSES, (count,), generator=draws)


def layout_of(model: nn.Module, share: float = 1.0) -> Layout:
    return Layout.of(model, np.random.default_rng(0).random(Layout.of(model).total) < share)


def weights_of(layout: Layout, owners: int, seed: int = 0) -> NDArray[np.float32]:
    drawn = np.random.default_rng(seed).standard_normal((owners, layout.size))
    return (0.3 * drawn).astype(np.float32)


def alone(
    model: nn.Module,
    layout: Layout,
    weights: NDArray[np.float32],
    batch: Sequence[torch.Tensor],
    clip: float | None,
    clipping: Clipping,
    section: Quantize,
) -> NDArray[np.float64]:
    """What one owner gets from the code for common weights, or from torch's own backward pass."""
    layout.write(model, weights)
    swap = training_swap(section)
    if clip is not None:
        gradients = ClippedGradients(model, layout, clipping=clipping)
        return gradients.sum(batch[0], batch[1], distilling, clip, swap)
    with swap(model):
        loss = distilling(model(batch[0]), batch[1])
        found = torch.autograd.grad(loss, list(model.parameters()))
    return layout.gather(list(found)).astype(np.float64)


def close(found: NDArray[np.float64], expected: NDArray[np.float64]) -> None:
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-5)


PLAIN = Quantize(kind="none")


@pytest.mark.parametrize("kind", list(MODELS))
@settings(max_examples=8, deadline=None)
@given(
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    clip=st.sampled_from([CLIP, None]),
    clipping=st.sampled_from(["flat", "per-layer"]),
    share=st.sampled_from([1.0, 0.4]),
    section=st.sampled_from([PLAIN, Quantize(bits=8), Quantize(bits=2, granularity="tensor")]),
    microbatch=st.sampled_from([1, 4, 64]),
    seed=st.integers(0, 1000),
)
def test_every_owner_gets_the_sum_that_it_gets_alone_at_its_weights(
    kind: str,
    counts: list[int],
    clip: float | None,
    clipping: Clipping,
    share: float,
    section: Quantize,
    microbatch: int,
    seed: int,
) -> None:
    model, twin = made(kind), made(kind)
    layout = layout_of(model, share)
    inputs, labels = batch_of(kind, sum(counts), seed)
    weights = weights_of(layout, len(counts), seed)
    gradients = OwnGradients(model, layout, microbatch, clipping)
    given_ = (weights, inputs, labels, counts, distilling, clip, stacked_rounding(model, section))
    before = [p.clone() for p in model.parameters()]
    found = gradients.sums(*given_)
    assert found.shape == (len(counts), layout.size) and found.dtype == np.float32
    assert (found == gradients.sums(*given_)).all()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    for row, own, span in zip(found, weights, Owners.of(counts).spans, strict=True):
        batch = (inputs[span], labels[span])
        close(row, alone(twin, layout, own, batch, clip, clipping, section))
        if span.stop == span.start:
            assert (row == 0).all()


def row_of(kind: str, counts: Sequence[int], clip: float | None) -> NDArray[np.float64]:
    model = made(kind)
    layout = layout_of(model)
    weights, (inputs, labels) = weights_of(layout, len(counts)), batch_of(kind, 12, 0)
    batch = (inputs[: sum(counts)], labels[: sum(counts)])
    return OwnGradients(model, layout).sums(weights, *batch, counts, distilling, clip)


@pytest.mark.parametrize("clip", [CLIP, None])
def test_an_owner_whose_examples_go_through_two_passes_gets_its_sum(clip: float | None) -> None:
    model = made("group-norm")
    layout = Layout.of(model)
    weights, batch, counts = weights_of(layout, 3), batch_of("group-norm", 300, 0), (130, 135, 35)
    found = OwnGradients(model, layout).sums(weights, *batch, counts, distilling, clip)
    single = OwnGradients(model, layout, 1).sums(weights, *batch, counts, distilling, clip)
    close(found, single)


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("clip", [CLIP, None])
def test_one_more_example_changes_its_owners_row_alone_and_by_no_more_than_the_clip(
    kind: str, clip: float | None
) -> None:
    before, after = row_of(kind, (2, 3, 4), clip), row_of(kind, (2, 3, 5), clip)
    close(after[:2], before[:2])
    moved = float(np.linalg.norm(after[2] - before[2]))
    assert moved > 1e-3
    assert clip is None or moved <= clip * (1 + 1e-4)


@pytest.mark.parametrize("kind", ["two-linear", "convolution", "group-norm"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("clip", [CLIP, None])
def test_what_is_not_finite_is_its_owners_alone(kind: str, bad: float, clip: float | None) -> None:
    """With a clip it counts zero; without one it stays what it is, in its owner's row."""
    model = made(kind)
    layout, gradients = Layout.of(model), OwnGradients(model, Layout.of(model))
    (inputs, labels), weights = batch_of(kind, 9, 0), weights_of(layout, 3)
    spoilt = inputs.clone()
    spoilt[4, 0, 0, 0] = bad
    found = gradients.sums(weights, spoilt, labels, (2, 4, 3), distilling, clip)
    clean = gradients.sums(weights, inputs, labels, (2, 4, 3), distilling, clip)
    close(found[[0, 2]], clean[[0, 2]])
    if bad == 1e30 and kind == "group-norm":  # a norm makes it finite again
        return
    if clip is None:
        assert not np.isfinite(found[1]).all() or np.abs(found[1]).max() > 1e20
        return
    kept = [0, 1, 2, 3, 5, 6, 7, 8]
    without = gradients.sums(weights, inputs[kept], labels[kept], (2, 3, 3), distilling, clip)
    close(found[1], without[1])


def test_weights_that_are_not_finite_are_their_owners_alone() -> None:
    model = made("two-convolutions")
    layout, gradients = Layout.of(model), OwnGradients(model, Layout.of(model))
    batch, weights = batch_of("two-convolutions", 6, 0), weights_of(layout, 3)
    clean = gradients.sums(weights, *batch, (2, 2, 2), distilling, CLIP)
    weights[1] = np.inf
    found = gradients.sums(weights, *batch, (2, 2, 2), distilling, CLIP)
    close(found[[0, 2]], clean[[0, 2]])
    assert (found[1] == 0).all()


@pytest.mark.parametrize("clip", [CLIP, None])
def test_a_pass_in_which_rows_meet_a_neighbours_weights_is_found(
    clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above tells a wrong owner, and an example that is counted twice."""
    right = row_of("two-convolutions", (2, 3, 4), clip)

    def shifted(owners: Owners) -> list[tuple[int, slice]]:
        spans = owners.spans
        return [((i + 1) % len(spans), span) for i, span in enumerate(spans)]

    def twice(owners: Owners) -> list[tuple[int, slice]]:
        return [(i, slice(max(0, s.start - 1), s.stop)) for i, s in enumerate(owners.spans)]

    monkeypatch.setattr(own_layers, "_present", shifted)
    assert np.abs(row_of("two-convolutions", (2, 3, 4), clip) - right).max() > 1e-3
    if clip is None:
        monkeypatch.undo()
        right = row_of("two-linear", (2, 3, 4), clip)
        monkeypatch.setattr(own_layers, "_present", twice)
        with pytest.raises(AssertionError):
            close(row_of("two-linear", (2, 3, 4), clip), right)


@pytest.mark.parametrize(
    ("counts", "owners", "clip", "error"),
    [
        ((3,), 1, CLIP, DataError),
        ((5, -1), 2, CLIP, DataError),
        ((2, 2), 3, CLIP, DataError),
        ((2, 2), 2, 0.0, PlanError),
    ],
)
def test_owners_must_have_all_the_examples_and_weights(
    counts: tuple[int, ...], owners: int, clip: float, error: type[Exception]
) -> None:
    model = made("linear")
    layout = Layout.of(model)
    weights, batch = weights_of(layout, owners), batch_of("linear", 4, 0)
    with pytest.raises(error, match="must be"):
        OwnGradients(model, layout).sums(weights, *batch, counts, distilling, clip)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(OneHot(4), LastGRU(4, 6), nn.Linear(6, CLASSES)),
        Attention(5, CLASSES, 8),
        nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)),
    ],
)
def test_models_that_owners_cannot_have_alone_are_refused(model: nn.Module) -> None:
    assert own_chain_of(model) is None
    with pytest.raises(DataError, match="plain chain"):
        OwnGradients(model, Layout.of(model))


@settings(max_examples=20, deadline=None)
@given(
    bits=st.sampled_from([8, 4, 3, 2, 1]),
    granularity=st.sampled_from(["channel", "tensor"]),
    edges=st.sampled_from(["none", "first", "both"]),
    seed=st.integers(0, 1000),
)
def test_rounding_many_weights_at_once_gives_the_bits_of_rounding_each(
    bits: int, granularity: str, edges: str, seed: int
) -> None:
    section = Quantize.model_validate({"bits": bits, "granularity": granularity, "edges": edges})
    model = made("group-norm")
    layout = Layout.of(model)
    weights = weights_of(layout, 3, seed)
    parts = torch.from_numpy(weights).split(list(layout.sizes), dim=1)
    stacked = [p.reshape(3, *shape) for p, shape in zip(parts, layout.shapes, strict=True)]
    rounded = stacked_rounding(model, section)(stacked)
    for owner in range(3):
        layout.write(model, weights[owner])
        with quantized_weights(model, section):
            for found, expected in zip(rounded, model.parameters(), strict=True):
                assert torch.equal(found[owner], expected)
