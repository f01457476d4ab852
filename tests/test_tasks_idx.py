"""IDX: what is written is read back, and hostile bytes end in a DataError and nothing else."""

from __future__ import annotations

import gzip
import hashlib
import os
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from reticent.core.errors import DataError
from reticent.core.tasks.idx import encode_idx, gzip_bytes, parse_idx, read_idx

KINDS = ["u1", "i1", "i2", "i4", "f4", "f8"]
ARRAYS = st.sampled_from(KINDS).flatmap(
    lambda kind: hnp.arrays(kind, hnp.array_shapes(max_dims=4, max_side=5))
)
SAMPLE = encode_idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))


@given(ARRAYS, st.booleans())
@settings(deadline=None)
def test_round_trip(array: np.ndarray, zipped: bool) -> None:
    data = encode_idx(array)
    back = parse_idx(gzip_bytes(data) if zipped else data)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()  # bit for bit, NaN too
    assert not back.flags.writeable


def test_known_bytes() -> None:
    data = bytes.fromhex("00000b02 00000001 00000002 0102 fffe".replace(" ", ""))
    assert parse_idx(data).tolist() == [[258, -2]]


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_random_bytes_are_refused_or_read_exactly(data: bytes) -> None:
    try:
        array = parse_idx(data)
    except DataError:
        return
    assert encode_idx(array) == data


@given(where=st.integers(0, len(gzip_bytes(SAMPLE)) - 1), flip=st.integers(1, 255))
@settings(deadline=None)
def test_damaged_gzip_never_gives_other_content(where: int, flip: int) -> None:
    zipped = bytearray(gzip_bytes(SAMPLE))
    zipped[where] ^= flip
    # Some bits of gzip mean nothing (time, system, padding of the last block): those may pass.
    try:
        array = parse_idx(bytes(zipped))
    except DataError:
        return
    assert encode_idx(array) == SAMPLE


@pytest.mark.parametrize("where", [2, 30, -8, -1])
def test_damaged_method_data_checksum_and_length_are_refused(where: int) -> None:
    zipped = bytearray(gzip_bytes(SAMPLE))
    zipped[where] ^= 1
    with pytest.raises(DataError, match="damaged gzip data"):
        parse_idx(bytes(zipped))


@pytest.mark.parametrize("zipped", [False, True])
@given(cut=st.integers(0, len(SAMPLE) - 1))
@settings(deadline=None)
def test_every_truncation_is_refused(zipped: bool, cut: int) -> None:
    part = SAMPLE[:cut]
    with pytest.raises(DataError, match="ends after"):
        parse_idx(gzip_bytes(part) if zipped else part)


@given(cut=st.integers(2, len(gzip_bytes(SAMPLE)) - 1))
@settings(deadline=None)
def test_every_truncated_gzip_is_refused(cut: int) -> None:
    with pytest.raises(DataError):
        parse_idx(gzip_bytes(SAMPLE)[:cut])


@pytest.mark.parametrize(
    "data",
    [
        SAMPLE + b"x",
        gzip_bytes(SAMPLE + b"x"),
        gzip_bytes(SAMPLE) + b"x",
        gzip_bytes(SAMPLE) + gzip_bytes(SAMPLE),
    ],
)
def test_trailing_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="more bytes than its header"):
        parse_idx(data)


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        ("00010801 00000001", "starts with 0001"),
        ("00000701 00000001", "element type 07"),
        ("00000800", "has 0 dimensions"),
        ("00000809", "has 9 dimensions"),
        ("00000802 00000000 ffffffff", "at least 1"),
        ("00000802 ffffffff ffffffff", "at most 268435456"),
        ("00000e08" + "ffffffff" * 8, "at most 268435456"),
    ],
)
def test_bad_headers_name_file_and_reason(head: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        parse_idx(bytes.fromhex(head.replace(" ", "")), "some.idx")
    assert str(caught.value).startswith("some.idx: ")


def _bomb(megabytes: int, header: bytes) -> bytes:
    press = zlib.compressobj(9, wbits=31)
    zeros = bytes(2**20)
    parts = [press.compress(header), *(press.compress(zeros) for _ in range(megabytes))]
    return b"".join([*parts, press.flush()])


@pytest.mark.parametrize(
    "header",
    [
        bytes.fromhex("00000801 04000000"),  # honest about 64 MiB, which is over the limit
        bytes.fromhex("00000801 00000010"),  # announces 16 bytes and holds 64 MiB
    ],
)
def test_a_gzip_bomb_is_refused_without_inflating_it(header: bytes) -> None:
    bomb = _bomb(64, header)
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            parse_idx(bomb, max_bytes=2**20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * 2**20


def test_the_sum_is_of_the_content_with_or_without_gzip(tmp_path: Path) -> None:
    expected = hashlib.sha256(SAMPLE).hexdigest()
    for name, data in (("plain", SAMPLE), ("zipped.gz", gzip.compress(SAMPLE, 1))):
        (tmp_path / name).write_bytes(data)
        assert read_idx(tmp_path / name, sha256=expected).shape == (2, 3, 4)


@given(st.integers(0, len(SAMPLE) - 1), st.integers(1, 255))
@settings(deadline=None)
def test_any_changed_byte_is_found_by_the_sum(where: int, flip: int) -> None:
    data = bytearray(SAMPLE)
    data[where] ^= flip
    with pytest.raises(DataError):
        parse_idx(bytes(data), sha256=hashlib.sha256(SAMPLE).hexdigest())


def test_a_wrong_sum_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.idx"
    path.write_bytes(SAMPLE)
    with pytest.raises(DataError, match=r"a\.idx: SHA-256 of the content is .* must be 00"):
        read_idx(path, sha256="00" * 32)


def test_an_absent_and_a_large_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(tmp_path / "none")
    (tmp_path / "large").write_bytes(bytes(101))
    with pytest.raises(DataError, match="has 101 bytes: at most 100 allowed"):
        read_idx(tmp_path / "large", max_bytes=100)


def test_pipes_and_devices_are_refused_unread(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(DataError, match=r"must be a plain file|Is a directory"):
            read_idx(path)


@pytest.mark.parametrize("array", [np.zeros(2, complex), np.zeros(0, "u1"), np.zeros((), "u1")])
def test_what_idx_cannot_hold_is_not_written(array: np.ndarray) -> None:
    with pytest.raises(DataError, match="IDX cannot hold"):
        encode_idx(array)


def test_gzip_bytes_hold_no_time_and_no_name() -> None:
    data = gzip_bytes(SAMPLE)
    assert data[3] == 0
    assert data[4:8] == bytes(4)
    assert gzip.decompress(data) == SAMPLE
