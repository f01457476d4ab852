"""Where public data are learned: the device, what must be on it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from reticent.core import sequences
from reticent.core.errors import DependencyError, PlanError
from reticent.core.models import student, teacher
from reticent.core.plan import Distill, parse_plan
from reticent.core.seeds import torch_generator
from reticent.core.tasks import Examples, load_task
from reticent.server import distillation, means, public_training
from reticent.server.distillation import lesson
from reticent.server.means import Means, moved, student_means, teacher_means
from reticent.server.possible import require_possible
from reticent.server.public_training import train_public
from reticent.simulations.explain import check_plan
from reticent.simulations.simulate import simulate

DIGITS = [
    "task.name=digits",
    "task.clients=4",
    "task.public_examples=30",
    "teacher.epochs=2",
    "student.epochs=2",
    "federation.clients_per_round=4",
]
GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not GPU, reason="torch sees no CUDA GPU on this machine")
needs_none = pytest.mark.skipif(GPU, reason="torch sees a CUDA GPU on this machine")


def plan_of(*overrides: str) -> Any:
    return parse_plan("", [*DIGITS, *overrides])


def examples() -> Examples:
    inputs = torch.randn(12, 1, 8, 8, generator=torch_generator(0, "means"))
    return Examples(inputs, torch.arange(12) % 4)


@needs_none
def test_a_gpu_that_is_not_there_is_an_error_before_anything_is_made(tmp_path: Path) -> None:
    plan = plan_of("teacher.device=cuda")
    words = r'teacher\.device="cuda": must be "cpu" on this machine: torch .* sees no GPU'
    with pytest.raises(DependencyError, match=words):
        check_plan(plan)
    with pytest.raises(DependencyError, match=words):
        simulate(plan, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_deepspeed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of("teacher.device=cuda", "teacher.offload=zero")
    monkeypatch.setattr(means.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DependencyError, match=r"pip install .*'reticent\[deepspeed\]'"):
        require_possible(plan, load_task(plan.task, 0))


class OnlyFull(nn.Linear):
    """A layer without a kernel for fewer bits, as torch's LSTM on many CPUs."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("no kernel")
        return super().forward(input)


def test_a_precision_that_a_layer_does_not_have_is_refused_before_training() -> None:
    class Lacking(type(load_task(plan_of().task, 0))):
        def teacher(self) -> nn.Module:
            return nn.Sequential(nn.Flatten(), OnlyFull(64, 10))

    task = Lacking.__new__(Lacking)
    task.__dict__.update(load_task(plan_of().task, 0).__dict__)
    require_possible(plan_of(), task)
    with pytest.raises(PlanError, match=r'precision="fp16": must be another .*digits.* no kernel'):
        require_possible(plan_of("teacher.precision=fp16"), task)


def test_a_plan_on_the_cpu_needs_nothing() -> None:
    plan = plan_of()
    assert teacher_means(plan) == student_means(plan) == Means() == means.PLAIN
    require_possible(plan, load_task(plan.task, 0))


def test_the_student_follows_the_teacher_onto_a_gpu_that_holds_it_whole() -> None:
    plan = plan_of("teacher.device=cuda", "teacher.precision=bf16")
    assert teacher_means(plan) == Means("cuda", "bf16", "none")
    assert student_means(plan) == Means("cuda")
    assert student_means(plan_of("teacher.device=cuda", "teacher.offload=cpu")) == Means()


@pytest.mark.parametrize("mode", ["offline", "self", "reverse", "online"])
def test_every_training_before_the_rounds_gets_the_plan_s_device(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is replaced by the CPU where it is used, so that this runs anywhere."""
    asked: list[Means] = []

    def learning(model: nn.Module, rate: float, steps: int, means: Means, *more: Any) -> Any:
        asked.append(means)
        return real(model, rate, steps, Means("cpu", means.precision), *more)

    real = public_training.learning
    monkeypatch.setattr(public_training, "learning", learning)
    monkeypatch.setattr(distillation, "learning", learning)
    monkeypatch.setattr(public_training, "moved", lambda _device, *modules: moved("cpu", *modules))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_args, **_kwargs: tensor)
    plan = plan_of("teacher.device=cuda", "teacher.precision=bf16", f"student.distill.mode={mode}")
    task = load_task(plan.task, 0)
    lesson(plan, task, task.public())
    large, small = Means("cuda", "bf16"), Means("cuda")
    assert asked == ([small, large, small] if mode == "reverse" else [large, small])


def on_meta(model: nn.Module, given: Examples, large: nn.Module, kind: Any) -> list[str]:
    """Train on torch's ``meta`` device; return the devices of the model's answers.

    It refuses to compute with a tensor of another device, and holds no values, so that bringing
    the model back is what fails, after all the steps.
    """
    devices: list[str] = []
    model.register_forward_hook(lambda _m, _i, output: devices.append(output.device.type))
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        train_public(model, given, 3, 0.01, 0, "x", large, Distill(kind=kind), Means("meta"))
    return devices


@pytest.mark.parametrize("kind", ["none", "response", "feature"])
def test_every_step_runs_on_the_device_alone(kind: Any) -> None:
    found = on_meta(student("tiny", (1, 8, 8), 4), examples(), teacher((1, 8, 8), 4).eval(), kind)
    assert found == (["cpu"] if kind == "feature" else []) + ["meta"] * 3


@pytest.mark.parametrize("kind", sequences.STUDENTS)
def test_so_does_every_step_of_the_models_of_sequences(kind: str) -> None:
    codes = Examples(torch.arange(12.0).repeat(12, 1), torch.arange(12) % 12)
    large = sequences.teacher((12,), 12).eval()
    assert on_meta(sequences.student(kind, (12,), 12), codes, large, "response") == ["meta"] * 3


def test_what_was_moved_is_back_in_cpu_memory_after_an_error() -> None:
    class Spy(nn.Linear):
        def to(self, *args: Any, **_kwargs: Any) -> Any:
            seen.append(args[0])
            return self

    seen: list[str] = []
    with pytest.raises(ValueError, match="stop"), moved("cuda", Spy(1, 1)):
        raise ValueError("stop")
    assert seen == ["cuda", "cpu"]


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_a_gpu_a_teacher_learns_what_it_learns_on_the_cpu(precision: str) -> None:
    task = load_task(plan_of("task.public_examples=400").task, 0)
    reached = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = teacher((1, 8, 8), 10)
        where = Means(device, precision)
        train_public(model, task.public(), 30, 0.01, 0, "teacher", means=where)
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        reached.append(public_training.accuracy(model, task.test()))
    assert abs(reached[0] - reached[1]) < 0.05 and min(reached) > 0.9


@needs_gpu
@pytest.mark.parametrize("mode", ["offline", "online", "reverse"])
def test_a_lesson_on_a_gpu_comes_back_to_the_cpu(mode: str) -> None:
    plan = plan_of("teacher.device=cuda", f"student.distill.mode={mode}")
    task = load_task(plan.task, 0)
    taught = lesson(plan, task, task.public())
    for model in (taught.teacher, taught.student):
        assert {value.device.type for value in model.state_dict().values()} == {"cpu"}
