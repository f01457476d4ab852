"""What every codec promises: one suite over all quantizers and entropy stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from reticent.compression.codec import Codec, build_codec
from reticent.compression.codec.base import Blocks, Coded
from reticent.compression.codec.build import PARAMETERS
from reticent.compression.codec.build import QUANTIZERS as PLAIN_NAMES
from reticent.compression.codec.entropy import PLAIN
from reticent.compression.codec.rounding import StochasticInt
from reticent.core.errors import PayloadError
from reticent.core.update import Layout, Vector

QUANTIZERS = (
    *PLAIN_NAMES,
    *PARAMETERS,
    *("topk:0.5", "randk:0.5", "lowrank:1"),
)
CODED = ("identity", "int8", "int4:shared", "dither4", "dither1:blocks", "sign", "lowrank", "topk")
ROTATED = [("hadamard", q) for q in ("int1", "int4", "int2:shared", "dither3", "dither1:blocks")]
CHAINS: list[tuple[str, ...]] = [
    *((q,) for q in QUANTIZERS),
    *((q, e) for q in CODED for e in ("ans", "zstd")),
    *ROTATED,
    ("hadamard", "dither2", "ans"),
]
BLOCKS = (700, 0, 1, 299)
STEP = 0.25
Wide = NDArray[np.float64]

every_chain = pytest.mark.parametrize("names", CHAINS, ids="+".join)


def codec_of(names: tuple[str, ...], blocks: Blocks = BLOCKS) -> Codec:
    """The codec of ``names``, told that each block is the squarest matrix of its size."""
    shapes = []
    for n in blocks:
        rows = max((r for r in range(1, int(n**0.5) + 1) if n % r == 0), default=0)
        shapes.append((rows, n // rows) if rows > 1 else (n,))
    return build_codec(names, Layout(tuple(map(str, range(len(blocks)))), tuple(shapes)))


def gaussian(n: int = 1000, seed: int = 0) -> Vector:
    return np.random.default_rng(seed).normal(size=n).astype(np.float32)


def rng(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


def round_trip(codec: Codec, vector: Vector, blocks: Blocks, step: float | None = None) -> Vector:
    return codec.decode(codec.encode(vector, blocks, rng(), step), blocks)


def quantizer_of(names: tuple[str, ...]) -> str:
    return names[1] if names[0] == "hadamard" else names[0]


def bits_of(name: str) -> int:
    return int(name.partition(":")[0][-1])


def bound(names: tuple[str, ...], vector: Vector, blocks: Blocks, step: float | None) -> Wide:
    """Largest error that the definition of the quantizer allows, per coordinate, float64."""
    size: Wide = np.abs(vector.astype(np.float64))
    if names[0] == "identity" or not len(vector):
        return np.zeros(len(vector))
    if names[0] == "hadamard" or names[0].startswith(("drive", "eden")):
        return rotated_bound(names, size, step)
    name = names[0]
    parts = np.split(size, np.cumsum(blocks)[:-1])
    if name.startswith("topk"):
        smallest_kept = np.sort(size)[-kept(name, len(vector))]
        return np.where(size > smallest_kept, 0.0, size)
    if name.startswith("randk"):
        return size * max(1.0, len(vector) / kept(name, len(vector)) - 1)
    if name == "sign":
        means = np.array([p.mean() if len(p) else 0.0 for p in parts], dtype=np.float64)
        return size + np.repeat(means, blocks)
    if name.startswith("lowrank"):
        return np.repeat([np.linalg.norm(p) for p in parts], blocks)
    return grid_bound(name, parts, blocks, step)


def grid_bound(name: str, parts: list[Wide], blocks: Blocks, step: float | None) -> Wide:
    bits, dithered = bits_of(name), name.startswith("dither")
    shared = name.endswith(":shared") or (dithered and not name.endswith(":blocks"))
    peaks = np.array([p.max() if len(p) else 0.0 for p in parts])
    levels = (2**bits - 1) / 2 if name.endswith(":blocks") else 2 ** (bits - 1) - 1 or 0.5
    steps = peaks / levels
    if shared:
        steps = np.full(len(parts), steps.max() if step is None else step)
    return np.repeat(steps / 2 if dithered else steps, blocks)


def rotated_bound(names: tuple[str, ...], size: Wide, step: float | None) -> Wide:
    length = float(np.linalg.norm(size))
    if names[0] != "hadamard":  # one bit of 1024 equal values is the worst
        return np.full(len(size), 32 * length)
    width = 2 * length if step is None else max(step, 2 * length)
    return np.full(len(size), 32 * width)


def kept(name: str, n: int) -> int:
    return int(np.ceil((0.5 if ":" in name else 0.1) * n))


def check_error(
    names: tuple[str, ...], vector: Vector, blocks: Blocks, decoded: Vector, step: float | None
) -> None:
    allowed = bound(names, vector, blocks, step)
    slack = 1e-6 * np.abs(vector).astype(np.float64) + 1e-6 * allowed + 1e-44
    assert (np.abs(decoded.astype(np.float64) - vector) <= allowed + slack).all()


@every_chain
@pytest.mark.parametrize("step", [None, STEP])
def test_round_trip_keeps_shape_and_bounds_the_error(names, step) -> None:
    vector = gaussian()
    decoded = round_trip(codec_of(names), vector, BLOCKS, step)
    assert decoded.dtype == np.float32
    assert decoded.shape == vector.shape
    assert decoded.flags.writeable
    assert decoded.flags.c_contiguous
    check_error(names, vector, BLOCKS, decoded, step)


@every_chain
def test_equal_generators_give_equal_bytes_and_the_input_is_not_changed(names) -> None:
    codec, vector = codec_of(names), gaussian()
    payloads = [codec.encode(vector, BLOCKS, rng(seed), STEP) for seed in (1, 1, 2)]
    assert payloads[0] == payloads[1]
    drawless = names[0] in ("identity", "topk", "topk:0.5", "sign")
    assert (payloads[0] == payloads[2]) == drawless
    assert np.array_equal(vector, gaussian())
    assert np.array_equal(codec.decode(payloads[0], BLOCKS), codec.decode(payloads[1], BLOCKS))


@pytest.mark.parametrize("names", [(q,) for q in QUANTIZERS] + ROTATED, ids="+".join)
def test_an_entropy_stage_changes_no_value(names) -> None:
    vector = gaussian()
    plain = round_trip(codec_of(names), vector, BLOCKS, STEP)
    for entropy in ("ans", "zstd"):
        coded = round_trip(codec_of((*names, entropy)), vector, BLOCKS, STEP)
        assert np.array_equal(plain, coded)


@every_chain
@pytest.mark.parametrize("blocks", [(), (0, 0), (1,), (0, 1), (2,), (3, 4), (255,), (256, 1)])
def test_small_vectors(names, blocks) -> None:
    vector = gaussian(sum(blocks))
    decoded = round_trip(codec_of(names, blocks), vector, blocks)
    assert decoded.dtype == np.float32
    assert decoded.shape == vector.shape
    check_error(names, vector, blocks, decoded, None)


@every_chain
def test_zero_is_exactly_zero_without_a_public_step(names) -> None:
    assert not round_trip(codec_of(names), np.zeros(1000, np.float32), BLOCKS).any()


@every_chain
def test_huge_dynamic_range(names) -> None:
    # Rotations and factors add values up, and random-k multiplies them: they take less.
    top = 126.9 if not names[0].startswith(("randk", "hadamard", "drive", "eden", "low")) else 110
    exponents = np.linspace(-149, top, 1000)
    vector = (2.0**exponents * np.where(np.arange(1000) % 3, 1, -1)).astype(np.float32)
    decoded = round_trip(codec_of(names), vector, BLOCKS)
    check_error(names, vector, BLOCKS, decoded, None)


@every_chain
def test_a_strided_vector_is_read_in_order(names) -> None:
    vector = gaussian(1000)[::-1]
    copy = np.ascontiguousarray(vector)
    codec = codec_of(names)
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


def is_biased(codec: Codec, vector: Vector, blocks: Blocks) -> bool:
    """Whether the mean of 600 decodings is 6 of its own standard errors off somewhere."""
    generator, draws = rng(3), 600
    payloads = [codec.encode(vector, blocks, generator) for _ in range(draws)]
    decoded = np.array([codec.decode(p, blocks) for p in payloads], dtype=np.float64)
    off = np.abs(decoded.mean(axis=0) - vector)
    return bool((off > 6 * decoded.std(axis=0) / np.sqrt(draws) + 1e-5).any())


def widest_error(names: tuple[str, ...], vector: Vector, blocks: Blocks) -> Wide:
    if names[0] == "hadamard":
        # An orthogonal mix of errors is as large as they are on average, at the rotated peak.
        peak = float(np.linalg.norm(vector)) / 8 * 4
        return np.full(len(vector), 2 * peak / (2 ** bits_of(names[1]) / 2 - 0.5))
    width = bound(names, vector, blocks, None)
    if names[0].startswith("randk"):
        n = len(vector)
        return 2 * np.abs(vector) * np.sqrt(n / kept(names[0], n) - 1)
    return 2 * width if names[0].startswith("dither") else width


@dataclass(frozen=True)
class TowardZero(StochasticInt):
    """Deterministic rounding toward zero: a wrong codec that the check must refuse."""

    def encode(self, vector, blocks, generator, step) -> Coded:
        coded = super().encode(vector, blocks, generator, step)
        scales = np.repeat(np.frombuffer(coded.side, "<f4"), blocks).astype(np.float64)
        symbols = np.trunc(vector / scales) + self.levels
        return Coded(symbols.astype(np.uint8), coded.side)


@pytest.mark.parametrize(
    "names", [(q,) for q in QUANTIZERS if codec_of((q,)).unbiased] + ROTATED, ids="+".join
)
def test_codecs_that_say_so_are_unbiased(names) -> None:
    blocks, vector = (40, 24), gaussian(64)
    codec = codec_of(names, blocks)
    assert codec.unbiased
    widest = widest_error(names, vector, blocks)
    assert mean_error_in_bounds(codec, vector, blocks, widest)


@pytest.mark.parametrize("name", [q for q in QUANTIZERS if not codec_of((q,)).unbiased])
def test_all_other_codecs_are_biased(name) -> None:
    if name.startswith("lowrank"):
        assert is_biased(codec_of((name,), (64,)), gaussian(64), (64,))
    else:
        assert is_biased(codec_of((name,), (2,)), np.array([3, 1], dtype=np.float32), (2,))


@pytest.mark.parametrize(("levels", "alphabet"), [(7, 16), (127, 256)])
def test_the_unbiasedness_check_refuses_rounding_toward_zero(levels, alphabet) -> None:
    blocks, vector = (40, 24), gaussian(64)
    wrong = Codec(("toward-zero",), TowardZero(levels, 9, alphabet), PLAIN)
    names = ("int4",) if levels == 7 else ("int8",)
    assert not mean_error_in_bounds(wrong, vector, blocks, bound(names, vector, blocks, None))
    assert is_biased(wrong, vector, blocks)
    assert not is_biased(build_codec(("dither4",)), vector, blocks)


@every_chain
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(names, bad) -> None:
    vector = gaussian()
    vector[500] = bad
    with pytest.raises(PayloadError, match="finite"):
        codec_of(names).encode(vector, BLOCKS, rng())


@every_chain
def test_wrong_dtype_shape_or_blocks_are_refused(names) -> None:
    codec, vector = codec_of(names), gaussian()
    wrong: Any
    for wrong in (vector.astype(np.float64), vector[:-1], vector.reshape(10, 100)):
        with pytest.raises(PayloadError, match="must be float32"):
            codec.encode(wrong, BLOCKS, rng())
    with pytest.raises(PayloadError, match="at least 0"):
        codec.encode(vector, (1001, -1), rng())


@every_chain
def test_a_payload_of_other_stages_or_another_length_is_refused(names) -> None:
    payload = codec_of(names).encode(gaussian(), BLOCKS, rng())
    other = build_codec(("int8",) if names[0][:4] != "int8" else ("identity",))
    longer = build_codec(names) if "lowrank" not in names[0] else codec_of(names, (*BLOCKS, 1))
    with pytest.raises(PayloadError, match="must hold 1000"):
        other.decode(payload, (1000,) * 1)
    with pytest.raises(PayloadError, match="must hold 1001"):
        longer.decode(payload, (*BLOCKS, 1))


@every_chain
@pytest.mark.parametrize("blocks", [(1000,), BLOCKS])
def test_noise_does_not_grow_beyond_the_public_factor(
    names: tuple[str, ...], blocks: Blocks
) -> None:
    codec, x = codec_of(names, blocks), gaussian()
    factor = codec.expansion(len(x))
    length = np.linalg.norm(round_trip(codec, x, blocks).astype(np.float64))
    assert factor >= 1 and length <= 2 * factor * np.linalg.norm(x)


def test_the_factor_of_kept_coordinates_is_reached_by_one_of_them() -> None:
    codec, x = codec_of(("randk:0.01",), (1000,)), np.zeros(1000, np.float32)
    kept = np.flatnonzero(round_trip(codec, gaussian(), (1000,)))[0]
    x[kept] = 3.0
    assert codec.expansion(1000) == 100
    assert np.linalg.norm(round_trip(codec, x, (1000,))) == pytest.approx(300)


@pytest.mark.parametrize("name", ["int1", "dither1:blocks"])
def test_one_bit_makes_noise_more_than_twice_as_long(name: str) -> None:
    x = gaussian(100_000)
    length = np.linalg.norm(round_trip(codec_of((name,), (100_000,)), x, (100_000,)))
    assert length > 2 * np.linalg.norm(x)
