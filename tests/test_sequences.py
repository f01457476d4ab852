"""Sequence models: sizes, what they compute, and gradients of single examples."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from reticent.compression.quantize import quantized_weights
from reticent.core import sequences
from reticent.core.errors import DataError, PlanError
from reticent.core.update import Layout
from reticent.privacy.clipping import ClippedGradients
from reticent.privacy.clipping.bounds import Bounds, Clipping
from reticent.privacy.clipping.recurrent import unrolled

SYMBOLS, LENGTH = 7, 6


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = sequences.student(kind, (LENGTH,), SYMBOLS)
    for parameter in model.parameters():
        parameter.data *= 2  # so that states saturate a little and no path is almost linear
    return model


def batch_of(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, SYMBOLS, (count, LENGTH + 1), generator=draws)
    return codes[:, :-1].float(), codes[:, -1]


@pytest.mark.parametrize(
    ("kind", "size"), [("lstm", 28_452), ("gru", 21_924), ("attention", 24_468)]
)
def test_students_have_the_documented_size(kind: str, size: int) -> None:
    model = sequences.student(kind, (40,), 36)
    assert sum(p.numel() for p in model.parameters()) == size
    assert model(torch.zeros(3, 40)).shape == (3, 36)
    assert not list(model.buffers())


def test_other_students_and_shapes_are_refused() -> None:
    with pytest.raises(PlanError, match=r'student\.model="lstn".*did you mean "lstm"'):
        sequences.student("lstn", (40,), 36)
    with pytest.raises(PlanError, match=r'student\.model="tiny": must be one of lstm, gru'):
        sequences.student("tiny", (40,), 36)
    with pytest.raises(DataError, match=r"take \(length,\)"):
        sequences.student("lstm", (1, 8, 8), 36)
    with pytest.raises(DataError, match=r"take \(length,\)"):
        sequences.teacher((0,), 36)


def test_codes_become_one_hot_and_nothing_is_out_of_range() -> None:
    out = sequences.OneHot(3)(torch.tensor([[0.0, 1.9, 2.0], [-5.0, 1e9, 0.2]]))
    expected = [[[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 0, 1], [1, 0, 0]]]
    assert out.tolist() == expected


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_an_unrolled_layer_computes_what_the_layer_does(kind: str) -> None:
    model = model_of(kind)
    assert isinstance(model, nn.Sequential)
    inputs = model[0](batch_of(9)[0])
    layer = model[1]
    assert isinstance(layer, sequences.LastLSTM | sequences.LastGRU)
    ours = unrolled(layer, inputs)
    assert torch.allclose(ours.last, layer(inputs), atol=1e-6)
    parent = nn.LSTM if kind == "lstm" else nn.GRU
    stock = parent(SYMBOLS, 64, batch_first=True)
    stock.load_state_dict(layer.state_dict())
    states = stock(inputs)[0]
    assert torch.allclose(ours.states[:, 1:], states[:, :-1], atol=1e-6)
    assert not ours.states.requires_grad


def by_hand(
    model: nn.Module,
    layout: Layout,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    clip: float,
    clipping: Clipping,
) -> NDArray[np.float64]:
    """The clipped sum by a plain loop over examples with autograd."""
    total = np.zeros(layout.size)
    shares = Bounds.of(layout, clipping).shares
    for one, label in zip(inputs, labels, strict=True):
        loss = cross_entropy(model(one[None]), label[None])
        gradient = layout.gather(list(torch.autograd.grad(loss, list(model.parameters()))))
        gradient = gradient.astype(np.float64)
        if clipping == "flat":
            total += gradient * min(1.0, clip / np.linalg.norm(gradient))
            continue
        parts = np.split(gradient, np.cumsum(layout.blocks)[:-1])
        pairs = zip(parts, shares, strict=True)
        total += np.concatenate(
            [p * min(1.0, clip * s / max(np.linalg.norm(p), 1e-30)) for p, s in pairs]
        )
    return total


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(sequences.STUDENTS),
    clipping=st.sampled_from(get_args(Clipping)),
    clip=st.sampled_from([1e-3, 0.5, 1e6]),
    sparsity=st.sampled_from([0.0, 0.5]),
    count=st.integers(1, 9),
    seed=st.integers(0, 100),
)
def test_clipped_sums_equal_a_loop_over_examples(
    kind: str, clipping: Clipping, clip: float, sparsity: float, count: int, seed: int
) -> None:
    model, plain = model_of(kind), model_of(kind)
    bare = Layout.of(model)
    mask = np.random.default_rng(seed).random(bare.total) >= sparsity
    layout = Layout.of(model, mask)
    inputs, labels = batch_of(count, seed)
    clipped = ClippedGradients(model, layout, microbatch=4, clipping=clipping, shape=(LENGTH,))
    assert clipped.method == ("graph" if kind == "attention" else "ghost")
    found = clipped.sum(inputs, labels, cross_entropy, clip)
    expected = by_hand(plain, layout, inputs, labels, clip, clipping)
    # Queries and keys get differences of nearly equal numbers, which a small bound then enlarges.
    scale = max(1e-12, float(np.abs(expected).max())) * (2e-4 if kind == "attention" else 2e-5)
    assert np.abs(found - expected).max() <= scale
    assert np.abs(found - 1.01 * expected).max() > scale


@pytest.mark.parametrize("kind", sequences.STUDENTS)
def test_gradients_under_quantized_weights_are_those_of_the_rounded_model(kind: str) -> None:
    model, plain = model_of(kind), model_of(kind)
    layout = Layout.of(model)
    inputs, labels = batch_of(5)
    found = ClippedGradients(model, layout, shape=(LENGTH,)).sum(
        inputs, labels, cross_entropy, 0.5, quantized_weights
    )
    with quantized_weights(plain):
        expected = by_hand(plain, layout, inputs, labels, 0.5, "flat")
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("kind", sequences.STUDENTS)
def test_one_example_moves_the_sum_by_at_most_the_bound(kind: str) -> None:
    model = model_of(kind)
    clipped = ClippedGradients(model, Layout.of(model), shape=(LENGTH,))
    inputs, labels = batch_of(6)
    whole = clipped.sum(inputs, labels, cross_entropy, 0.01)
    less = clipped.sum(inputs[1:], labels[1:], cross_entropy, 0.01)
    assert np.linalg.norm(whole - less) <= 0.01 * (1 + 1e-5)
    assert np.linalg.norm(whole - less) > 0.01 * (1 - 1e-3)  # these gradients are longer
