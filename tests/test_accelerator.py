"""``engine.device``: a cohort's gradients elsewhere, and everything else as it is on the CPU.

No GPU is needed but for the last tests: with ``ACCELERATORS`` changed, the code that trains on a
GPU trains on the CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from reticent.client import together
from reticent.client.training import student_model
from reticent.core.errors import DataError, DependencyError, PlanError
from reticent.core.plan import Plan, parse_plan
from reticent.core.run import Run
from reticent.core.tasks import Examples, OwnedTask, load_task
from reticent.core.update import Layout
from reticent.privacy.ledger import Ledger
from reticent.server.journal import Journal
from reticent.server.preparation import Prepared
from reticent.simulations.accelerators import require_accelerator
from reticent.simulations.devices import ACCELERATORS
from reticent.simulations.explain import check_plan, sketched_constants
from reticent.simulations.simulate import simulate
from reticent.simulations.teams import worker_count

BASE = [
    *("task.clients=10", "task.public_examples=100", "teacher.epochs=1", "student.epochs=1"),
    *("federation.rounds=2", "federation.clients_per_round=10", "federation.learning_rate=0.5"),
    *('updates.codec=["identity"]', 'updates.broadcast=["identity"]', "engine.device=cuda"),
    *("student.prune.kind=none", "engine.workers=1"),
]
DIGITS = [*BASE, "task.name=digits", "federation.sampling_rate=0.2"]
TEXT = [*BASE, "task.name=text", "task.partition.examples_per_client=30"]
LOCAL = ["privacy.trust=local", "federation.steps_per_round=3"]
CLIENT = ["privacy.unit=client", "federation.steps_per_round=3"]
FLOAT = ["student.quantize.kind=none"]
PLANS = {
    "one step": DIGITS,
    "steps": [*DIGITS, *LOCAL, "privacy.clipping=per-layer", "federation.local.scaffold=true"],
    "unit client": [*DIGITS, *CLIENT],
    "no privacy": [*DIGITS, "privacy=off", *FLOAT],
    "recurrent": [*TEXT, *LOCAL, *FLOAT, "student.model=gru"],
    "attention": [*TEXT, *CLIENT, "student.model=attention"],
    "hooks": [*DIGITS, *LOCAL, *FLOAT, "student.model=odd_students:Rows"],
}
BOUND = 1e-3
"""Most by which a model may differ, of how far the rounds moved it."""

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here")
no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a CUDA GPU here")


@pytest.fixture(autouse=True)
def few_test_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = OwnedTask.test

    def few(task: OwnedTask) -> Examples:
        inputs, labels = whole(task)
        return Examples(inputs[:100], labels[:100])

    monkeypatch.setattr(OwnedTask, "test", few)


def models_of(run: Run) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the first and the last model."""
    journal, plan = Journal(run), run.plan()
    try:
        state, first = journal.latest(), journal.restore("start")
        assert state is not None and first is not None
    finally:
        journal.close()
    names = Layout.of(student_model(load_task(plan.task, plan.seed), plan)).names
    start = np.concatenate([first[name].ravel() for name in names])
    return start.astype(np.float64), state.weights.astype(np.float64)


def account_of(run: Run) -> list[tuple[Any, ...]]:
    """Return what every device was charged, entry by entry but for the time."""
    with Ledger.open(run.ledger) as ledger:
        return [
            (device, ledger.spent(device, 1e-5), ledger.events(device))
            for device in ledger.devices()
        ]


def both(
    plan: Plan, accelerator: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Run, Run]:
    """Run a plan, to the same noise, by the ordinary ways on the CPU and on an accelerator."""
    prepared = Prepared()
    with monkeypatch.context() as patch:
        patch.setitem(ACCELERATORS, "cuda", None)
        patch.setattr(together, "MOST_COPIED", 0)  # nothing by torch.func
        ordinary = simulate(plan, folder / "ordinary", prepared=prepared)
    monkeypatch.setitem(ACCELERATORS, "cuda", accelerator)
    return ordinary, simulate(plan, folder / "accelerated", prepared=prepared)


def alike(ordinary: Run, found: Run) -> None:
    (start, right), (begun, model) = models_of(ordinary), models_of(found)
    assert (start == begun).all() and (model != right).any()
    assert np.linalg.norm(model - right) <= BOUND * np.linalg.norm(right - start)
    assert account_of(found) == account_of(ordinary) and len(account_of(found)) == 10
    assert found.read_summary()["privacy"] == ordinary.read_summary()["privacy"]


@pytest.mark.parametrize("name", list(PLANS))
def test_a_run_gives_the_model_and_the_charges_of_the_ordinary_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alike(*both(parse_plan("", PLANS[name]), "cpu", tmp_path, monkeypatch))


@needs_cuda
@pytest.mark.parametrize("name", list(PLANS))
def test_a_run_on_a_gpu_gives_the_model_and_the_charges_of_the_cpu(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alike(*both(parse_plan("", PLANS[name]), "cuda", tmp_path, monkeypatch))


def test_the_cpu_is_the_default_and_leaves_the_digest_as_it_is() -> None:
    plain, cpu = parse_plan("", []), parse_plan("", ["engine.device=cpu"])
    assert plain.engine.device == "cpu" and plain.digest == cpu.digest
    assert plain.digest == parse_plan("", ["engine.workers=3"]).digest


def test_another_device_is_another_run_with_noise_of_its_own() -> None:
    assert parse_plan("", ["engine.device=cuda"]).digest != parse_plan("", []).digest


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["engine.device=gpu"], ["engine.device", "'cpu' or 'cuda'"]),
        (["engine.kind=ray"], ['engine.device="cuda"', 'unless engine.kind is "inprocess"']),
        (["engine.kind=flower-ray"], ['engine.device="cuda"', '"flower-ray"']),
        (["engine.workers=2"], ['engine.device="cuda"', "engine.workers=2", "one process"]),
    ],
)
def test_what_does_not_go_with_a_device_is_refused(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        parse_plan("", ["engine.device=cuda", *overrides])
    assert all(part in str(caught.value) for part in parts)


def test_one_process_has_the_device() -> None:
    plan = parse_plan("", [*DIGITS, "task.clients=99", "federation.clients_per_round=99"])
    assert worker_count(plan, 8) == 1


@no_cuda
def test_without_a_gpu_nothing_is_begun(tmp_path: Path) -> None:
    plan = parse_plan("", DIGITS)
    check_plan(plan)  # a plan may be written where it is not run
    with pytest.raises(DependencyError, match=r'engine\.device="cuda": torch .* finds no GPU here'):
        simulate(plan, tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Asking(nn.Linear):
    """Looks at a value, which torch.func does not let it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore
        flat = x.flatten(1)
        return super().forward(flat if float(x.sum()) > 0 else -flat)


def asking(shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(Asking(64, classes))


def test_a_student_that_cannot_be_trained_there_is_refused_before_anything_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = [*DIGITS, *CLIENT, *FLOAT]
    plan = parse_plan("", [*sets, f"student.model={__name__}:asking"])
    for refused in (check_plan, lambda plan: simulate(plan, tmp_path / "run")):
        with pytest.raises(DataError, match=r'engine\.device="cuda": must be "cpu".*item'):
            refused(plan)
    assert not (tmp_path / "run").exists()


def test_adapted_layers_with_rounded_weights_are_refused() -> None:
    adapted = ["student.adapt.kind=lora", "student.adapt.rank=2"]
    with pytest.raises(DataError, match="adapted layers are rounded"):
        check_plan(parse_plan("", [*DIGITS, *adapted]))


def test_the_device_itself_is_tried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here one whose tensors hold nothing, so that nothing comes back from it."""
    monkeypatch.setitem(ACCELERATORS, "cuda", "meta")
    plan = parse_plan("", DIGITS)
    task, _ = check_plan(plan)
    with pytest.raises(DataError, match="meta"):
        require_accelerator(plan, task, sketched_constants(plan, task))
