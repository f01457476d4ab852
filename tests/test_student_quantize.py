"""Fake quantization: exact grids, exact restoration, exact per-example gradients."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from torch import nn
from torch.nn import functional

from reticent.compression.fold import fold_batchnorm
from reticent.compression.quantize import (
    channel_scales,
    fake_quantize,
    from_int8,
    quantized_weights,
    to_int8,
)
from reticent.core.seeds import torch_generator


def folded_student() -> nn.Sequential:
    return fold_batchnorm(
        nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(36, 5),
        )
    )


def norm_student() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 5),
    )


def filled(model: nn.Sequential) -> nn.Sequential:
    generator = torch_generator(4, "weights")
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.5
    return model


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32), st.floats(-28, 30), st.sampled_from([(3, 7), (4, 2, 3, 3), (1, 1)]))
def test_rounding_is_exact_through_int8_and_idempotent(
    seed: int, exponent: float, shape: tuple[int, ...]
) -> None:
    weight = torch.randn(shape, generator=torch_generator(seed, "w")) * 10.0**exponent
    rounded = fake_quantize(weight)
    integers, scales = to_int8(weight)
    assert integers.dtype == torch.int8 and int(integers.abs().max()) <= 127
    bits = rounded.view(torch.int32)
    assert torch.equal(from_int8(integers, scales).view(torch.int32), bits)
    assert torch.equal(fake_quantize(rounded).view(torch.int32), bits)
    again, same_scales = to_int8(rounded)
    assert torch.equal(again, integers) and torch.equal(same_scales, scales)


def test_error_is_at_most_half_a_step_and_the_largest_weight_is_not_clipped() -> None:
    weight = torch.randn(8, 50, generator=torch_generator(5, "w"))
    scales = channel_scales(weight)
    limit = weight.abs().amax(1)
    torch.testing.assert_close(scales, limit / 127, rtol=2**-16, atol=0)
    assert (scales * 127 >= limit).all()
    error = (fake_quantize(weight) - weight).abs() / scales[:, None]
    assert error.max() <= 0.5001
    # Rounding down would be found: its error reaches a whole step.
    floor = torch.floor(weight / scales[:, None]) * scales[:, None]
    assert ((floor - weight).abs() / scales[:, None]).max() > 0.9


def test_each_channel_has_its_own_step_and_zero_channels_are_fine() -> None:
    weight = torch.tensor([[1.0, -2.0], [0.0, -0.0], [1e-3, 5e-4]])
    rounded = fake_quantize(weight)
    assert torch.equal(rounded[1], torch.zeros(2))
    assert torch.isfinite(rounded).all()
    torch.testing.assert_close(rounded[2], weight[2], rtol=1e-2, atol=0)


def test_tiny_channels_become_zero_and_values_not_finite_stay_visible() -> None:
    assert torch.equal(fake_quantize(torch.full((1, 2), 1e-40)), torch.zeros(1, 2))
    assert not torch.isfinite(fake_quantize(torch.tensor([[float("nan"), 1.0]]))).all()


def bits_of(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone().view(torch.int32) for p in model.parameters()]


def test_weights_come_back_bit_for_bit_and_biases_never_change() -> None:
    model = filled(norm_student())
    before = bits_of(model)
    with quantized_weights(model):
        inside = bits_of(model)
        assert torch.equal(model[0].weight, fake_quantize(before[0].view(torch.float32)))
    changed = [not torch.equal(a, b) for a, b in zip(before, inside, strict=True)]
    assert changed == [True, False, False, False, True, False]
    assert all(torch.equal(a, b) for a, b in zip(before, bits_of(model), strict=True))


def test_weights_come_back_after_an_exception_and_from_nested_contexts() -> None:
    model = filled(folded_student())
    before = bits_of(model)
    with pytest.raises(KeyError), quantized_weights(model), quantized_weights(model):
        raise KeyError("inside")
    assert all(torch.equal(a, b) for a, b in zip(before, bits_of(model), strict=True))


def test_a_shared_weight_comes_back() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    before = bits_of(model)
    with quantized_weights(model):
        pass
    assert all(torch.equal(a, b) for a, b in zip(before, bits_of(model), strict=True))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch_generator(6, "data")
    x = torch.randn(6, 1, 8, 8, generator=generator)
    return x, torch.randint(0, 5, (6,), generator=generator)


def per_example(model: nn.Module, quantized: bool) -> list[torch.Tensor]:
    """Per-example gradients by Opacus' hooks, one tensor ``(n, *shape)`` a parameter."""
    wrapped = GradSampleModule(model, loss_reduction="sum")
    x, y = data()
    with warnings.catch_warnings():
        # torch remarks on hooks that see no input gradient; the gradients are not affected.
        warnings.simplefilter("ignore")
        if quantized:
            with quantized_weights(wrapped):
                functional.cross_entropy(wrapped(x), y, reduction="sum").backward()
        else:
            functional.cross_entropy(wrapped(x), y, reduction="sum").backward()
    grads = [p.grad_sample.clone() for p in model.parameters()]
    wrapped.to_standard_module()
    return grads


def micro_batches(model: nn.Module) -> list[torch.Tensor]:
    x, y = data()
    rows: list[tuple[torch.Tensor, ...]] = []
    with quantized_weights(model):
        for i in range(len(x)):
            loss = functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1], reduction="sum")
            rows.append(torch.autograd.grad(loss, list(model.parameters())))
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


@pytest.mark.parametrize("make", [folded_student, norm_student])
def test_per_example_gradients_equal_micro_batches(make: object) -> None:
    model = filled(make())  # type: ignore[operator]
    expected = micro_batches(model)
    got = per_example(model, quantized=True)
    assert len(got) == len(list(model.parameters()))
    worst = max(float((a - b).abs().max()) for a, b in zip(got, expected, strict=True))
    assert worst <= 1e-6 * max(1.0, max(float(e.abs().max()) for e in expected))
    # Without the swap the gradients are others, so the comparison above means something.
    plain = per_example(model, quantized=False)
    assert max(float((a - b).abs().max()) for a, b in zip(plain, expected, strict=True)) > 1e-4


def test_the_optimizer_moves_the_float_weights() -> None:
    model = filled(nn.Sequential(nn.Linear(4, 3)))
    before = model[0].weight.detach().clone()
    x = torch.randn(2, 4, generator=torch_generator(7, "x"))
    with quantized_weights(model):
        model(x).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    moved = 0.1 * model[0].weight.grad
    torch.testing.assert_close(model[0].weight.detach(), before - moved, rtol=1e-6, atol=1e-6)
    assert (model[0].weight - (fake_quantize(before) - moved)).abs().max() > 1e-4
