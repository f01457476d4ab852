"""Activation ranges against torch's observers and against the error that they are to minimise."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch.ao.quantization.observer import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
)

from reticent.compression.observers import activation_range
from reticent.core.plan import Observer
from reticent.core.seeds import torch_generator

pytestmark = pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")


def activations(kind: str, count: int = 400) -> torch.Tensor:
    generator = torch_generator(21, kind)
    x = torch.randn(count, 30, generator=generator)
    if kind == "heavy":  # Laplace
        x = x.sign() * -torch.rand(count, 30, generator=generator).clamp(min=1e-7).log()
    return x.relu() if kind == "relu" else x


KINDS = ["normal", "relu", "heavy"]


def squared_error(x: torch.Tensor, low: float, high: float) -> float:
    """Mean squared error of rounding to 256 levels, by doing so."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / 255
    zero = round(-low / step)
    rounded = torch.fake_quantize_per_tensor_affine(x, step, zero, 0, 255)
    return float((rounded - x).double().square().mean())


@pytest.mark.parametrize("kind", KINDS)
def test_extremes_and_their_moving_average_are_torchs(kind: str) -> None:
    x = activations(kind)
    extremes, average = MinMaxObserver(), MovingAverageMinMaxObserver(averaging_constant=0.1)
    extremes(x)
    for part in x.split(50):
        average(part)
    for observer, theirs in (("min-max", extremes), ("moving-average", average)):
        ours = activation_range(x, observer)  # type: ignore[arg-type]
        expected = (float(theirs.min_val), float(theirs.max_val))
        assert ours == pytest.approx(expected, rel=1e-5, abs=1e-6)
    # The order of batches matters to the average only.
    assert activation_range(x.flip(0), "min-max") == activation_range(x, "min-max")
    if kind == "heavy":
        assert activation_range(x.flip(0), "moving-average") != activation_range(
            x, "moving-average"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_histogram_range_has_no_more_error_than_torchs(kind: str) -> None:
    x = activations(kind)
    torchs = HistogramObserver()
    torchs(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scale, zero = torchs.calculate_qparams()
    theirs = float(-zero * scale), float((255 - zero) * scale)
    ours = activation_range(x, "histogram")
    assert squared_error(x, *ours) <= 1.05 * squared_error(x, *theirs)
    assert squared_error(x, *ours) <= 1.01 * squared_error(x, float(x.min()), float(x.max()))


def test_the_histogram_range_is_the_best_of_its_candidates() -> None:
    x = activations("heavy", 8000)
    low, high = activation_range(x, "histogram")
    best = squared_error(x, low, high)
    shares = np.arange(4, 65, 4) / 64
    tried = [
        squared_error(x, float(x.min()) * a, float(x.max()) * b) for a in shares for b in shares
    ]
    assert best <= 1.02 * min(tried)
    # The extremes are not the best here: otherwise the test would show nothing.
    assert best < 0.85 * tried[-1]


@pytest.mark.parametrize("observer", ["min-max", "moving-average", "histogram"])
def test_constants_and_single_examples_have_a_range(observer: Observer) -> None:
    for value in (0.0, 3.0, -2.0):
        assert activation_range(torch.full((1, 4), value), observer) == (value, value)
    low, high = activation_range(torch.tensor([[1.0, 2.0]]), observer)
    assert low <= 1.0 and high == 2.0
