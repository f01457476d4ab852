"""Activities of people: a user's file is checked, converted, split by person, and trained on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from reticent.cli.main import cli
from reticent.compression.convert import calibrate, compare, convert, fake_quantized_model
from reticent.compression.fold import fold_batchnorm
from reticent.compression.integer import build
from reticent.core import models
from reticent.core.errors import DataError
from reticent.core.plan import Partition, TaskSection
from reticent.core.tasks import OwnedTask, Task, load_task
from reticent.core.tasks.har import TEST, add_har

NATURAL = TaskSection(
    name="har", clients=17, public_examples=1000, partition=Partition(kind="natural")
)


def _arrays() -> dict[str, Any]:
    """Return 252 windows of each of 30 people: an activity is a frequency, a person an offset."""
    users = np.repeat(np.arange(1, 31, dtype=np.uint8), 252)
    labels = np.tile(np.arange(6, dtype=np.uint8), len(users) // 6)
    time = np.arange(128, dtype=np.float32) / 50
    wave = np.sin(2 * np.pi * (labels[:, None] + 1) * time).astype(np.float16)
    signals = np.repeat(wave[:, None], 6, axis=1) * np.float16(0.3)
    signals[:, 0] += np.float16(1.0)
    signals[:, 1] += (users[:, None] / 100).astype(np.float16)
    # No two windows are the same.
    signals[:, 5, 0], signals[:, 5, 1] = np.divmod(np.arange(len(users)), 128)
    return {"signals": signals, "label": labels, "user": users}


@pytest.fixture(scope="module")
def arrays() -> dict[str, Any]:
    return _arrays()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RETICENT_DATA", str(tmp_path / "data"))
    return tmp_path


def _file(folder: Path, arrays: dict[str, Any]) -> Path:
    path = folder / "own.npz"
    np.savez(path, **arrays)
    return path


def test_a_file_becomes_a_task_of_people(folder: Path, arrays: dict[str, Any]) -> None:
    where, known = add_har(_file(folder, arrays))
    assert (where, known) == (folder / "data" / "har.safetensors", False)
    task = load_task(NATURAL, 0)
    assert isinstance(task, Task)
    assert isinstance(task, OwnedTask)
    assert (task.classes, task.input_shape, task.nominal_examples) == (6, (6, 1, 128), 330)
    raw = arrays["signals"].astype(np.float32)
    scale = np.full((6, 1), 0.4, np.float32)
    shift = np.array([0.8, 0, 0, 0, 0, 0], np.float32)[:, None]
    held_out = np.isin(arrays["user"], TEST)
    test = task.test()
    assert np.array_equal(test.inputs.numpy(), ((raw[held_out] - shift) / scale)[:, :, None])
    assert np.array_equal(test.labels.numpy(), arrays["label"][held_out])
    rows = [{r.numpy().tobytes() for r in task.client(i).inputs} for i in range(17)]
    rows += [{r.numpy().tobytes() for r in e.inputs} for e in (task.public(), test)]
    assert [len(r) for r in rows] == [252] * 17 + [1000, 9 * 252]
    assert len(set.union(*rows)) == sum(map(len, rows))


def test_pipes_devices_and_huge_files_are_refused_unread(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    for path in (folder / "pipe", Path("/dev/zero")):
        with pytest.raises(DataError, match="must be a plain file"):
            add_har(path)
    huge = folder / "huge.npz"
    with huge.open("wb") as file:
        file.truncate(2**40)  # a sparse file: it takes no room on the disk
    with pytest.raises(DataError, match=rf"has {2**40} bytes: at most {2**28} allowed"):
        add_har(huge)


def _without(name: str) -> Any:
    return lambda a: {k: v for k, v in a.items() if k != name}


def _with(name: str, value: Any) -> Any:
    return lambda a: {**a, name: value(a[name])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("user"), "must hold arrays signals, label and user"),
        (_with("signals", lambda s: s[:, :, :100]), r"must be floats of shape \(n, 6, 128\)"),
        (_with("signals", lambda s: s.astype(np.int16)), "signals are int16"),
        (_with("signals", lambda s: s[:0]), "must be floats of shape"),
        (_with("signals", lambda s: np.where(s > 1.2, np.nan, s)), "NaN or infinity"),
        (_with("signals", lambda s: s * np.float16(9.8)), r"divide m/s² by 9\.80665"),
        (_with("label", lambda v: v + 1), "label goes from 1 to 6: must be 0 to 5"),
        (_with("label", lambda v: v[:-1]), "label is uint8 of shape"),
        (_with("user", lambda v: v - 1), "user goes from 0 to 29: must be 1 to 30"),
        (_with("user", lambda v: np.minimum(v, 29)), "user 30 has 0 windows: must be at least 250"),
        (_with("user", lambda v: v.astype(object)), "cannot be read as .npz"),
    ],
)
def test_any_other_file_is_refused_and_nothing_is_written(
    folder: Path, arrays: dict[str, Any], change: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        add_har(_file(folder, change(arrays)))
    assert not (folder / "data").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a file of arrays"])
def test_what_is_no_npz_is_refused(folder: Path, content: bytes) -> None:
    path = folder / "bad.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        add_har(path)
    np.save(folder / "array.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        add_har(folder / "array.npy")
    with pytest.raises(DataError, match="cannot be read: No such file"):
        add_har(folder / "absent.npz")


def test_data_that_are_absent_or_damaged_are_said_to_be(
    folder: Path, arrays: dict[str, Any]
) -> None:
    with pytest.raises(DataError, match="reticent data add har PATH"):
        load_task(NATURAL, 0).public()
    path, _ = add_har(_file(folder, arrays))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="is damaged"):
        load_task(NATURAL, 0).public()


def test_the_command_adds_and_lists(folder: Path, arrays: dict[str, Any]) -> None:
    run = CliRunner()
    before = run.invoke(cli, ["data", "list"])
    assert "har: run `reticent data add har PATH`" in before.output
    added = run.invoke(cli, ["data", "add", "har", str(_file(folder, arrays))])
    assert added.exit_code == 0
    assert "added har (a conversion of your own)" in added.output
    listed = run.invoke(cli, ["data", "list", "--json"])
    assert f'"where": "{folder / "data" / "har.safetensors"}"' in listed.output


def test_kernels_on_signals_lie_along_time() -> None:
    student = models.student("tiny", (6, 1, 128), 6)
    teacher = models.teacher((6, 1, 128), 6)
    for model in (student, teacher):
        kernels = {m.kernel_size for m in model.modules() if isinstance(m, torch.nn.Conv2d)}
        assert kernels == {(1, 9)}
    wide = models.student("wide", (6, 1, 128), 6)
    kernels = [m.kernel_size for m in wide.modules() if isinstance(m, torch.nn.Conv2d)]
    assert kernels == [(1, 25), (1, 9)]


@pytest.mark.parametrize("kind", models.STUDENTS)
def test_students_of_signals_become_int8(kind: str) -> None:
    draws = torch.Generator().manual_seed(0)
    inputs = torch.randn((20, 6, 1, 128), generator=draws)
    student = models.student(kind, (6, 1, 128), 6)
    assert isinstance(student, torch.nn.Sequential)
    folded = fold_batchnorm(student.eval())
    ranges = calibrate(folded, inputs)
    integer = build(convert(folded, ranges))
    assert compare(fake_quantized_model(folded, ranges), integer, inputs).argmax == 1.0


REAL = Path(os.environ.get("RETICENT_DATA", "/nowhere")) / "har.npz"


@pytest.mark.skipif(not REAL.is_file(), reason="RETICENT_DATA holds no har.npz")
def test_the_published_windows(folder: Path) -> None:
    _, known = add_har(REAL)
    assert known
    task = load_task(NATURAL, 0)
    assert len(task.test().labels) == 2874
    assert sorted(len(task.client(i).labels) for i in range(17))[0] >= 269
    values = task.public().inputs
    assert abs(float(values.mean())) < 0.1
    assert 0.8 < float(values.std()) < 1.2
