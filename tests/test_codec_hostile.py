"""Hostile payloads: whatever the bytes, a vector or PayloadError, and no large allocation."""

from __future__ import annotations

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reticent.compression.codec import Codec, build_codec
from reticent.compression.codec.build import QUANTIZERS as PLAIN_NAMES
from reticent.compression.codec.frame import OVERHEAD, Frame, seal, unseal
from reticent.core.errors import PayloadError
from reticent.core.update import Layout

QUANTIZERS = (*PLAIN_NAMES, "topk", "randk:0.3", "lowrank:1")
CODED = (
    "identity",
    "int8",
    "int4",
    "int2:shared",
    "dither8",
    "dither4",
    "sign",
    "topk",
    "randk:0.3",
)
CHAINS = [
    *((q,) for q in QUANTIZERS),
    *((q, e) for q in CODED for e in ("ans", "zstd")),
    *(("hadamard", q, "ans") for q in ("int1", "dither3", "dither2:blocks")),
]
BLOCKS = (30, 0, 27)
LAYOUT = Layout(("a", "b", "c"), ((6, 5), (0,), (9, 3)))
CODECS = [build_codec(names, LAYOUT) for names in CHAINS]
every_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda c: "+".join(c.names))


def valid(codec: Codec, seed: int = 0) -> bytes:
    generator = np.random.default_rng(seed)
    vector = generator.standard_t(2, size=57).astype(np.float32)
    return codec.encode(vector, BLOCKS, generator, 0.25)


VALID = {codec.names: [valid(codec, seed) for seed in range(3)] for codec in CODECS}


def decodes_or_refuses(codec: Codec, payload: bytes) -> None:
    try:
        vector = codec.decode(payload, BLOCKS)
    except PayloadError:
        return
    assert vector.shape == (57,)
    assert vector.dtype == np.float32
    assert np.isfinite(vector).all()


def with_crc(payload: bytes) -> bytes:
    head, rest = payload[: OVERHEAD - 4], payload[OVERHEAD:]
    return head + struct.pack("<I", zlib.crc32(rest, zlib.crc32(head))) + rest


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(CODECS), st.binary(max_size=400))
def test_random_bytes(codec, data) -> None:
    with pytest.raises(PayloadError):
        codec.decode(data, BLOCKS)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(CODECS), st.integers(0, 3), st.binary(max_size=80), st.binary(max_size=300))
def test_random_contents_in_a_well_formed_frame(codec, flags, side, body) -> None:
    stages = unseal(VALID[codec.names][0]).stages
    decodes_or_refuses(codec, seal(Frame(stages, flags, 57, side, body)))


@settings(max_examples=800, deadline=None)
@given(
    st.sampled_from(CODECS),
    st.integers(0, 2),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4),
)
def test_flipped_bits_below_a_correct_crc(codec, which, flips) -> None:
    payload = bytearray(VALID[codec.names][which])
    for place, mask in flips:
        payload[place % len(payload)] ^= mask
    decodes_or_refuses(codec, with_crc(bytes(payload)))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(CODECS), st.binary(min_size=24, max_size=24), st.binary(min_size=40))
@example(CODECS[-2], bytes(24), bytes(40))
def test_replaced_side_or_body(codec, side, body) -> None:
    frame = unseal(VALID[codec.names][0])
    decodes_or_refuses(codec, seal(Frame(frame.stages, frame.flags, 57, side, frame.body)))
    decodes_or_refuses(codec, seal(Frame(frame.stages, frame.flags, 57, frame.side, body)))


@every_codec
def test_every_truncation_and_extension_is_refused(codec) -> None:
    payload = VALID[codec.names][0]
    for changed in [payload[:end] for end in range(len(payload))] + [payload + b"\0"]:
        with pytest.raises(PayloadError):
            codec.decode(changed, BLOCKS)
        if len(changed) >= OVERHEAD:
            with pytest.raises(PayloadError):
                codec.decode(with_crc(changed), BLOCKS)


@every_codec
def test_every_single_flipped_bit_is_refused_by_the_crc(codec) -> None:
    payload = VALID[codec.names][1]
    for place in range(len(payload)):
        changed = bytearray(payload)
        changed[place] ^= 1 << (place % 8)
        with pytest.raises(PayloadError):
            codec.decode(bytes(changed), BLOCKS)


@every_codec
def test_a_huge_payload_is_refused_before_it_is_read(codec) -> None:
    with pytest.raises(PayloadError, match="at most"):
        codec.decode(bytes(10_000), BLOCKS)
    with pytest.raises(PayloadError, match="payload is list"):
        codec.decode([1, 2], BLOCKS)  # pyright: ignore[reportArgumentType]


def reseal(codec: Codec, **changes) -> bytes:
    frame = unseal(VALID[codec.names][0])
    return seal(Frame(**{**vars(frame), **changes}))


def bomb(size: int) -> bytes:
    return zstandard.ZstdCompressor(level=3).compress(bytes(size))


def unsized_bomb(size: int) -> bytes:
    writer = zstandard.ZstdCompressor(level=3, write_content_size=False)
    return writer.compress(bytes(size))


@pytest.mark.parametrize("body", [bomb(10**7), unsized_bomb(10**6), bomb(57) * 2, b""])
def test_zstd_bombs_are_refused_without_being_unpacked(body) -> None:
    codec = build_codec(("int8", "zstd"))
    payload = reseal(codec, body=body)
    tracemalloc.start()
    try:
        with pytest.raises(PayloadError):
            codec.decode(payload, BLOCKS)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200_000


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, -1.0, 3e38])
def test_scales_that_cannot_be_are_refused(scale) -> None:
    codec = build_codec(("int4",))
    side = np.full(3, scale, "<f4").tobytes()
    with pytest.raises(PayloadError):
        codec.decode(reseal(codec, side=side), BLOCKS)


def test_signalling_nan_scales_are_refused_without_a_warning() -> None:
    codec = build_codec(("int8",))
    with pytest.raises(PayloadError, match="not finite"):
        codec.decode(reseal(codec, side=b"\x01\x00\xa0\x7f" * 3), BLOCKS)


@pytest.mark.parametrize("step", [np.nan, np.inf, 0.0, -1.0, 1e300])
def test_steps_that_cannot_be_are_refused(step) -> None:
    codec = build_codec(("dither4",))
    side = unseal(VALID[codec.names][0]).side
    with pytest.raises(PayloadError, match="step="):
        codec.decode(reseal(codec, side=side[:16] + struct.pack("<d", step) + side[24:]), BLOCKS)


def test_escaped_values_cannot_overflow_float32() -> None:
    codec = build_codec(("dither4",))
    side = bytes(16) + struct.pack("<d", 2.0**127) + b"\xff" * (57 * 5)
    with pytest.raises(PayloadError, match="outside float32"):
        codec.decode(reseal(codec, side=side, body=b"\xff" * 28 + b"\x0f"), BLOCKS)


@pytest.mark.parametrize(
    ("names", "body", "match"),
    [
        (("int4",), b"\xff" * 28 + b"\x0f", "symbol 15"),
        (("int4",), b"\x77" * 29, "padding"),
        (("int8",), b"\xff" * 57, "symbol 255"),
        (("identity",), b"\xff" * 228, "finite"),
        (("int4", "zstd"), zstandard.compress(b"\x10" * 57), "below 16"),
        (("int4", "ans"), b"\0\0", "names 0 symbols"),
        (("int4", "ans"), b"\x80\0\x05" + b"\x01\0\0\0", "one repeated symbol"),
        (("int4", "ans"), b"\xc0\0\x05\x05" + b"\x01\0\0", "incomplete"),
        (("int4", "ans"), b"\xc0\0\x05\x05" + b"\x01\0\0\0\0\0\0\0", "must not be 0"),
        (("int4", "ans"), b"\xc0\0\x05\x05" + b"\x01\0\0\0" * 9, "more than 57"),
    ],
)
def test_bodies_that_cannot_be_are_refused(names, body, match) -> None:
    codec = build_codec(names)
    with pytest.raises(PayloadError, match=match):
        codec.decode(reseal(codec, body=body), BLOCKS)


def test_topk_positions_beyond_the_end_are_refused() -> None:
    codec = build_codec(("topk",))
    with pytest.raises(PayloadError, match="must be below 57"):
        codec.decode(reseal(codec, side=b"", body=b"\x40" + bytes(29)), BLOCKS)


@every_codec
def test_memory_of_decoding_random_contents_stays_proportional(codec) -> None:
    payloads = [reseal(codec, body=np.random.default_rng(i).bytes(300)) for i in range(20)]
    tracemalloc.start()
    try:
        for payload in payloads:
            decodes_or_refuses(codec, payload)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200_000
