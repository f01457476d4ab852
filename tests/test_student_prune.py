"""Pruning: exact counts, global ranks, biases kept, no layer emptied."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reticent.compression.prune import (
    apply_mask,
    lowest_dropped,
    magnitude_mask,
    magnitudes,
    sparsities,
    taylor,
)
from reticent.core.errors import PlanError
from reticent.core.seeds import torch_generator
from reticent.core.tasks import Examples
from reticent.core.update import Layout


def student() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)
    )
    generator = torch_generator(3, "prune")
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    return model


@settings(deadline=None, max_examples=40)
@given(st.floats(0, 0.9))
def test_count_is_exact_and_only_the_smallest_weights_go(sparsity: float) -> None:
    model = student()
    mask = magnitude_mask(model, sparsity)
    wide = np.concatenate([np.full(p.numel(), p.dim() > 1) for p in model.parameters()])
    values = np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])
    assert mask.dtype == np.bool_ and mask.shape == (len(values),)
    assert mask[~wide].all()
    dropped = np.abs(values[~mask])
    assert len(dropped) == round(sparsity * int(wide.sum()))
    if len(dropped):
        assert dropped.max() <= np.abs(values[wide & mask]).min()


def test_sparsity_zero_keeps_everything_and_gives_the_plain_layout() -> None:
    model = student()
    assert magnitude_mask(model, 0.0).all()
    assert Layout.of(model, magnitude_mask(model, 0.0)) == Layout.of(model)


def test_ties_are_broken_by_position() -> None:
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    nn.init.ones_(next(model.parameters()))
    assert magnitude_mask(model, 0.5).tolist() == [False] * 4 + [True] * 4


def test_an_emptied_layer_is_refused_by_name_and_the_named_limit_works() -> None:
    model = student()
    model[0].weight.data *= 1e-3
    with pytest.raises(PlanError, match=r"0\.weight.*at most (0\.\d+)") as caught:
        magnitude_mask(model, 0.6)
    limit = float(str(caught.value).split("at most ")[1].split(" ")[0])
    mask = magnitude_mask(model, limit)
    assert Layout.of(model, mask).blocks[0] == 1


def test_a_whole_output_channel_may_go() -> None:
    model = student()
    model[0].weight.data[1] *= 1e-6
    mask = magnitude_mask(model, 0.2)
    assert not mask[9:18].any()


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_sparsity_out_of_range_is_refused(sparsity: float) -> None:
    with pytest.raises(PlanError, match="sparsity"):
        magnitude_mask(student(), sparsity)


def test_weights_that_are_not_finite_are_refused() -> None:
    model = student()
    model[4].weight.data[0, 0] = float("nan")
    with pytest.raises(PlanError, match="not finite"):
        magnitude_mask(model, 0.5)


def test_apply_mask_zeroes_what_is_dropped_and_nothing_else() -> None:
    model = student()
    before = Layout.of(model).read(model)
    mask = magnitude_mask(model, 0.5)
    apply_mask(model, mask)
    assert np.array_equal(Layout.of(model).read(model), np.where(mask, before, 0))


def test_what_was_dropped_before_stays_dropped_and_counts() -> None:
    model = student()
    first = magnitude_mask(model, 0.3)
    scores = magnitudes(model)
    scores[~first] = 100.0  # they would come last by score
    second = lowest_dropped(model, scores, 0.5, first)
    assert not (second & ~first).any()
    assert (~second).sum() == round(0.5 * 116)


def test_taylor_scores_are_the_slopes_of_a_loss_that_loses_the_weight() -> None:
    model = student().double()
    generator = torch_generator(4, "taylor")
    inputs = torch.randn(300, 1, 4, 4, generator=generator, dtype=torch.float64)
    public = Examples(inputs, torch.arange(300) % 5)
    found = taylor(model, public)
    parameters = list(model.parameters())
    flat = torch.cat([p.detach().flatten() for p in parameters])

    def loss(values: torch.Tensor) -> float:
        parts = values.split([p.numel() for p in parameters])
        with torch.no_grad():
            for p, part in zip(parameters, parts, strict=True):
                p.copy_(part.view_as(p))
            return float(nn.functional.cross_entropy(model(public.inputs), public.labels))

    for i in range(0, len(flat), 7):
        step = torch.zeros_like(flat)
        step[i] = 1e-5
        slope = (loss(flat + step) - loss(flat - step)) / 2e-5
        assert found[i] == pytest.approx(abs(float(flat[i]) * slope), rel=1e-4, abs=1e-9)


def test_schedules_end_at_the_target_and_have_their_curves() -> None:
    assert sparsities(0.8, 4, "gradual") == pytest.approx(
        [0.8 * (1 - 0.75**3), 0.8 * (1 - 0.5**3), 0.8 * (1 - 0.25**3), 0.8]
    )
    iterative = sparsities(0.488, 3, "weight-rewind")
    assert iterative == pytest.approx([0.2, 0.36, 0.488])
    assert sparsities(0.5, 1, "gradual") == sparsities(0.5, 1, "rate-rewind") == [0.5]
