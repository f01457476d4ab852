"""Weights of fewer than 8 bits: grids against loops, and gradients against micro-batches."""

from __future__ import annotations

import warnings
from functools import partial
from itertools import pairwise
from typing import Literal, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from opacus import GradSampleModule
from torch import nn
from torch.nn import functional

from reticent.client.training import LocalTrainer, NoisyStep, student_model
from reticent.compression.convert import calibrate, convert
from reticent.compression.quantize import (
    INT8,
    WeightGrid,
    channel_scales,
    fake_quantize,
    from_int8,
    layer_grids,
    quantized_weights,
    to_int8,
    training_swap,
)
from reticent.core.errors import PlanError
from reticent.core.plan import Bits, Granularity, Quantize, parse_plan
from reticent.core.protocol import Constants
from reticent.core.seeds import torch_generator
from reticent.core.tasks import Examples, load_task
from reticent.core.update import Layout
from reticent.privacy.clipping import ClippedGradients
from reticent.privacy.randomness import SeededRandomness

GRIDS = [WeightGrid(b, g) for b in (8, 4, 3, 2, 1) for g in ("channel", "tensor")]
LOW: list[Bits] = [4, 3, 2, 1]


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch_generator(seed, "w"))


def loop_error(row: NDArray[np.float64], step: float, top: int) -> float:
    error = 0.0
    for w in row:
        integer = max(-top, min(top, round(w / step)))
        error += (integer * step - w) ** 2
    return error


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_the_step_is_the_best_of_32_shares_of_the_largest_weight(bits: Bits) -> None:
    grid, weight = WeightGrid(bits), drawn(1, 5, 40)
    top = {4: 7, 3: 3, 2: 1}[bits]
    assert grid.top == top
    for row, step in zip(weight.double().numpy(), channel_scales(weight, grid), strict=True):
        errors = [
            loop_error(row, np.abs(row).max() / top * share / 32, top) for share in range(1, 33)
        ]
        assert loop_error(row, float(step), top) == pytest.approx(min(errors), rel=1e-3)
        # A search finds more than the largest weight as the end of the range, the fewer the bits.
        assert bits == 4 or min(errors) < 0.9 * errors[-1]


def test_one_bit_is_the_sign_times_the_mean_magnitude_which_no_other_scale_beats() -> None:
    weight = drawn(2, 6, 30)
    integers, steps = to_int8(weight, WeightGrid(1))
    assert torch.equal(integers, weight.sign().to(torch.int8))
    torch.testing.assert_close(steps, weight.abs().mean(dim=1), rtol=2**-15, atol=0)
    error = (from_int8(integers, steps) - weight).square().sum(dim=1)
    for factor in (0.95, 1.05):
        assert ((from_int8(integers, factor * steps) - weight).square().sum(dim=1) > error).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_pruned_weights_stay_zero_and_do_not_pull_the_scale(grid: WeightGrid) -> None:
    dense = drawn(3, 4, 30)
    dense[1] = 0
    sparse = torch.cat([dense, torch.zeros(4, 30)], dim=1)
    integers, steps = to_int8(sparse, grid)
    assert not integers[:, 30:].any() and not integers[1].any()
    assert torch.equal(steps, channel_scales(dense, grid))
    assert torch.isfinite(steps).all() and (steps > 0).all()


def test_a_tensor_has_one_step_and_a_channel_its_own() -> None:
    weight = drawn(4, 3, 2, 3, 3) * torch.tensor([1.0, 10.0, 100.0]).view(-1, 1, 1, 1)
    for bits in (8, *LOW):
        flat = channel_scales(weight.reshape(1, -1), WeightGrid(bits))
        assert torch.equal(channel_scales(weight, WeightGrid(bits, "tensor")), flat.expand(3))
        assert len(channel_scales(weight, WeightGrid(bits)).unique()) == 3


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(GRIDS), st.integers(0, 2**32), st.floats(-28, 30))
def test_rounding_is_exact_through_int8(grid: WeightGrid, seed: int, exponent: float) -> None:
    weight = drawn(seed, 4, 2, 3, 3) * 10.0**exponent
    integers, steps = to_int8(weight, grid)
    assert int(integers.abs().max()) == grid.top or grid.bits in (4, 3)
    assert int(integers.abs().max()) <= grid.top
    expected = fake_quantize(weight, grid).view(torch.int32)
    assert torch.equal(from_int8(integers, steps).view(torch.int32), expected)


def test_fewer_bits_are_coarser() -> None:
    weight = drawn(5, 8, 200)
    errors = [
        float((fake_quantize(weight, WeightGrid(bits)) - weight).square().mean())
        for bits in (8, *LOW)
    ]
    assert all(fine < 0.6 * coarse for fine, coarse in pairwise(errors))


@pytest.mark.parametrize("grid", GRIDS)
def test_values_not_finite_stay_visible_and_tiny_ones_become_zero(grid: WeightGrid) -> None:
    for bad in (float("nan"), float("inf")):
        assert not torch.isfinite(fake_quantize(torch.tensor([[bad, 1.0, -0.5]]), grid)).all()
    assert not fake_quantize(torch.full((1, 2), 1e-40), grid).any()


def test_other_numbers_of_bits_are_refused() -> None:
    with pytest.raises(PlanError, match="must be 8, 4, 3, 2 or 1"):
        WeightGrid(cast(Bits, 5))


def chain(norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)]
    if norm:
        layers.insert(1, nn.GroupNorm(2, 4))
    model = nn.Sequential(*layers)
    for index, p in enumerate(model.parameters()):
        p.data = 0.3 * drawn(10 + index, *p.shape)
    return model


X = drawn(6, 6, 1, 8, 8)
Y = torch.arange(6) % 5


def section(grid: WeightGrid) -> Quantize:
    return Quantize(bits=grid.bits, granularity=grid.granularity, edges="none")


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits, labels, reduction="sum")


def micro_batches(model: nn.Module, grid: WeightGrid) -> list[torch.Tensor]:
    """Plain torch, one example at a time, at weights that are rounded for good: ``(n, *shape)``."""
    saved = [p.detach().clone() for p in model.parameters()]
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data = fake_quantize(layer.weight, grid)
    rows = [
        torch.autograd.grad(loss_of(model(X[i : i + 1]), Y[i : i + 1]), list(model.parameters()))
        for i in range(len(X))
    ]
    for p, values in zip(model.parameters(), saved, strict=True):
        p.data = values
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("norm", [False, True])
def test_hooks_give_each_example_its_gradient_at_the_rounded_weights(
    grid: WeightGrid, norm: bool
) -> None:
    model = chain(norm)
    expected = micro_batches(model, grid)
    wrapped = GradSampleModule(model, loss_reduction="sum")
    with warnings.catch_warnings(), quantized_weights(wrapped, section(grid)):
        warnings.simplefilter("ignore")
        loss_of(wrapped(X), Y).backward()
    for parameter, rows in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad_sample, rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("norm", [False, True])
def test_clipped_sums_equal_those_of_micro_batches(grid: WeightGrid, norm: bool) -> None:
    # Without a norm layer this is the ghost path, with one it is the hooks.
    model = chain(norm)
    rows = torch.cat([r.flatten(1) for r in micro_batches(model, grid)], dim=1).double()
    norms = rows.norm(dim=1)
    clip = float(norms.median())
    expected = (rows * (clip / norms).clamp(max=1)[:, None]).sum(dim=0).numpy()
    clipped = ClippedGradients(model, Layout.of(model), clipping="flat")
    swap = partial(quantized_weights, section=section(grid))
    found = clipped.sum(X, Y, loss_of, clip, swap)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    # Gradients at the float weights are others, so the comparison means something.
    if grid.bits < 8:
        assert np.abs(clipped.sum(X, Y, loss_of, clip) - expected).max() > 1e-2


PLAN = ["task.name=digits", "task.clients=4", "federation.clients_per_round=4"]


@pytest.mark.parametrize("bits", [8, *LOW])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_local_training_takes_its_gradient_at_the_planned_weights(
    bits: Bits, granularity: Granularity
) -> None:
    keys = {"bits": bits, "granularity": granularity, "edges": "none"}
    chosen = [f"student.quantize.{key}={value}" for key, value in keys.items()]
    plan = parse_plan("", [*PLAN, *chosen, "federation.sampling_rate=1.0"])
    task = load_task(plan.task, plan.seed)
    torch.manual_seed(0)
    model = student_model(task, plan)
    layout = Layout.of(model)
    start = layout.read(model)
    # Grey levels are sixteenths: weights of one size would cancel at many places, where rounding
    # decides the gradient of a ReLU, and that differs between processors.
    private = task.client(0)
    apart = 0.05 * torch.randn(private.inputs.shape, generator=torch_generator(0, "apart"))
    examples = Examples(private.inputs + apart, private.labels)
    trainer = LocalTrainer(plan, task, Constants(b"", np.zeros((0, 0), np.float32)))
    step = NoisyStep(clip=1e6, noise=0.0, denominator=1.0)
    found = trainer.pseudo_gradient(start, examples, step, SeededRandomness(0), ("run", 1, 0))
    with quantized_weights(model, plan.student.quantize):
        gradients = torch.autograd.grad(
            loss_of(model(examples.inputs), examples.labels), list(model.parameters())
        )
    expected = layout.gather(list(gradients))
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("kind", ["static", "none"])
def test_only_qat_rounds_while_training(kind: str) -> None:
    model = chain(False)
    before = model[0].weight.clone()
    plan = parse_plan("", [f"student.quantize.kind={kind}"])
    with training_swap(plan.student.quantize)(model):
        assert torch.equal(model[0].weight, before)
    with training_swap(Quantize(bits=2, edges="none"))(model):
        assert torch.equal(model[0].weight, fake_quantize(before, WeightGrid(2)))


@pytest.mark.parametrize(
    ("edges", "bits"),
    [("none", (1, 1, 1)), ("first", (8, 1, 1)), ("both", (8, 1, 8))],
)
def test_the_first_and_the_last_layer_may_keep_8_bits(
    edges: Literal["none", "first", "both"], bits: tuple[int, ...]
) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 5)
    )
    chosen = Quantize(bits=1, edges=edges)
    assert [g.bits for g in layer_grids(model, chosen).values()] == list(bits)
    layers = [model[0], model[2], model[4]]
    expected = [
        fake_quantize(cast(torch.Tensor, layer.weight), WeightGrid(cast(Bits, b)))
        for layer, b in zip(layers, bits, strict=True)
    ]
    with quantized_weights(GradSampleModule(model), chosen):
        assert all(
            torch.equal(cast(torch.Tensor, layer.weight), values)
            for layer, values in zip(layers, expected, strict=True)
        )
    spec = convert(model, calibrate(model, X, chosen), chosen)
    tops = [int(spec.arrays[f"{name}.weight"].abs().max()) for name in ("0", "2", "4")]
    assert tops == [127 if b == 8 else 1 for b in bits]


def test_none_has_no_choices() -> None:
    for choice in ("bits=4", "granularity=tensor", "observer=histogram"):
        with pytest.raises(PlanError, match=r'student\.quantize: kind="none" with'):
            parse_plan("", ["student.quantize.kind=none", f"student.quantize.{choice}"])
    for bits in ("5", "0", "8.5", "text"):
        with pytest.raises(PlanError, match=r"student\.quantize\.bits"):
            parse_plan("", [f"student.quantize.bits={bits}"])
    assert WeightGrid() == INT8
