"""Adapters: nothing but the factors is trained, and gradients are those of the merged model."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Literal, cast

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from reticent.compression.adapt import (
    Adapted,
    adapted,
    begin,
    held_values,
    hold_values,
    is_adapted,
    merged,
    ranks_of,
)
from reticent.compression.quantize import fake_quantize, layer_grids, quantized_weights
from reticent.compression.structure import build, describe
from reticent.core.errors import PayloadError, PlanError
from reticent.core.plan import Quantize
from reticent.core.seeds import torch_generator
from reticent.core.update import Layout
from reticent.privacy.clipping import ClippedGradients

SHAPE = (2, 8, 8)
RANKS = {0: 2, 3: 1, 5: 3}


def plain() -> nn.Sequential:
    chain = nn.Sequential(
        nn.Conv2d(2, 8, 3, stride=2, padding=2, dilation=2),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 6, (3, 2), bias=False),
        nn.Flatten(),
        nn.Linear(36, 10),
        nn.Tanh(),
        nn.Linear(10, 4),
    )
    generator = torch_generator(5, "adapt")
    for p in chain.parameters():
        p.data = 0.4 * torch.randn(p.shape, generator=generator)
    return chain.eval()


def moved(model: nn.Sequential) -> nn.Sequential:
    """Give all factors values, as training does."""
    generator = torch_generator(6, "moved")
    for p in model.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=generator)
    return model


def batch(count: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(count, *SHAPE, generator=torch_generator(1, "inputs"))
    return inputs, torch.arange(count) % 4


def summed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


def factors_of(model: nn.Sequential) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    return {
        i: (m.up.weight.detach().flatten(1), m.down.weight.detach().flatten(1))
        for i, m in enumerate(model)
        if isinstance(m, Adapted)
    }


def test_it_starts_as_the_public_student_exactly() -> None:
    model = plain()
    frozen = adapted(model, RANKS)
    begin(frozen, torch_generator(0, "begin"))
    inputs, _ = batch()
    assert torch.equal(frozen(inputs), model(inputs))
    for up, down in factors_of(frozen).values():
        assert not up.any()
        bound = down.shape[1] ** -0.5
        assert 0.5 * bound < down.abs().max() <= bound


def test_nothing_but_the_factors_is_a_parameter_or_travels() -> None:
    frozen = adapted(plain(), RANKS)
    names = [f"{i}.{part}.weight" for i in RANKS for part in ("down", "up")]
    assert [n for n, _ in frozen.named_parameters()] == names
    assert list(frozen.state_dict()) == names and not list(frozen.buffers())
    held = sum(p.numel() for p in plain().parameters())
    assert held_values(frozen).shape == (held,)


def test_the_merged_chain_computes_the_same_and_is_plain() -> None:
    frozen = moved(adapted(plain(), RANKS))
    whole = merged(frozen)
    inputs, _ = batch()
    assert torch.equal(whole(inputs), frozen(inputs))
    assert describe(whole) == describe(plain()) and not is_adapted(whole)
    changes = factors_of(frozen)
    for i, (before, after) in enumerate(zip(plain(), cast(nn.Sequential, whole), strict=True)):
        for name, values in before.named_parameters():
            expected = values.detach().numpy().copy()
            if name == "weight" and i in changes:
                up, down = (f.numpy() for f in changes[i])
                expected += (up @ down).reshape(expected.shape)
            assert np.allclose(dict(after.named_parameters())[name].detach(), expected, atol=1e-6)
    model = plain()
    assert merged(model) is model


def by_hand(
    frozen: nn.Sequential, inputs: torch.Tensor, labels: torch.Tensor, rounded: bool
) -> list[torch.Tensor]:
    """Return the factors' gradients from those of the weights of a plain, merged chain.

    G is the gradient by the weight W + B A, rounded or not (passed straight through); those by the
    factors are then B^T G and G A^T.
    """
    whole = merged(frozen)
    weights = {n: p.detach().clone() for n, p in whole.named_parameters()}
    for name, values in weights.items():
        if rounded and values.dim() > 1:
            weights[name] = fake_quantize(values)
        weights[name].requires_grad_()
    loss = summed(functional_call(whole, weights, (inputs,)), labels)
    slopes = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    parts: list[torch.Tensor] = []
    for i, (up, down) in factors_of(frozen).items():
        slope = slopes[f"{i}.weight"].flatten(1)
        parts += [up.T @ slope, slope @ down.T]
    return parts


@pytest.mark.parametrize("rounded", [False, True])
def test_gradients_are_those_of_the_merged_weights(rounded: bool) -> None:
    frozen = moved(adapted(plain(), RANKS))
    inputs, labels = batch()
    with quantized_weights(frozen) if rounded else nullcontext():
        found = torch.autograd.grad(summed(frozen(inputs), labels), list(frozen.parameters()))
    for own, expected in zip(found, by_hand(frozen, inputs, labels, rounded), strict=True):
        assert torch.allclose(own.flatten(), expected.flatten(), atol=1e-4)
    if rounded:
        other = by_hand(frozen, inputs, labels, False)
        assert not torch.allclose(found[0].flatten(), other[0].flatten(), atol=1e-4)


@pytest.mark.parametrize("rounded", [False, True])
def test_clipping_covers_exactly_the_factors_example_by_example(rounded: bool) -> None:
    frozen = moved(adapted(plain(), RANKS))
    layout = Layout.of(frozen)
    inputs, labels = batch()
    singles = [
        layout.gather(by_hand(frozen, inputs[i : i + 1], labels[i : i + 1], rounded)).astype(float)
        for i in range(len(labels))
    ]
    norms = [float(np.linalg.norm(s)) for s in singles]
    clip = float(np.median(norms))
    expected = sum(s * min(1.0, clip / n) for s, n in zip(singles, norms, strict=True))
    swap = quantized_weights if rounded else nullcontext
    found = ClippedGradients(frozen, layout).sum(inputs, labels, summed, clip, swap)
    assert np.allclose(found, expected, atol=1e-4)
    assert not np.allclose(found, sum(singles), atol=1e-2)


def test_rounding_is_of_the_merged_weight_and_ends_with_the_context() -> None:
    frozen = moved(adapted(plain(), RANKS))
    inputs, _ = batch()
    before = frozen(inputs)
    with quantized_weights(frozen):
        inside = frozen(inputs)
    whole = merged(frozen)
    with quantized_weights(whole):
        assert torch.equal(whole(inputs), inside)
    assert not torch.equal(before, inside) and torch.equal(frozen(inputs), before)


@pytest.mark.parametrize("edges", ["none", "first", "both"])
def test_few_bits_round_the_merged_weights_as_they_are_deployed(
    edges: Literal["none", "first", "both"],
) -> None:
    model, inputs = moved(adapted(plain(), RANKS)), batch()[0]
    section = Quantize(bits=4, edges=edges)
    chain = merged(model)
    assert layer_grids(model, section) == layer_grids(chain, section)
    with quantized_weights(chain, section):
        deployed = chain(inputs)
    with quantized_weights(model, section):
        assert torch.allclose(model(inputs), deployed, atol=1e-6)
    assert not torch.allclose(model(inputs), deployed, atol=1e-3)


def test_a_description_brings_the_factors_and_what_is_held() -> None:
    frozen = moved(adapted(plain(), RANKS))
    copy = build(describe(frozen), SHAPE, 4)
    hold_values(copy, held_values(frozen))
    copy.load_state_dict(frozen.state_dict())
    inputs, _ = batch()
    assert torch.equal(copy(inputs), frozen(inputs)) and describe(copy) == describe(frozen)
    with pytest.raises(PayloadError, match="parameters are held: must be"):
        hold_values(copy, held_values(frozen)[1:])
    with pytest.raises(PayloadError, match="5 parameters are held: must be 0"):
        hold_values(plain(), np.zeros(5, dtype=np.float32))


@pytest.mark.parametrize(
    "adapters",
    [
        [{"layer": 5, "rank": 8}],
        [{"layer": 5, "rank": 0}],
        [{"layer": 5, "rank": 2**20}],
        [{"layer": 1, "rank": 1}],
        [{"layer": 8, "rank": 1}],
        [{"layer": -1, "rank": 1}],
        [{"layer": 5, "rank": 1}, {"layer": 5, "rank": 2}],
        [{"layer": 5, "rank": 1.0}],
        [{"layer": 5, "rank": 1, "scale": 2}],
    ],
)
def test_hostile_adapters_are_refused(adapters: list[dict[str, object]]) -> None:
    text = json.loads(describe(plain()))
    build(json.dumps({**text, "adapters": [{"layer": 5, "rank": 7}]}), SHAPE, 4)
    with pytest.raises(PayloadError, match="structure"):
        build(json.dumps({**text, "adapters": adapters}), SHAPE, 4)


def test_layers_are_chosen_by_size_or_by_name() -> None:
    assert ranks_of(plain(), 2, ()) == {0: 2, 3: 2, 5: 2, 7: 2}
    assert ranks_of(plain(), 3, ()) == {0: 3, 3: 3, 5: 3}
    assert ranks_of(plain(), 2, ("5",)) == {5: 2}


@pytest.mark.parametrize(
    ("rank", "layers", "message"),
    [
        (2, ("9",), "no layer 9: there are 0, 1"),
        (3, ("7",), r"layer 7 \(Linear\).*must be at most 2 for it"),
        (1, ("1",), r"layer 1 \(GroupNorm\).*must be at most 0"),
        (99, (), "must be at most 7 for this student"),
    ],
)
def test_what_cannot_be_adapted_is_refused(
    rank: int, layers: tuple[str, ...], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        ranks_of(plain(), rank, layers)
    with pytest.raises(PlanError, match=r"not an nn\.Sequential"):
        ranks_of(nn.Linear(2, 2), 1, ())
