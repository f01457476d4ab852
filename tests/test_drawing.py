"""Students and teachers whose layers draw in training: the same seed gives the same model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawing_tasks import Dropped
from owned_students import Codes
from torch import nn

from reticent.client.steps import Client, NoisyStep
from reticent.client.training import LocalTrainer, trained_alone
from reticent.core.plan import Plan, parse_plan
from reticent.core.protocol import Constants
from reticent.core.run import Run
from reticent.core.seeds import layers_draw
from reticent.core.tasks import load_task
from reticent.core.update import Vector
from reticent.privacy.clipping.trial import draws_numbers
from reticent.privacy.randomness import SeededRandomness, Stream
from reticent.server.distillation import lesson
from reticent.simulations.simulate import simulate
from reticent.simulations.sweep import open_sweep, run_sweep
from reticent.simulations.sweep.manifest import manifest_of
from reticent.simulations.sweep.points import Base
from reticent.simulations.sweep.running import Show

SMALL = [
    *("task.name=drawing_tasks:task", "task.clients=30", "task.public_examples=100"),
    *("teacher.epochs=1", "student.epochs=1", "student.prune.kind=none"),
    *("federation.clients_per_round=30", "federation.rounds=2", "federation.sampling_rate=0.2"),
    *("student.quantize.kind=none", "engine.workers=1"),
]
PATHS = {
    "shared weights": [],
    "own weights": ["privacy.trust=local", "federation.steps_per_round=2"],
    "one by one": ["privacy=off", "federation.steps_per_round=2"],
}
NO_SOFT = np.zeros((0, 0), dtype=np.float32)


def plan_of(*overrides: str) -> Plan:
    return parse_plan("", [*SMALL, *overrides])


class Masks(SeededRandomness):
    """Only what layers draw depends on ``salt``."""

    def __init__(self, salt: int) -> None:
        super().__init__(0)
        self.salt = salt

    def stream(self, *path: str | int) -> Stream:
        return super().stream(*path, *([self.salt] if path[0] == "layers" else []))


def trained(plan: Plan, salt: int = 0, which: Sequence[int] = (0, 1, 2)) -> list[Vector]:
    """Return what clients' steps come to, with torch's generator wherever it happens to be."""
    task = load_task(plan.task, plan.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        trainer = LocalTrainer(plan, task, Constants(b"", NO_SOFT))
        start = trainer.layout.read(task.student(""))
    clients = [Client(task.client(i), Masks(salt), ("run", i, 1)) for i in which]
    bounded = plan.private is not None
    step = NoisyStep(0.5, 0.1, 5.0) if bounded else NoisyStep(None, 0.0, 5.0)
    return trainer.pseudo_gradients(start, clients, step)


@pytest.mark.parametrize("path", PATHS)
def test_what_layers_draw_follows_from_the_seed_and_from_nothing_else(path: str) -> None:
    plan = plan_of(*PATHS[path])
    assert (trained_alone(plan, load_task(plan.task, 0)) is None) == (path != "one by one")
    torch.rand(1)
    before, found = torch.get_rng_state(), trained(plan)
    assert torch.equal(before, torch.get_rng_state())  # nobody else's draws are moved
    torch.rand(1)
    assert all((a == b).all() for a, b in zip(found, trained(plan), strict=True))
    other = trained(plan, salt=1)
    assert all((a != b).any() for a, b in zip(found, other, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_clients_of_the_same_batches_meet_other_masks(path: str) -> None:
    plan = plan_of(*PATHS[path], "federation.sampling_rate=1.0")
    task = load_task(plan.task, 0)
    trainer = LocalTrainer(plan, task, Constants(b"", NO_SOFT))
    start, examples = trainer.layout.read(task.student("")), task.client(0)
    step = NoisyStep(None if plan.private is None else 0.5, 0.0, 5.0)

    def total(client: int) -> Vector:
        path = ("run", client, 1)
        return trainer.pseudo_gradient(start, examples, step, SeededRandomness(0), path)

    assert (total(0) == total(0)).all() and (total(0) != total(1)).any()


@pytest.mark.parametrize("path", PATHS)
def test_a_student_is_trained_as_one_whatever_its_task_left_it_as(path: str) -> None:
    right = trained(plan_of(*PATHS[path]))
    found = trained(plan_of(*PATHS[path], "task.name=drawing_tasks:resting"))
    assert all((a == b).all() for a, b in zip(found, right, strict=True))


def stop_after_one(metrics: dict[str, Any]) -> None:
    if metrics["round"] == 1:
        raise InterruptedError


def model(run: Run) -> str:
    return run.read_summary()["model"]


@pytest.mark.parametrize("path", PATHS)
def test_the_same_seed_gives_the_same_model_of_a_student_that_draws(
    path: str, tmp_path: Path
) -> None:
    """Again, by other workers, and after a stop; another seed gives another one."""
    plan = plan_of(*PATHS[path])
    right = model(simulate(plan, tmp_path / "right"))
    assert model(simulate(plan, tmp_path / "again")) == right
    two = simulate(plan_of(*PATHS[path], "engine.workers=2"), tmp_path / "two")
    assert model(two) == right
    with pytest.raises(InterruptedError):
        simulate(plan, tmp_path / "stopped", progress=stop_after_one)
    assert model(simulate(plan, tmp_path / "stopped", resume=True)) == right
    assert model(simulate(plan_of(*PATHS[path], "seed=1"), tmp_path / "other")) != right


def test_a_later_point_of_a_sweep_has_the_teacher_that_its_plan_has_alone(tmp_path: Path) -> None:
    grid = {"teacher.epochs": ("1", "2")}
    sweep = open_sweep(tmp_path / "sweep", manifest_of(Base("", tuple(SMALL)), grid, 1))
    assert run_sweep(sweep, Show()) == {}
    point = sweep.manifest.points[-1]
    assert model(simulate(point.plan, tmp_path / "alone")) == model(sweep.run_of(point))


@pytest.mark.parametrize("mode", ["offline", "online", "reverse"])
def test_a_lesson_depends_on_its_plan_alone(mode: str) -> None:
    plan = plan_of(f"student.distill.mode={mode}", "student.distill.kind=response")
    task = load_task(plan.task, plan.seed)
    first, again = (lesson(plan, task, task.public()) for _ in range(2))
    for one, other in ((first.teacher, again.teacher), (first.student, again.student)):
        weights = zip(one.parameters(), other.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in weights)


def test_a_key_decides_what_layers_draw() -> None:
    def draws(key: bytes) -> torch.Tensor:
        with layers_draw(key):
            return torch.rand(4)

    assert torch.equal(draws(b"12345678"), draws(b"12345678"))
    assert not torch.equal(draws(b"12345678"), draws(b"1234567a"))


class Picky(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("not these")


@pytest.mark.parametrize(
    ("model", "draws"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3)), True),
        (nn.Sequential(nn.Linear(4, 4), Dropped()), True),
        (nn.Sequential(nn.Linear(4, 4), nn.Softmax(1)), False),
        (nn.Sequential(Codes(2), nn.Embedding(2, 3)), False),
        (Picky(), True),
    ],
)
def test_a_trial_says_whether_a_student_draws(model: nn.Module, draws: bool) -> None:
    """Those that cannot be tried are taken to do so."""
    before = torch.get_rng_state()
    assert draws_numbers(model.eval(), (4,)) == draws
    assert torch.equal(before, torch.get_rng_state()) and not model.training
