"""Two wrong answers that torch's quantized kernels give in silence, and that our path avoids.

When one of these fails because torch answers rightly, the remedy it stands for may go.
"""

from __future__ import annotations

import pytest
import torch
from engines import ENGINES
from torch import nn
from torch.nn import functional

from reticent.compression.convert import calibrate, convert
from reticent.compression.integer import build, quantized_engine
from reticent.core.errors import ArtifactError
from reticent.core.seeds import torch_generator

SHAPE = (600, 8, 6, 6)
pytestmark = pytest.mark.filterwarnings("ignore:.*quantize.*:UserWarning")


def quantized(channels_last: bool) -> torch.Tensor:
    x = 3 * torch.randn(SHAPE, generator=torch_generator(31, "x")) + 2
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.quantize_per_tensor(
        x.contiguous(memory_format=layout), 0.05, 100, torch.quint8
    ).contiguous(memory_format=layout)


@pytest.mark.parametrize("name", ["relu6", "hardtanh", "clamp"])
def test_qnnpack_scrambles_bounded_activations_of_channels_last_tensors(name: str) -> None:
    operators = {
        "relu6": lambda x: torch.ops.quantized.relu6(x, False),
        "hardtanh": lambda x: functional.hardtanh(x, 0.0, 6.0),
        "clamp": lambda x: torch.clamp(x, 0.0, 6.0),
    }
    right = quantized(False).dequantize().clamp(0, 6)
    with quantized_engine("qnnpack"):
        contiguous = operators[name](quantized(False)).dequantize()
        scrambled = operators[name](quantized(True)).dequantize()
    assert (contiguous - right).abs().max() <= 0.026
    wrong = ((scrambled - right).abs() > 0.1).float().mean()
    assert wrong > 0.3, f"torch {torch.__version__} answers rightly"


@pytest.mark.parametrize("layer", [nn.ReLU6(), nn.Hardtanh(0, 6)])
def test_bounded_activations_are_refused(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), layer)
    with pytest.raises(ArtifactError, match=r"layer 1 .* use ReLU"):
        convert(model, calibrate(model, torch.zeros(1, 1, 4, 4)))


def group_norm(x: torch.Tensor) -> torch.Tensor:
    weight, bias = torch.ones(SHAPE[1]), torch.zeros(SHAPE[1])
    return torch.ops.quantized.group_norm(x, 4, weight, bias, 1e-5, 0.05, 128).dequantize()


@pytest.mark.parametrize("engine", ENGINES)
def test_group_norm_of_channels_last_tensors_is_wrong_past_some_example(engine: str) -> None:
    right = functional.group_norm(quantized(False).dequantize(), 4)
    with quantized_engine(engine):
        assert (group_norm(quantized(False)) - right).abs().max() <= 0.06
        error = (group_norm(quantized(True)) - right).abs().flatten(1).amax(dim=1)
    assert (error > 0.5).any(), f"torch {torch.__version__} answers rightly"


def test_the_integer_model_never_hands_a_kernel_such_a_tensor() -> None:
    model = nn.Sequential(nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU())
    x = torch.randn(SHAPE, generator=torch_generator(32, "x"))
    integer = build(convert(model, calibrate(model, x)))
    seen: list[bool] = []
    for layer in integer.layers:
        inner = getattr(layer, "layer", layer)
        inner.register_forward_hook(lambda m, args, out: seen.append(args[0].is_contiguous()))
    last = x.contiguous(memory_format=torch.channels_last)
    answer = integer(last)
    # Inputs are made contiguous once, and no layer changes that.
    assert len(seen) == 2 and all(seen)
    assert torch.equal(answer, torch.cat([integer(row) for row in x.split(1)]))
