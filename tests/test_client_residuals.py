"""Error feedback: what a codec leaves out is sent later, survives restarts, and repeats exactly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from reticent.client.kept import MOST_RUNS, Kept
from reticent.compression.codec import build_codec
from reticent.core.errors import DataError, PlanError
from reticent.core.plan import parse_plan
from reticent.core.update import Layout
from reticent.simulations.admission import check_codecs
from reticent.simulations.simulate import simulate

SIZE = 40
ZEROS = np.zeros(SIZE, dtype=np.float32)


def residuals(folder: Path, run: str = "run", device: str = "device/../x") -> Kept:
    return Kept(folder, device, run)


def test_a_round_finds_what_the_latest_earlier_one_left(tmp_path: Path) -> None:
    kept = residuals(tmp_path)
    assert not kept.before(1, ZEROS).any()
    for number in (1, 2, 5):
        kept.keep(number, np.full(SIZE, number, dtype=np.float32))
    assert kept.before(7, ZEROS)[0] == 5
    assert kept.before(5, ZEROS)[0] == 2  # the same round again
    assert not kept.before(2, ZEROS).any()  # older ones are gone
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    assert not residuals(tmp_path, run="other").before(9, ZEROS).any()
    assert not residuals(tmp_path, device="other").before(9, ZEROS).any()
    assert all(tmp_path in path.parents for path in tmp_path.rglob("*"))


def vector(number: float) -> np.ndarray:
    return np.full(SIZE, number, dtype=np.float32)


def held(folder: Path, *runs: str) -> list[float]:
    """Return what the runs find, 0 for nothing."""
    return [float(residuals(folder, run).before(99, ZEROS)[0]) for run in runs]


def test_what_is_kept_does_not_grow_with_the_runs_there_ever_were(tmp_path: Path) -> None:
    residuals(tmp_path).keep(1, ZEROS)
    (folder,) = tmp_path.iterdir()
    (folder / "notes.txt").touch()  # the owner's
    (folder / f"{'ab' * 8}.new").touch()  # of a process that died
    for number in range(1, 30):
        for round in (1, 2, 3):
            residuals(tmp_path, f"run{number}").keep(round, vector(number))
    assert len(list(folder.iterdir())) == 2 * MOST_RUNS + 1 and (folder / "notes.txt").exists()
    last = [f"run{number}" for number in range(30 - MOST_RUNS, 30)]
    assert held(tmp_path, "run1", f"run{29 - MOST_RUNS}", *last) == [
        0,
        0,
        *range(30 - MOST_RUNS, 30),
    ]


def test_runs_that_take_turns_lose_nothing_and_one_that_stood_still_begins_anew(
    tmp_path: Path,
) -> None:
    runs = [f"run{number}" for number in range(MOST_RUNS)]
    for round in range(1, 6):
        for number, run in enumerate(runs, 1):
            residuals(tmp_path, run).keep(round, vector(10 * number + round))
        assert held(tmp_path, *runs) == [10 * n + round for n in range(1, MOST_RUNS + 1)]
    residuals(tmp_path, runs[0]).keep(6, vector(16))  # the others are now the older ones
    residuals(tmp_path, "another").keep(1, vector(1))
    assert held(tmp_path, "another", *runs[:2]) == [1, 16, 0]
    residuals(tmp_path, runs[1]).keep(6, vector(26))  # it goes on, from the public values
    assert held(tmp_path, runs[1], "another", runs[0]) == [26, 1, 16]


def test_a_clock_that_was_set_back_makes_the_newest_run_no_older(tmp_path: Path) -> None:
    for number in range(MOST_RUNS):
        residuals(tmp_path, f"before{number}").keep(1, vector(1))
    for path in tmp_path.rglob("*.safetensors"):
        os.utime(path, (4e9, 4e9))
    for round in (1, 2):
        for run in ("one", "two"):
            residuals(tmp_path, run).keep(round, vector(round))
    assert held(tmp_path, "one", "two") == [2, 2]


def test_what_is_kept_is_its_owners_alone_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        kept = residuals(tmp_path / "residuals")
        kept.keep(1, vector(1))
    finally:
        os.umask(before)
    (path,) = tmp_path.rglob("*.safetensors")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    kept._path(2).mkdir()
    with pytest.raises(DataError, match="cannot be written"):
        kept.keep(2, vector(2))
    assert [p for p in path.parent.iterdir() if p.is_file()] == [path]


def test_a_restart_finds_it_too(tmp_path: Path) -> None:
    script = (
        "import numpy as np, pathlib; from reticent.client.kept import Kept;"
        f"Kept(pathlib.Path({str(tmp_path)!r}), 'device/../x', 'run')"
        f".keep(3, np.arange({SIZE}, dtype=np.float32)); import os; os._exit(9)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", script], env=env, check=False).returncode == 9
    assert np.array_equal(residuals(tmp_path).before(4, ZEROS), np.arange(SIZE))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no tensors",
        save({"other": np.zeros(SIZE, np.float32)}),
        save({"vector": np.zeros(SIZE)}),
        save({"vector": np.zeros(SIZE + 1, np.float32)}),
        save({"vector": np.full(SIZE, np.nan, np.float32)}),
    ],
)
def test_a_damaged_file_is_named_and_not_used(data: bytes, tmp_path: Path) -> None:
    kept = residuals(tmp_path)
    kept.keep(1, np.zeros(SIZE, dtype=np.float32))
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(data)
    with pytest.raises(DataError, match="delete it"):
        kept.before(2, ZEROS)


@pytest.mark.parametrize("name", ["topk:0.1", "sign", "lowrank:1"])
def test_with_feedback_the_sum_of_what_is_sent_approaches_that_of_the_updates(name) -> None:
    layout = Layout(("w",), ((8, 5),))
    codec, generator = build_codec((name,), layout), np.random.default_rng(0)
    update = generator.standard_t(3, SIZE).astype(np.float32)
    left, sent, plain = np.zeros(SIZE, dtype=np.float32), np.zeros(SIZE), np.zeros(SIZE)
    rounds = 200
    for _ in range(rounds):
        wanted = update + left
        decoded = codec.decode(codec.encode(wanted, (SIZE,), generator), (SIZE,))
        left, sent = wanted - decoded, sent + decoded
        plain += codec.decode(codec.encode(update, (SIZE,), generator), (SIZE,))
    assert np.allclose(sent + left, rounds * update.astype(np.float64), rtol=1e-3, atol=1e-2)
    with_it = np.linalg.norm(sent / rounds - update)
    without = np.linalg.norm(plain / rounds - update)
    assert with_it < 0.2 * np.linalg.norm(update)
    assert with_it < without / 2


@pytest.mark.parametrize("codec", ['["dither4"]', '["drive"]', '["randk"]', '["identity"]'])
def test_codecs_that_gain_nothing_by_feedback_are_refused(codec: str) -> None:
    plan = parse_plan("", ["updates.error_feedback=true", f"updates.codec={codec}"])
    with pytest.raises(PlanError, match=r"error_feedback=true.*topk, sign or lowrank"):
        check_codecs(plan)


def test_feedback_is_refused_where_updates_are_not_noised_or_only_with_shares() -> None:
    given = ["updates.error_feedback=true", 'updates.codec=["sign"]']
    with pytest.raises(PlanError, match=r"error_feedback=true.*privacy\.unit"):
        parse_plan("", [*given, "privacy.unit=client"])
    with pytest.raises(PlanError, match="not admitted"):
        check_codecs(parse_plan("", given))
    check_codecs(parse_plan("", [*given, "privacy.trust=local"]))
    check_codecs(parse_plan('privacy = "off"', given))


SMALL = [
    "task.name=digits",
    "task.clients=4",
    "task.public_examples=100",
    "teacher.epochs=1",
    "student.epochs=1",
    "federation.clients_per_round=4",
    "federation.rounds=3",
    "engine.workers=1",
    "privacy.trust=local",
    "privacy.noise_multiplier=1.0",
    'updates.codec=["topk:0.05", "ans"]',
]


def final_model(folder: Path, *overrides: str) -> bytes:
    run = simulate(parse_plan("", [*SMALL, *overrides]), folder)
    return b"".join(p.read_bytes() for p in sorted(run.checkpoints.glob("*.safetensors")))


def test_a_simulation_with_feedback_repeats_exactly_and_differs_from_one_without(
    tmp_path: Path,
) -> None:
    fed = "updates.error_feedback=true"
    first = final_model(tmp_path / "a", fed)
    assert final_model(tmp_path / "b", fed) == first
    assert final_model(tmp_path / "d") != first
    assert len(list((tmp_path / "a").rglob("residuals/*/*.safetensors"))) == 4 * 2
    assert not list((tmp_path / "d").rglob("residuals"))
