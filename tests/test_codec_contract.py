"""What every codec promises: one suite over all quantizers and entropy stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from reticent.compression.codec import Codec, build_codec
from reticent.compression.codec.base import Blocks, Coded
from reticent.compression.codec.entropy import PLAIN
from reticent.compression.codec.rounding import StochasticInt
from reticent.core.errors import PayloadError
from reticent.core.update import Vector

QUANTIZERS = ("identity", "int8", "int4", "topk", "topk:0.5", "dither8", "dither4")
CHAINS = [(q, *e) for q in QUANTIZERS for e in ((), ("ans",), ("zstd",))]
BLOCKS = (700, 0, 1, 299)
STEP = 0.25
Wide = NDArray[np.float64]

every_chain = pytest.mark.parametrize("names", CHAINS, ids="+".join)
every_quantizer = pytest.mark.parametrize("name", QUANTIZERS)


def gaussian(n: int = 1000, seed: int = 0) -> Vector:
    return np.random.default_rng(seed).normal(size=n).astype(np.float32)


def rng(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


def round_trip(codec: Codec, vector: Vector, blocks: Blocks, step: float | None = None) -> Vector:
    return codec.decode(codec.encode(vector, blocks, rng(), step), blocks)


def bound(name: str, vector: Vector, blocks: Blocks, step: float | None) -> Wide:
    """Largest error that the definition of the quantizer allows, per coordinate, float64."""
    size = np.abs(vector).astype(np.float64)
    if name == "identity" or not len(vector):
        return np.zeros(len(vector))
    if name.startswith("topk"):
        k = int(np.ceil((0.5 if ":" in name else 0.1) * len(vector)))
        smallest_kept = np.sort(size)[-k]
        return np.where(size > smallest_kept, 0.0, size)
    levels = 127 if name.endswith("8") else 7
    if name.startswith("dither"):
        return np.full(len(size), (size.max() / levels if step is None else step) / 2)
    peaks = [p.max() if len(p) else 0.0 for p in np.split(size, np.cumsum(blocks)[:-1])]
    return np.repeat(np.array(peaks) / levels, blocks)


def check_error(name: str, vector: Vector, blocks: Blocks, decoded: Vector, step: float | None):
    allowed = bound(name, vector, blocks, step)
    slack = 1e-6 * np.abs(vector).astype(np.float64) + 1e-6 * allowed + 1e-44
    assert (np.abs(decoded.astype(np.float64) - vector) <= allowed + slack).all()


@every_chain
@pytest.mark.parametrize("step", [None, STEP])
def test_round_trip_keeps_shape_and_bounds_the_error(names, step) -> None:
    vector = gaussian()
    decoded = round_trip(build_codec(names), vector, BLOCKS, step)
    assert decoded.dtype == np.float32
    assert decoded.shape == vector.shape
    assert decoded.flags.writeable
    assert decoded.flags.c_contiguous
    check_error(names[0], vector, BLOCKS, decoded, step)


@every_chain
def test_equal_generators_give_equal_bytes_and_the_input_is_not_changed(names) -> None:
    codec, vector = build_codec(names), gaussian()
    payloads = [codec.encode(vector, BLOCKS, rng(seed), STEP) for seed in (1, 1, 2)]
    assert payloads[0] == payloads[1]
    assert (payloads[0] == payloads[2]) == (codec.error == "none" or names[0].startswith("topk"))
    assert np.array_equal(vector, gaussian())
    assert np.array_equal(codec.decode(payloads[0], BLOCKS), codec.decode(payloads[1], BLOCKS))


@every_quantizer
@pytest.mark.parametrize("entropy", ["ans", "zstd"])
def test_an_entropy_stage_changes_no_value(name, entropy) -> None:
    vector = gaussian()
    plain = round_trip(build_codec((name,)), vector, BLOCKS, STEP)
    assert np.array_equal(plain, round_trip(build_codec((name, entropy)), vector, BLOCKS, STEP))


@every_chain
@pytest.mark.parametrize("blocks", [(), (0, 0), (1,), (0, 1), (2,), (3, 4), (255,), (256, 1)])
def test_small_vectors(names, blocks) -> None:
    vector = gaussian(sum(blocks))
    decoded = round_trip(build_codec(names), vector, blocks)
    assert decoded.dtype == np.float32
    assert decoded.shape == vector.shape
    check_error(names[0], vector, blocks, decoded, None)


@every_chain
def test_zero_is_exactly_zero_without_a_public_step(names) -> None:
    assert not round_trip(build_codec(names), np.zeros(1000, np.float32), BLOCKS).any()


@every_chain
def test_huge_dynamic_range(names) -> None:
    exponents = np.linspace(-149, 126.9, 1000)
    vector = (2.0**exponents * np.where(np.arange(1000) % 3, 1, -1)).astype(np.float32)
    decoded = round_trip(build_codec(names), vector, BLOCKS)
    check_error(names[0], vector, BLOCKS, decoded, None)


@every_chain
def test_a_strided_vector_is_read_in_order(names) -> None:
    vector = gaussian(1000)[::-1]
    copy = np.ascontiguousarray(vector)
    codec = build_codec(names)
    assert np.array_equal(round_trip(codec, vector, BLOCKS), round_trip(codec, copy, BLOCKS))


def mean_error_in_bounds(codec: Codec, vector: Vector, blocks: Blocks, widest: Wide) -> bool:
    """Whether the mean of 600 decodings is within 6 standard errors of ``vector`` everywhere.

    An error confined to an interval of length ``widest`` has a deviation of at most half of it.
    """
    generator, draws = rng(3), 600
    total = np.zeros(len(vector))
    for _ in range(draws):
        total += codec.decode(codec.encode(vector, blocks, generator), blocks)
    allowed = 6 * widest / 2 / np.sqrt(draws) + 1e-6
    return bool((np.abs(total / draws - vector) <= allowed).all())


def widest_error(name: str, vector: Vector, blocks: Blocks) -> Wide:
    width = bound(name, vector, blocks, None)
    return 2 * width if name.startswith("dither") else width


@dataclass(frozen=True)
class TowardZero(StochasticInt):
    """Deterministic rounding toward zero: a wrong codec that the check must refuse."""

    def encode(self, vector, blocks, generator, step) -> Coded:
        coded = super().encode(vector, blocks, generator, step)
        scales = np.repeat(np.frombuffer(coded.side, "<f4"), blocks).astype(np.float64)
        symbols = np.trunc(vector / scales) + self.levels
        return Coded(symbols.astype(np.uint8), coded.side)


@every_quantizer
def test_unbiased_is_true_of_exactly_those_that_say_so(name) -> None:
    blocks, codec = (40, 24), build_codec((name,))
    vector = gaussian(64)
    widest = bound("int4", vector, blocks, None) if name.startswith("topk") else None
    widest = widest_error(name, vector, blocks) if widest is None else widest
    assert mean_error_in_bounds(codec, vector, blocks, widest) == codec.unbiased


@pytest.mark.parametrize(("levels", "alphabet"), [(7, 16), (127, 256)])
def test_the_unbiasedness_check_refuses_rounding_toward_zero(levels, alphabet) -> None:
    blocks, vector = (40, 24), gaussian(64)
    wrong = Codec(("toward-zero",), TowardZero(levels, 9, alphabet), PLAIN)
    name = "int4" if levels == 7 else "int8"
    assert not mean_error_in_bounds(wrong, vector, blocks, bound(name, vector, blocks, None))


@every_chain
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(names, bad) -> None:
    vector = gaussian()
    vector[500] = bad
    with pytest.raises(PayloadError, match="finite"):
        build_codec(names).encode(vector, BLOCKS, rng())


@every_chain
def test_wrong_dtype_shape_or_blocks_are_refused(names) -> None:
    codec, vector = build_codec(names), gaussian()
    wrong: Any
    for wrong in (vector.astype(np.float64), vector[:-1], vector.reshape(10, 100)):
        with pytest.raises(PayloadError, match="must be float32"):
            codec.encode(wrong, BLOCKS, rng())
    with pytest.raises(PayloadError, match="at least 0"):
        codec.encode(vector, (1001, -1), rng())


@every_chain
def test_a_payload_of_other_stages_or_another_length_is_refused(names) -> None:
    payload = build_codec(names).encode(gaussian(), BLOCKS, rng())
    other = build_codec(("int8",) if names[0] != "int8" else ("identity",))
    with pytest.raises(PayloadError, match="must hold 1000"):
        other.decode(payload, (1000,) * 1)
    with pytest.raises(PayloadError, match="must hold 1001"):
        build_codec(names).decode(payload, (*BLOCKS, 1))
