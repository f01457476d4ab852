"""Off-load to the host's memory, as it runs on a GPU, on this CPU: the same numbers as without.

A plan allows it on a GPU only; the code is the same, and is called directly.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from reticent.core.errors import RunError
from reticent.core.models import teacher
from reticent.core.plan import parse_plan
from reticent.core.seeds import torch_generator
from reticent.core.tasks import Examples, load_task
from reticent.server import distillation
from reticent.server.distillation import lesson
from reticent.server.group import process_group
from reticent.server.means import Means
from reticent.server.public_training import train_public
from reticent.server.sharded import _layers

# DeepSpeed and what it calls of torch warn about themselves.
noisy = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
absent = importlib.util.find_spec("deepspeed") is None
both = pytest.mark.parametrize(
    "offload",
    [
        "cpu",
        pytest.param(
            "zero",
            marks=[noisy, pytest.mark.skipif(absent, reason="deepspeed is not installed")],
        ),
    ],
)


class Branched(nn.Module):
    """A model that is not one sequence: two paths, shared weights, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.paths = nn.ModuleList([nn.Linear(64, 16), nn.Linear(64, 16)])
        self.twice = nn.Linear(16, 16)
        self.again = nn.Linear(16, 16)
        self.again.weight = self.twice.weight
        self.scale = nn.Parameter(torch.ones(16))
        self.last = nn.Linear(16, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        flat = inputs.flatten(1)
        joined = torch.relu(sum(path(flat) for path in self.paths))
        return self.last(torch.relu(self.again(self.twice(joined))) * self.scale)


class Recurrent(nn.Module):
    """A recurrent layer and attention, which use their parts' weights without calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        states = self.recurrent(inputs[:, 0])[0]
        return self.last(self.attention(states, states, states)[0].mean(dim=1))


class Viewed(nn.Linear):
    """Returns a view, which the next layer changes in place."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).view(-1, 4, 8)


def changed_in_place() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), Viewed(64, 32), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(32, 4)
    )


def convolutional() -> nn.Module:
    """The built-in teacher in contiguous order, which the off-loads train in."""
    model = teacher((1, 8, 8), 4)
    for parameter in model.parameters():
        parameter.data = torch.empty(parameter.shape).copy_(parameter.data)
    return model


def examples() -> Examples:
    inputs = torch.randn(12, 1, 8, 8, generator=torch_generator(0, "host"))
    return Examples(inputs, torch.arange(12) % 4)


def trained(make: Any, means: Means) -> nn.Module:
    torch.manual_seed(0)
    return train_public(make(), examples(), 3, 0.01, 0, "teacher", means=means)


def assert_near(first: nn.Module, second: nn.Module) -> None:
    """Steps of up to 0.01 are taken; sums over memory that lies otherwise round otherwise."""
    ours, theirs = first.state_dict(), second.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-3, rtol=0, msg=name)


@both
@pytest.mark.parametrize("make", [convolutional, Branched, Recurrent, changed_in_place])
def test_off_loaded_or_not_the_teacher_is_the_same(make: Any, offload: str) -> None:
    """Twice, as one process may train many: each in a group of its own, which is then gone."""
    plain = trained(make, Means())
    for _ in range(2):
        model = trained(make, Means(offload=offload))
        assert_near(model, plain)
        assert type(model) is type(plain) and not model.training
        assert all(type(p) is nn.Parameter for p in model.parameters())
        assert not dist.is_initialized() and "LOCAL_RANK" not in os.environ
    assert all(type(value) is torch.Tensor for value in model.state_dict().values())


@both
def test_a_model_in_another_order_keeps_it(offload: str) -> None:
    def built_in() -> nn.Module:
        return teacher((1, 8, 8), 4)

    plain, model = trained(built_in, Means()), trained(built_in, Means(offload=offload))
    orders = [[p.stride() for p in m.parameters()] for m in (plain, model)]
    assert orders[0] == orders[1] != [p.stride() for p in convolutional().parameters()]
    assert_near(model, plain)


@both
def test_bf16_is_the_same_off_loaded_or_not(offload: str) -> None:
    plain = trained(convolutional, Means(precision="bf16"))
    assert_near(trained(convolutional, Means(precision="bf16", offload=offload)), plain)


def test_a_scaled_loss_is_the_same_off_loaded_or_not() -> None:
    plain = trained(convolutional, Means(precision="fp16"))
    assert_near(trained(convolutional, Means(precision="fp16", offload="cpu")), plain)


@both
def test_online_both_learn_the_same_with_the_teacher_off_loaded(
    offload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ["task.name=digits", "task.clients=4", "task.public_examples=30", "student.epochs=2"]
    keys += ["federation.clients_per_round=4", "student.distill.mode=online"]
    plan = parse_plan("", keys)
    task = load_task(plan.task, 0)
    monkeypatch.setattr(distillation, "new_teacher", lambda *_: fresh())

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    plain = lesson(plan, task, task.public())
    monkeypatch.setattr(distillation, "teacher_means", lambda _: Means(offload=offload))
    taught = lesson(plan, task, task.public())
    assert_near(taught.teacher, plain.teacher)
    assert_near(taught.student, plain.student)


def test_layers_are_gathered_one_at_a_time_unless_they_share_a_parameter() -> None:
    model = Branched()
    assert _layers(model) == [*model.paths, model.last]
    assert len(_layers(teacher((1, 8, 8), 4))) == 8


@both
def test_the_group_is_gone_after_an_error_too(offload: str) -> None:
    class Broken(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        trained(lambda: nn.Sequential(nn.Flatten(), Broken(64, 4)), Means(offload=offload))
    assert not dist.is_initialized() and "LOCAL_RANK" not in os.environ


@both
def test_a_group_of_somebody_else_s_is_refused_and_left_alone(offload: str) -> None:
    with process_group("cpu"):
        with pytest.raises(RunError, match=r"has a torch\.distributed process group already"):
            trained(convolutional, Means(offload=offload))
        assert dist.is_initialized()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU on this machine")
@both
def test_on_a_gpu_the_off_loaded_teacher_is_the_one_without(offload: str) -> None:
    plain, model = (trained(convolutional, Means("cuda", offload=o)) for o in ("none", offload))
    assert {value.device.type for value in model.state_dict().values()} == {"cpu"}
    assert_near(model, plain)
