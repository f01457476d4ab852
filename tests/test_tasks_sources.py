"""Embedded data are verified, absent data are explained, and the embedding script is exact."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from reticent.core.errors import DataError
from reticent.core.plan import TaskSection
from reticent.core.tasks import load_task, sources
from reticent.core.tasks.idx import encode_idx, gzip_bytes, read_idx

ROOT = Path(__file__).resolve().parent.parent


def test_embedded_labels_are_balanced_and_pixels_in_range() -> None:
    fashion, digits = sources.load_fashion(), sources.load_digits()
    assert np.bincount(fashion.train_labels).tolist() == [1000] * 10
    assert np.bincount(fashion.test_labels).tolist() == [200] * 10
    assert fashion.train_images.max() == 255
    assert digits.train_images.max() == 16
    assert np.bincount(digits.test_labels).min() >= 20  # the test part is a fair sample


@pytest.mark.parametrize("source", sources.SOURCES.values(), ids=sources.SOURCES.keys())
def test_what_is_said_of_a_source_is_so(source: sources.ImageSource) -> None:
    if source.name == "fashion-full":
        try:
            arrays = source.load()
        except DataError:
            pytest.skip("the official files are not here")
    else:
        arrays = source.load()
    assert arrays.train_images.shape == (source.train, source.side, source.side)
    assert arrays.test_images.shape == (source.test, source.side, source.side)
    assert arrays.train_labels.shape == (source.train,)
    assert arrays.test_labels.shape == (source.test,)
    pixels = arrays.train_images / source.white
    assert pixels.mean() == pytest.approx(source.mean, abs=0.005)
    assert pixels.std() == pytest.approx(source.std, abs=0.005)


def test_embedded_data_are_small_and_carry_their_notices() -> None:
    files = list(sources.EMBEDDED.iterdir())
    assert sum(f.stat().st_size for f in files) < 6 * 2**20
    assert "Zalando SE" in (sources.EMBEDDED / "LICENSE-fashion-mnist.txt").read_text("utf-8")
    assert "Alpaydin" in (sources.EMBEDDED / "LICENSE-digits.txt").read_text("utf-8")
    sums = json.loads((sources.EMBEDDED / "sums.json").read_text())
    assert {f.name for f in files if f.suffix == ".gz"} == set(sums)


def test_a_changed_embedded_file_is_refused(tmp_path: Path) -> None:
    name = "digits-labels.idx.gz"
    shutil.copy(sources.EMBEDDED / "sums.json", tmp_path)
    labels = read_idx(sources.EMBEDDED / name).copy()
    (tmp_path / name).write_bytes(gzip_bytes(encode_idx(labels)))
    assert np.array_equal(sources.read_embedded(name, tmp_path), labels)
    labels[0] += 1
    (tmp_path / name).write_bytes(gzip_bytes(encode_idx(labels)))
    with pytest.raises(DataError, match=rf"{name}: SHA-256"):
        sources.read_embedded(name, tmp_path)


def test_a_damaged_installation_is_named(tmp_path: Path) -> None:
    for text in (None, "{}", "[1", "[]"):
        if text is not None:
            (tmp_path / "sums.json").write_text(text)
        with pytest.raises(DataError, match="install the package again"):
            sources.read_embedded("digits-labels.idx.gz", tmp_path)


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Hide any full data set that this machine has."""
    monkeypatch.setattr(sources, "SYSTEM", tmp_path / "system")
    monkeypatch.delenv("RETICENT_DATA", raising=False)
    sources.load_fashion_full.cache_clear()
    return tmp_path


def test_absent_full_data_say_how_to_get_them(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = load_task(TaskSection(name="fashion-full", clients=5), 0)
    for own in (None, str(nowhere / "own")):
        if own:
            monkeypatch.setenv("RETICENT_DATA", own)
        with pytest.raises(DataError, match=r"apt-get install dataset-fashion.*RETICENT_DATA"):
            task.public()
    with pytest.raises(DataError, match=r"not in .*own or .*system"):
        task.test()


def test_a_wrong_official_file_is_refused(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETICENT_DATA", str(nowhere))
    for name in sources.OFFICIAL:
        (nowhere / name).write_bytes(encode_idx(np.zeros((3, 2), np.uint8)))
    with pytest.raises(DataError, match="train-images-idx3-ubyte: SHA-256 of the content"):
        load_task(TaskSection(name="fashion-full", clients=5), 0).client(0)


def test_the_users_folder_comes_first_and_gzip_is_optional(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "t10k-labels-idx1-ubyte"
    (nowhere / "system").mkdir()
    (nowhere / "system" / f"{name}.gz").write_bytes(b"")
    assert sources.find_official(name) == nowhere / "system" / f"{name}.gz"
    (nowhere / "own").mkdir()
    (nowhere / "own" / name).write_bytes(b"")
    monkeypatch.setenv("RETICENT_DATA", str(nowhere / "own"))
    assert sources.find_official(name) == nowhere / "own" / name


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """Load the embedding script as a module."""
    spec = importlib.util.spec_from_file_location("embed_data", ROOT / "scripts" / "embed_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_chooses_balanced_and_disjoint_parts(script: ModuleType) -> None:
    labels = np.random.default_rng(0).permutation(np.arange(500) % 5).astype(np.uint8)
    kept, held = script.choose(labels, 60, 20, seed=1)
    assert not set(kept) & set(held)
    assert len(set(kept)) == 300
    assert len(set(held)) == 100
    assert np.bincount(labels[kept]).tolist() == [60] * 5
    assert np.bincount(labels[held]).tolist() == [20] * 5
    again, other = (script.choose(labels, 60, 20, seed=s)[0] for s in (1, 2))
    assert np.array_equal(again, kept)
    assert not np.array_equal(other, kept)
    with pytest.raises(DataError, match="100 examples, need 101"):
        script.choose(labels, 60, 41, seed=1)


def test_the_script_writes_what_the_package_reads(script: ModuleType, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(256, size=(5, 4, 4), dtype=np.uint8)
    (tmp_path / "sums.json").write_text(json.dumps(script.write({"a.idx.gz": images}, tmp_path)))
    first = (tmp_path / "a.idx.gz").read_bytes()
    assert np.array_equal(sources.read_embedded("a.idx.gz", tmp_path), images)
    script.write({"a.idx.gz": images}, tmp_path)
    assert (tmp_path / "a.idx.gz").read_bytes() == first


def test_the_embedded_files_are_what_the_script_writes(script: ModuleType, tmp_path: Path) -> None:
    names = ["digits-labels.idx.gz", "fashion-test-labels.idx.gz"]
    arrays = {name: sources.read_embedded(name) for name in names}
    sums = json.loads((sources.EMBEDDED / "sums.json").read_text())
    assert script.write(arrays, tmp_path) == {name: sums[name] for name in names}
