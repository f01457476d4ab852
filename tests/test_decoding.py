"""Inputs that once ended in an untyped error, or in memory that they did not fill."""

from __future__ import annotations

import hashlib
import io
import json
import random
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from decoders import DECODERS, TOKENS, mutated
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from safetensors.numpy import save

from reticent.compression.backends.frames import framed, unframed
from reticent.core.decoding import parse_json, parse_npy
from reticent.core.errors import ArtifactError, DataError, PlanError, ReticentError, RunError
from reticent.core.plan import parse_plan, plan_from_json
from reticent.core.run import Run
from reticent.core.tasks.har import _read as read_har
from reticent.server.journal import Journal
from reticent.server.optimizer import ServerState

DEEP, LONG = "[" * 100_000, "9" * 5000


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


@given(npst.arrays(st.sampled_from(["<f4", ">i2", "u1", "<f8"]), npst.array_shapes(min_side=0)))
def test_parse_npy_reads_what_numpy_writes(array: np.ndarray) -> None:
    for given_ in (array, np.asfortranarray(array)):
        read = parse_npy(npy(given_))
        assert read.dtype == array.dtype and read.tobytes() == array.tobytes()


@pytest.mark.parametrize(
    "data",
    [
        npy(np.ones(3))[:-1],
        npy(np.ones(3)) + b"\0",
        header("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,)}"),
        header("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}"),
        header("{'descr': '|O', 'fortran_order': False, 'shape': ()}") + bytes(8),
        header("{'descr': '<f8', ("),
        header("(" * 9000),
        b"\x93NUMPY\x09\x00",
        b"",
    ],
)
def test_parse_npy_refuses_what_does_not_fit_without_allocating_it(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"."):
            parse_npy(data)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("text", [DEEP, LONG, "", b"\xff", '{"a":' * 50_000])
def test_parse_json_has_one_kind_of_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


@pytest.mark.parametrize("text", [DEEP, LONG])
def test_a_plan_nested_too_deeply_or_with_too_long_a_number_is_a_plan_error(text: str) -> None:
    for read in (
        lambda: plan_from_json(text),
        lambda: plan_from_json('{"seed": ' + text),
        lambda: parse_plan(f"seed = {text}"),
        lambda: parse_plan("", [f"seed={text}"]),
    ):
        with pytest.raises(PlanError):
            read()


@pytest.mark.parametrize("text", [DEEP, LONG, '{"a": ' + LONG + "}"])
def test_a_damaged_summary_is_a_run_error(text: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.summary.write_text(text)
    with pytest.raises(RunError):
        run.read_summary()


@pytest.mark.parametrize(
    "arrays",
    [
        {"other": np.ones(3)},
        {"weights": np.ones(3), "clip": np.zeros(0)},
    ],
)
def test_a_checkpoint_of_another_kind_is_a_run_error(
    arrays: dict[str, np.ndarray], tmp_path: Path
) -> None:
    run = Run(tmp_path)
    run.checkpoints.mkdir()
    journal = Journal(run)
    journal.commit(ServerState.begin(np.ones(3, dtype=np.float32)), {}, ["1"], None)
    data = save(arrays)
    (run.checkpoints / "round-000000.safetensors").write_bytes(data)
    journal._db.execute("UPDATE rounds SET checkpoint = ?", (hashlib.sha256(data).hexdigest(),))
    with pytest.raises(RunError, match="no state of a round"):
        journal.latest()
    journal._db.execute("UPDATE rounds SET metrics = ?", (DEEP,))
    with pytest.raises(RunError, match="damaged"):
        journal.metrics()
    journal.close()


def test_a_zip_of_another_version_or_encrypted_is_a_data_error(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as parts:
        parts.writestr("signals.npy", npy(np.ones(3)))
    good = out.getvalue()
    central, path = good.index(b"PK\x01\x02"), tmp_path / "har.npz"
    for place, value in [(6, 109), (8, 1), (10, 77)]:  # version needed, encrypted, method
        bad = bytearray(good)
        bad[central + place] = value
        if place > 6:
            bad[place - 2] = value
        path.write_bytes(bytes(bad))
        with pytest.raises(DataError, match="cannot be read"):
            read_har(path)


def test_a_frame_that_holds_much_more_than_its_bytes_is_refused_unpacked() -> None:
    bomb = framed(bytes(64 << 20))
    assert len(bomb) < 10_000
    with pytest.raises(ArtifactError, match="at most"):
        unframed(bomb, "model")
    assert unframed(framed(bytes(1 << 20)), "model") == bytes(1 << 20)


@pytest.mark.parametrize("name", ["report.json", "audit.json", "event", "model.json"])
def test_integers_that_no_float_holds_are_no_crash(name: str) -> None:
    decoder = DECODERS[name]
    data = json.loads(decoder.valid[0])
    refused = set()
    for key in data:
        try:
            decoder.decode(json.dumps({**data, key: 10**400}).encode())
        except ReticentError:
            refused.add(key)
    assert refused >= set(data) - {"canaries", "rounds"}  # counts may be of any size


def test_mutations_reach_every_token_and_are_not_the_inputs_themselves() -> None:
    decoder, draws = DECODERS["plan as JSON"], random.Random(1)
    made = [mutated(decoder, draws) for _ in range(2000)]
    assert all(any(token in data for data in made) for token in TOKENS)
    assert sum(data in decoder.valid for data in made) < 400
