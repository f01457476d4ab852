"""One contract for all tasks: shapes, types, disjoint parts, determinism, laziness."""

from __future__ import annotations

import doctest
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import reticent.core.tasks
from reticent.core.errors import DataError
from reticent.core.plan import Partition, TaskSection
from reticent.core.tasks import ArrayTask, Examples, ImageTask, Task, load_task, sources

Maker = Callable[[TaskSection, int], Task]


def _array_task(section: TaskSection, seed: int) -> Task:
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(1500, 1, 8, 8)), rng.integers(3, size=1500)
    return ArrayTask(
        section,
        seed,
        inputs=x[:1400],
        labels=y[:1400],
        test_inputs=x[1400:],
        test_labels=y[1400:],
        classes=3,
    )


def _named(section: TaskSection, seed: int) -> Task:
    return load_task(section, seed)


def _has_full() -> bool:
    try:
        return all(sources.find_official(name) for name in sources.OFFICIAL)
    except DataError:
        return False


MAKERS = [
    pytest.param(_named, "digits", id="digits"),
    pytest.param(_named, "fashion", id="fashion"),
    pytest.param(
        _named,
        "fashion-full",
        id="fashion-full",
        marks=pytest.mark.skipif(not _has_full(), reason="the official files are not here"),
    ),
    pytest.param(_array_task, "arrays", id="arrays"),
]
contract = pytest.mark.parametrize(("make", "name"), MAKERS)


def _section(name: str, **partition: object) -> TaskSection:
    return TaskSection.model_validate(
        {"name": name, "clients": 20, "public_examples": 100, "partition": partition}
    )


def _rows(examples: Examples) -> set[bytes]:
    return {row.numpy().tobytes() for row in examples.inputs}


def _same(a: Examples, b: Examples) -> bool:
    return torch.equal(a.inputs, b.inputs) and torch.equal(a.labels, b.labels)


@contract
def test_shapes_types_and_models(make: Maker, name: str) -> None:
    task = make(_section(name), 0)
    assert isinstance(task, Task)
    assert task.name == name
    assert task.clients == 20
    for examples in (task.public(), task.client(3), task.test()):
        assert examples.inputs.dtype == torch.float32
        assert examples.labels.dtype == torch.int64
        assert examples.inputs.shape == (len(examples.labels), *task.input_shape)
        assert int(examples.labels.min()) >= 0
        assert int(examples.labels.max()) < task.classes
        assert abs(float(examples.inputs.mean())) < 0.3
        assert 0.7 < float(examples.inputs.std()) < 1.3
    for model in (task.teacher(), task.student("tiny")):
        assert model(task.public().inputs[:2]).shape == (2, task.classes)


@contract
@pytest.mark.parametrize("kind", ["iid", "dirichlet", "shards"])
def test_public_private_and_test_are_disjoint_and_complete(
    make: Maker, name: str, kind: str
) -> None:
    task = make(_section(name, kind=kind), 0)
    public, test = task.public(), task.test()
    clients = [task.client(i) for i in range(20)]
    groups = [_rows(public), _rows(test), *(_rows(c) for c in clients)]
    total = len(public.labels) + len(test.labels) + sum(len(c.labels) for c in clients)
    if name == "fashion-full":  # a few images of the official files occur twice
        assert total == 70_000
    else:
        assert total == {"digits": 1797, "fashion": 12_000, "arrays": 1500}[name]
        assert len(set().union(*groups)) == sum(len(g) for g in groups) == total


@contract
def test_results_depend_on_the_seed_and_not_on_the_order_of_calls(make: Maker, name: str) -> None:
    section = _section(name, kind="dirichlet")
    one, two, other = make(section, 7), make(section, 7), make(section, 8)
    late = one.client(19)
    assert _same(two.client(0), one.client(0))
    assert _same(two.public(), one.public())
    assert _same(two.client(19), late)
    assert _same(two.test(), one.test())
    assert not _same(other.public(), one.public())
    assert not _same(other.client(0), one.client(0))
    assert _same(other.test(), one.test())  # a seed never moves the test part


@contract
def test_the_public_part_is_balanced_over_labels(make: Maker, name: str) -> None:
    task = make(_section(name), 0)
    counts = torch.bincount(task.public().labels, minlength=task.classes)
    assert int(counts.sum()) == 100
    assert int(counts.max() - counts.min()) <= 1


@contract
def test_nominal_examples_is_a_public_constant(make: Maker, name: str) -> None:
    task = make(_section(name), 0)
    private = sum(len(task.client(i).labels) for i in range(20))
    assert task.nominal_examples == private // 20
    own = make(_section(name, examples_per_client=37), 0)
    assert own.nominal_examples == 37 == len(own.client(0).labels)


@contract
def test_there_are_no_other_clients(make: Maker, name: str) -> None:
    task = make(_section(name), 0)
    for index in (-1, 20):
        with pytest.raises(DataError, match=f"client {index}: must be 0 to 19"):
            task.client(index)


@contract
def test_what_is_returned_can_be_changed_without_harm(make: Maker, name: str) -> None:
    task = make(_section(name), 0)
    for get in (task.public, task.test, lambda: task.client(0)):
        before = get().inputs.clone()
        get().inputs.zero_()
        assert torch.equal(get().inputs, before)


@contract
def test_a_section_that_the_data_cannot_serve_is_refused_at_once(make: Maker, name: str) -> None:
    with pytest.raises(DataError, match=r"task\.public_examples=60000: must be at most"):
        make(TaskSection(name=name, public_examples=60_000), 0)
    with pytest.raises(DataError, match=r"would have no data.*task\.clients=60000"):
        make(TaskSection(name=name, public_examples=100, clients=60_000), 0)


@contract
def test_a_million_clients(make: Maker, name: str) -> None:
    partition = Partition(kind="dirichlet", alpha=0.3, examples_per_client=8)
    section = TaskSection(name=name, clients=10**6, public_examples=100, partition=partition)
    task = make(section, 0)
    assert len(task.client(999_999).labels) == 8
    assert not _same(task.client(999_999), task.client(999_998))


def test_the_documented_example_is_right() -> None:
    result = doctest.testmod(reticent.core.tasks)
    assert result.attempted >= 1
    assert result.failed == 0


def test_the_public_part_of_a_larger_plan_holds_that_of_a_smaller_one() -> None:
    small, large = (
        load_task(TaskSection(name="digits", clients=5, public_examples=n), 0).public()
        for n in (50, 200)
    )
    assert _same(small, Examples(large.inputs[:50], large.labels[:50]))


def test_construction_reads_nothing_and_pickles_small(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sources, "EMBEDDED", tmp_path)
    section = TaskSection(name="fashion", clients=5)
    assert isinstance(load_task(section, 0), ImageTask)
    assert len(pickle.dumps(load_task(section, 0))) < 2000


def test_inputs_are_pixels_normalised_by_public_constants() -> None:
    task, arrays = load_task(TaskSection(name="fashion", clients=5), 0), sources.load_fashion()
    expected = (arrays.test_images / 255 - 0.2860) / 0.3530
    assert np.allclose(task.test().inputs.numpy()[:, 0], expected, atol=1e-6)


@pytest.mark.skipif(not os.environ.get("RETICENT_DATA"), reason="RETICENT_DATA is not set")
def test_the_embedded_part_is_from_the_official_training_file() -> None:
    full, part = sources.load_fashion_full(), sources.load_fashion()
    train = {row.tobytes() for row in full.train_images}
    chosen = [row.tobytes() for images in (part.train_images, part.test_images) for row in images]
    assert train.issuperset(chosen)
