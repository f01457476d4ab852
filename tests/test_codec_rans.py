"""The coder in plain Python against the one in Rust: the same words and the same indices."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reticent.compression.codec import build_codec, coder, rans
from reticent.compression.codec.entropy import ANS
from reticent.compression.codec.histogram import measure, read, write
from reticent.core.errors import PayloadError

RUST = coder.constriction_coder()
GOLDEN = (
    "e8f0ffffff3b117223afb02ff914953ec3e6dc9cb93aa36c51bb4469d36f688162075f31e8aca1be3f40"
    "0496664fc136cbaee2079a61d59f0c"
)
needs_rust = pytest.mark.skipif(RUST is None, reason="constriction has no wheel here")
BLOCKED = "import sys; sys.modules['constriction'] = None; "

alphabets = st.sampled_from([2, 3, 4, 8, 15, 16, 64, 128, 255, 256])
counts = st.lists(st.integers(0, 2**20), min_size=2, max_size=256)


def probabilities_of(codes: bytes) -> np.ndarray:
    """Return what a histogram with these frequency bytes says: every model that a payload can."""
    bitmap = np.packbits(np.arange(256) < len(codes)).tobytes()
    return read(bitmap + codes, 256)[1]


@needs_rust
@given(st.binary(min_size=2, max_size=256), st.integers(0, 2**32), st.integers(0, 300))
@settings(max_examples=300, deadline=None)
def test_every_model_of_a_payload_gives_the_same_words(codes, seed, count) -> None:
    probabilities = probabilities_of(codes)
    indices = np.random.default_rng(seed).integers(0, len(codes), count).astype(np.int32)
    words = RUST.push(indices, probabilities)
    assert rans.push(indices, probabilities).tolist() == words.tolist()
    for one in (RUST, coder.PYTHON):
        got, used_up = one.pop(words, count, probabilities)
        assert used_up
        assert got.dtype == np.int32
        assert np.array_equal(got, indices)


@needs_rust
@pytest.mark.parametrize(
    "codes",
    [
        bytes([0, 255]),
        bytes([255, 0]),
        bytes([0] * 255 + [255]),
        bytes([255] + [0] * 255),
        bytes([255] * 256),
        bytes(range(256)),
        bytes([31, 240] * 128),
    ],
)
def test_the_shares_of_uneven_models_are_the_same(codes) -> None:
    """Each index alone behind a long run of the likeliest: a share off by one changes the words."""
    probabilities = probabilities_of(codes)
    likeliest = int(np.argmax(probabilities))
    for index in range(len(codes)):
        indices = np.full(60, likeliest, dtype=np.int32)
        indices[[0, 30]] = index
        assert rans.push(indices, probabilities).tolist() == (
            RUST.push(indices, probabilities).tolist()
        )


@needs_rust
@given(
    st.binary(min_size=2, max_size=256),
    st.lists(st.integers(0, 2**32 - 1), min_size=0, max_size=40),
    st.integers(1, 2**32 - 1),
    st.integers(1, 400),
)
@settings(max_examples=300, deadline=None)
def test_hostile_words_give_the_same_indices(codes, words, last, count) -> None:
    probabilities = probabilities_of(codes)
    hostile = np.array([*words, last], dtype=np.uint32)
    expected, expected_end = RUST.pop(hostile, count, probabilities)
    got, used_up = rans.pop(hostile, count, probabilities)
    assert np.array_equal(got, expected)
    assert used_up == expected_end


@needs_rust
@given(st.binary(max_size=200), st.integers(1, 300), alphabets)
@settings(max_examples=300, deadline=None)
def test_hostile_bytes_are_refused_for_the_same_reason(data, count, alphabet) -> None:
    assert outcome(RUST, data, count, alphabet) == outcome(coder.PYTHON, data, count, alphabet)


@needs_rust
@given(st.binary(min_size=1, max_size=400), st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_payload_has_the_same_outcome(raw, data) -> None:
    symbols = np.frombuffer(raw, dtype=np.uint8) % 16
    payload = bytearray(ANS.encode(symbols, 16))
    position = data.draw(st.integers(0, len(payload) - 1))
    payload[position] ^= data.draw(st.integers(1, 255))
    cut = bytes(payload[: data.draw(st.integers(0, len(payload)))])
    for hostile in (bytes(payload), cut):
        assert outcome(RUST, hostile, len(symbols), 16) == (
            outcome(coder.PYTHON, hostile, len(symbols), 16)
        )


def outcome(one, data: bytes, count: int, alphabet: int) -> list[int] | str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coder, "CODER", one)
        try:
            return ANS.decode(data, count, alphabet).tolist()
        except PayloadError as error:
            return str(error)


@pytest.mark.parametrize("name", ["int2", "int4", "int8", "dither3", "dither8", "sign", "identity"])
def test_a_codec_sends_the_same_payload_with_either(name, monkeypatch) -> None:
    vector = np.random.default_rng(3).standard_t(2, size=5000).astype(np.float32)
    payloads = []
    for one in (RUST or coder.PYTHON, coder.PYTHON):
        monkeypatch.setattr(coder, "CODER", one)
        codec = build_codec((name, "ans"))
        payloads.append(codec.encode(vector, (5000,), np.random.default_rng(4), 0.01))
        decoded = codec.decode(payloads[-1], (5000,))
        assert np.isfinite(decoded).all()
    assert payloads[0] == payloads[1]


@given(counts)
def test_shares_cover_the_range_and_none_is_empty(given_counts) -> None:
    table = np.array(given_counts, dtype=np.int64) + 1
    padded = np.zeros(256, dtype=np.int64)
    padded[: len(table)] = table
    begun = rans.starts(read(write(padded), 256)[1])
    assert begun[0] == 0
    assert len(begun) == len(table)
    assert (np.diff([*begun, 1 << 24]) >= 1).all()


@given(st.binary(min_size=2, max_size=256), st.binary(min_size=1, max_size=300))
@settings(max_examples=100, deadline=None)
def test_what_python_pushes_it_pops(codes, raw) -> None:
    probabilities = probabilities_of(codes)
    indices = (np.frombuffer(raw, dtype=np.uint8) % len(codes)).astype(np.int32)
    got, used_up = rans.pop(rans.push(indices, probabilities), len(indices), probabilities)
    assert used_up
    assert np.array_equal(got, indices)


def test_words_are_what_they_were(monkeypatch) -> None:
    """Bytes written once by constriction 0.5.0, so that machines without it are held to them."""
    symbols = (np.arange(200) ** 2 % 7).astype(np.uint8)
    assert measure(symbols, 8).tolist() == [29, 57, 57, 0, 57, 0, 0, 0]
    monkeypatch.setattr(coder, "CODER", coder.PYTHON)
    assert ANS.encode(symbols, 8).hex() == GOLDEN
    assert np.array_equal(ANS.decode(bytes.fromhex(GOLDEN), 200, 8), symbols)


def test_without_constriction_the_codecs_use_python() -> None:
    check = "from reticent.compression.codec import coder; print(coder.CODER.name)"
    command = [sys.executable, "-c", BLOCKED + check]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "python\n"
