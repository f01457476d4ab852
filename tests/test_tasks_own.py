"""A user's own tasks: arrays, imports, and the example."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from reticent.core.errors import DataError, PlanError
from reticent.core.models import own_student
from reticent.core.plan import TaskSection, load_plan
from reticent.core.tasks import ArrayTask, Task, load_task

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "own_task"


def _arrays(**changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    arrays = {
        "inputs": rng.normal(size=(60, 2)),
        "labels": rng.integers(3, size=60),
        "test_inputs": rng.normal(size=(9, 2)),
        "test_labels": rng.integers(3, size=9),
        "classes": 3,
    }
    return {**arrays, **changes}


def _task(**changes: Any) -> ArrayTask:
    section = TaskSection(name="own", clients=4, public_examples=12)
    return ArrayTask(section, 0, **_arrays(**changes))


def test_models_are_made_by_the_users_callables() -> None:
    seen: list[Any] = []

    def student(model: str, shape: tuple[int, ...], classes: int) -> nn.Module:
        seen.append((model, shape, classes))
        return nn.Linear(shape[0], classes)

    task = _task(teacher=lambda shape, classes: nn.Linear(shape[0], classes), student=student)
    assert task.student("mine")(task.public().inputs).shape == (12, 3)
    assert task.teacher()(task.client(0).inputs).shape == (12, 3)
    assert seen == [("mine", (2,), 3)]
    with pytest.raises(DataError, match="channels, height, width"):
        _task().teacher()


def test_what_a_plan_names_must_take_the_arguments_it_is_given() -> None:
    with pytest.raises(PlanError, match=r"json:loads.*cannot be called with 2 arguments"):
        load_task(TaskSection(name="json:loads"), 0)
    with pytest.raises(DataError, match=r"operator:add.*raised TypeError"):
        load_task(TaskSection(name="operator:add"), 0)
    with pytest.raises(PlanError, match=r"student.model=.*json:loads.*2 arguments"):
        own_student("json:loads", (1,), 2)


def test_the_number_by_which_updates_are_divided_need_not_follow_the_arrays() -> None:
    """Where they are private as a whole, as on a device, their number must not show."""
    assert _task().nominal_examples == 12  # (60 - 12) / 4
    assert _task(nominal_examples=30).nominal_examples == 30
    fewer = {"inputs": np.ones((40, 2)), "labels": np.arange(40) % 3}
    assert _task(**fewer).nominal_examples == 7
    assert _task(**fewer, nominal_examples=30).nominal_examples == 30
    with pytest.raises(DataError, match="nominal_examples=0: must be at least 1"):
        _task(nominal_examples=0)


def test_arrays_may_be_tensors_and_any_number_type() -> None:
    task = _task(inputs=torch.arange(120).view(60, 2), labels=(torch.arange(60) % 3).byte())
    assert task.public().inputs.dtype == torch.float32
    assert task.public().labels.dtype == torch.int64
    inputs, labels = task.client(1)
    assert torch.equal((inputs[:, 0] / 2).long() % 3, labels)  # rows kept their labels


def test_later_changes_to_the_users_arrays_have_no_effect() -> None:
    arrays = _arrays(inputs=np.ones((60, 2), np.float32), test_inputs=np.ones((9, 2), np.float32))
    task = _task(**arrays)
    arrays["inputs"][:] = 5
    arrays["test_inputs"][:] = 5
    assert float(task.public().inputs.max()) == 1
    assert float(task.test().inputs.max()) == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"labels": np.zeros(60)}, "training labels are float64"),
        ({"labels": np.zeros((60, 1), int)}, "shape \\(60, 1\\)"),
        ({"labels": np.full(60, 3)}, "from 3 to 3: must be 0 to 2"),
        ({"labels": np.full(60, -1)}, "from -1 to -1"),
        ({"inputs": np.zeros((59, 2))}, "must be numbers of shape \\(60, ...\\)"),
        ({"inputs": np.zeros(60)}, "training inputs"),
        ({"inputs": np.full((60, 2), "a")}, "training inputs are <U1"),
        ({"inputs": np.full((60, 2), np.nan)}, "must be finite"),
        ({"inputs": np.full((60, 2), 1e300)}, "must be finite"),
        ({"test_inputs": np.zeros((9, 3))}, r"test inputs have shape \(3,\): must be \(2,\)"),
        ({"test_inputs": np.zeros((0, 2)), "test_labels": np.zeros(0, int)}, "n at least 1"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        _task(**changes)


def test_unknown_names_are_refused_with_a_suggestion() -> None:
    with pytest.raises(PlanError, match=r'task\.name="fasion": .*digits.*mean "fashion"'):
        load_task(TaskSection(name="fasion"), 0)


@pytest.mark.parametrize(
    ("spec", "code", "error", "reason"),
    [
        ("mod_none:x", "y = 1", PlanError, "x does not exist in module mod_none"),
        ("mod_number:x", "x = 1", PlanError, "x is not callable"),
        ("mod_syntax:x", "def", PlanError, "cannot be imported: invalid syntax"),
        ("mod_needs:x", "import not_there_zzz", PlanError, "No module named 'not_there_zzz'"),
        ("mod_dots:x.y", "x = 1", PlanError, "must look like"),
        ("mod_list:x", "def x(section, seed): return [1]", DataError, "list.*not a task.*classes"),
    ],
)
def test_own_tasks_that_cannot_be_used_are_explained(
    spec: str,
    code: str,
    error: type[Exception],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / f"{spec.split(':')[0]}.py").write_text(code + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(error, match=reason) as caught:
        load_task(TaskSection(name=spec), 0)
    assert str(caught.value).startswith(f'task.name="{spec}": ')


def test_a_module_that_is_not_there_is_explained() -> None:
    with pytest.raises(PlanError, match=r"not_there_zzz.*PYTHONPATH"):
        load_task(TaskSection(name="not_there_zzz:task"), 0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small models on busy cores: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Task:
    """The example's task, made from the example's plan."""
    monkeypatch.syspath_prepend(EXAMPLE)
    importlib.invalidate_caches()
    plan = load_plan(EXAMPLE / "plan.toml")
    return load_task(plan.task, plan.seed)


def test_the_example_is_short() -> None:
    assert len((EXAMPLE / "own_task.py").read_text().splitlines()) < 60


def _accuracy(task: Task, labels: torch.Tensor, inputs: torch.Tensor) -> float:
    torch.manual_seed(0)
    model = task.student("own_task:student")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(2):
        for x, y in zip(inputs.split(100), labels.split(100), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    test = task.test()
    return float((model.eval()(test.inputs).argmax(1) == test.labels).float().mean())


def test_the_examples_task_can_be_learned_from_the_clients_data(example: Task) -> None:
    parts = [example.client(i) for i in range(example.clients)]
    inputs, labels = torch.cat([p.inputs for p in parts]), torch.cat([p.labels for p in parts])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    inputs, labels = inputs[order], labels[order]
    assert _accuracy(example, labels, inputs) > 0.75  # chance is 0.25
    assert _accuracy(example, labels.roll(1), inputs) < 0.4  # labels of other patches


def test_the_examples_labels_are_not_readable_from_noise(example: Task) -> None:
    # The mean of a patch says nothing of its direction: the task needs a model.
    test = example.test()
    means = [test.inputs[test.labels == c].mean() for c in range(4)]
    assert float(torch.stack(means).std()) < 0.05
