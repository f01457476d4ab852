"""Benchmarks measure: every call is made, in turns, on one thread."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from reticent.compression.bench import side_by_side, size_on_disk
from reticent.compression.convert import calibrate, convert
from reticent.core.errors import DataError


def test_models_take_turns_on_one_thread() -> None:
    calls: list[str] = []
    threads: list[int] = []

    def model(name: str):
        def call(x: torch.Tensor) -> torch.Tensor:
            calls.append(name)
            threads.append(torch.get_num_threads())
            return x

        return call

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    x = torch.zeros(1, 4)
    result = side_by_side({"a": (model("a"), x), "b": (model("b"), x)}, repeats=5)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    assert calls == ["a", "b"] * (len(calls) // 2) and len(calls) >= 10
    assert set(threads) == {1}
    assert all(0 < r.median_us <= r.p95_us for r in result.values())


def test_a_single_model_is_measured_without_gradients() -> None:
    layer = nn.Linear(4, 2)
    seen: list[bool] = []

    def model(x: torch.Tensor) -> torch.Tensor:
        seen.append(layer(x).requires_grad)
        return x

    assert side_by_side({"a": (model, torch.zeros(1, 4))}, repeats=3)["a"].median_us > 0
    assert seen and not any(seen)


@pytest.mark.parametrize(("shape", "repeats"), [((2, 4), 3), ((), 3), ((1, 4), 0)])
def test_wrong_batches_and_repeats_are_refused(shape: tuple[int, ...], repeats: int) -> None:
    with pytest.raises(DataError):
        side_by_side({"a": (nn.Identity(), torch.zeros(shape))}, repeats)


def test_size_is_that_of_the_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert size_on_disk(model) == (tmp_path / "model.safetensors").stat().st_size
    spec = convert(model, calibrate(model, torch.ones(1, 64)))
    assert size_on_disk(spec) < size_on_disk(model) / 3
