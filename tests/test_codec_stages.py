"""Names in a plan, and the parts that codecs are made of."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reticent.compression.codec import build_codec
from reticent.compression.codec.build import PARAMETERS, QUANTIZERS
from reticent.compression.codec.entropy import ANS, PLAIN, ZSTD
from reticent.compression.codec.escape import pack_escapes, unpack_escapes
from reticent.compression.codec.frame import OVERHEAD
from reticent.compression.codec.histogram import read, write
from reticent.core.errors import PayloadError, PlanError
from reticent.core.plan import Updates


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ((), "must start with one of identity"),
        (("ans",), "must start with"),
        (("ans", "int4"), "must start with"),
        (("int4", "int8"), "at most one of ans, zstd after it"),
        (("int8", "ans", "zstd"), "at most one"),
        (("dithr4", "ans"), "did you mean dither4"),
        (("int8", "zstandard"), "did you mean zstd|known stages"),
        (("gzip",), "known stages"),
        (("int8:3",), "takes no such parameter"),
        (("int8", "ans:1"), "takes no such parameter"),
        (("int1:shared",), "takes no such parameter"),
        (("dither1",), "did you mean"),
        (("int9",), "did you mean"),
        (("hadamard",), "must start with one of identity"),
        (("hadamard", "ans"), "must start with one of identity"),
        (("hadamard", "topk"), "must come before an int or a dither"),
        (("hadamard", "drive"), "must come before an int or a dither"),
        (("int4", "hadamard"), "at most one of ans, zstd after it"),
        (("randk:2",), "randk:2: must be a fraction"),
        (("lowrank:0",), "whole number from 1"),
        (("lowrank:1.5",), "whole number from 1"),
        (("lowrank:99999999",), "whole number from 1"),
        (("topk:",), "fraction above 0"),
        (("topk:0",), "fraction above 0"),
        (("topk:1.5",), "fraction above 0"),
        (("topk:nan",), "fraction above 0"),
        (("topk:x",), "fraction above 0"),
    ],
)
def test_wrong_names_are_refused(names, match) -> None:
    with pytest.raises(PlanError, match=match):
        build_codec(names)


def test_the_plan_defaults_are_codecs() -> None:
    assert build_codec(Updates().codec).error == "independent"
    assert build_codec(Updates().broadcast).unbiased


def test_what_each_codec_says_of_its_error() -> None:
    said = {name: build_codec((name, "ans")).error for name in (*QUANTIZERS, *PARAMETERS)}
    assert {name for name in said if said[name] == "none"} == {"identity"}
    dithers = {f"dither{bits}" for bits in range(2, 9)}
    assert {name for name in said if said[name] == "independent"} == dithers
    assert build_codec(("hadamard", "dither2")).error == "independent"
    assert build_codec(("hadamard", "int2")).error == "dependent"


def test_which_codecs_commute_with_sums_and_which_contract() -> None:
    names = (*QUANTIZERS, *PARAMETERS)
    summing = {f"dither{b}" for b in range(2, 9)} | {f"int{b}:shared" for b in range(2, 9)}
    assert {name for name in names if build_codec((name,)).sums} == summing
    assert not build_codec(("dither4", "ans")).sums
    assert not build_codec(("hadamard", "dither4")).sums
    assert {n for n in names if build_codec((n,)).contracts} == {"topk", "sign", "lowrank"}


def test_codecs_are_frozen_and_their_codes_are_unique() -> None:
    codec = build_codec(("int8",))
    with pytest.raises(dataclasses.FrozenInstanceError):
        codec.names = ("int4",)  # pyright: ignore[reportAttributeAccessIssue]
    # A header's flags tell the two kinds of scales of one number apart.
    stems = {name.partition(":")[0] for name in (*QUANTIZERS, *PARAMETERS)}
    codes = {build_codec((name,)).quantizer.code for name in (*QUANTIZERS, *PARAMETERS)}
    assert len(codes) == len(stems)
    assert all(0 <= code < 64 for code in codes)


WRITTEN_BEFORE = [
    (("int8",), None, "52430101000500000008000000a1e70dab0502013c0502813cbf009e7ffe"),
    (
        ("int4", "zstd"),
        None,
        "52430122000500000008000000727e72702549123e2549923e28b52ffd20052900000b0008070e",
    ),
    (("topk:0.4",), None, "52430103000500000000000000d0c0fe870102000080bf00000040"),
    (
        ("dither8", "ans"),
        None,
        "524301140105000000180000009119b3ec5f82c2d9cfeb0fa321d7d982f8bd1045080402814020903f"
        "0000000000000000800000000000000100020001000000000000000000000002ffffffffff1d9a9917"
        "02000000",
    ),
    (
        ("dither4",),
        0.5,
        "52430105000500000018000000f5132a215f82c2d9cfeb0fa321d7d982f8bd1045000000000000e03f58770b",
    ),
]


@pytest.mark.parametrize(("names", "step", "written"), WRITTEN_BEFORE)
def test_payloads_of_earlier_versions_are_read_and_still_written(names, step, written) -> None:
    vector = np.array([0.5, -1.0, 0.25, 0, 2.0], dtype=np.float32)
    codec = build_codec(names)
    payload = bytes.fromhex(written)
    assert codec.encode(vector, (3, 2), np.random.default_rng(0), step) == payload
    assert np.abs(codec.decode(payload, (3, 2)) - vector).max() <= (1.0 if step is None else 0.25)


def test_topk_keeps_the_largest_values_exactly() -> None:
    vector = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    codec = build_codec(("topk:0.002", "ans"))
    decoded = codec.decode(codec.encode(vector, (5000,), np.random.default_rng(0)), (5000,))
    kept = np.argsort(-np.abs(vector))[:10]
    assert np.array_equal(np.flatnonzero(decoded), np.sort(kept))
    assert np.array_equal(decoded[kept], vector[kept])


@pytest.mark.parametrize(
    ("name", "expected"),
    [("identity", 4000), ("int8", 1008), ("int4", 508), ("dither8", 1024), ("dither4", 524)],
)
def test_payload_lengths_without_an_entropy_stage(name, expected) -> None:
    vector = np.random.default_rng(0).uniform(-1, 1, 1000).astype(np.float32)
    payload = build_codec((name,)).encode(vector, (600, 400), np.random.default_rng(0), 0.2)
    assert len(payload) == OVERHEAD + expected
    assert OVERHEAD <= 24


@pytest.mark.parametrize(("name", "excess"), [("ans", 0.02), ("zstd", 0.5)])
def test_entropy_stages_come_close_to_the_entropy(name, excess) -> None:
    n, step = 50000, 0.5
    vector = np.random.default_rng(0).normal(size=n).astype(np.float32)
    bits = (
        8
        * len(build_codec(("dither4", name)).encode(vector, (n,), np.random.default_rng(1), step))
        / n
    )
    symbols = np.rint(vector / step + np.random.default_rng(2).uniform(-0.5, 0.5, n))
    p = np.unique(symbols, return_counts=True)[1] / n
    entropy = float(-(p * np.log2(p)).sum())
    assert entropy - 0.02 < bits < entropy + excess


entropies = pytest.mark.parametrize("stage", [PLAIN, ANS, ZSTD], ids=["plain", "ans", "zstd"])


@entropies
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_entropy_stages_are_lossless(stage, data) -> None:
    alphabet = data.draw(st.sampled_from([16, 256]))
    top = data.draw(st.integers(0, alphabet - 1))
    values = data.draw(st.lists(st.integers(0, top), min_size=1, max_size=300))
    symbols = np.array(values, dtype=np.uint8)
    decoded = stage.decode(stage.encode(symbols, alphabet), len(symbols), alphabet)
    assert decoded.dtype == np.uint8
    assert np.array_equal(decoded, symbols)


@entropies
@pytest.mark.parametrize("n", [1, 1023, 1024, 1025, 131_073, 2_500_000])
def test_entropy_stages_are_lossless_at_all_sizes(stage, n) -> None:
    symbols = np.random.default_rng(n).binomial(15, 0.4, n).astype(np.uint8)
    decoded = stage.decode(stage.encode(symbols, 16), n, 16)
    assert np.array_equal(decoded, symbols)


def test_the_most_skewed_histogram_still_codes() -> None:
    symbols = np.zeros(300_000, dtype=np.uint8)
    symbols[::30_000] = np.arange(10)
    data = ANS.encode(symbols, 256)
    assert np.array_equal(ANS.decode(data, len(symbols), 256), symbols)
    assert len(data) < 500


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 10**9), min_size=16, max_size=16).filter(any))
def test_histograms_are_close_and_bounded(values) -> None:
    counts = np.array(values, dtype=np.int64)
    data = write(counts)
    present, probabilities, used = read(data, 16)
    assert used == len(data) <= 18
    assert np.array_equal(present, np.flatnonzero(counts))
    exact = counts[counts > 0] / counts.sum()
    common = exact > exact.max() / 2**15
    assert np.allclose(probabilities[common], exact[common], rtol=0.07, atol=0)
    assert probabilities.min() > 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1) | st.integers(250, 260), max_size=50))
def test_escapes_are_exact(values) -> None:
    data = pack_escapes(np.array(values, dtype=np.int64))
    assert unpack_escapes(data, len(values)).tolist() == values
    with pytest.raises(PayloadError, match="escaped"):
        unpack_escapes(data + b"\0", len(values))
