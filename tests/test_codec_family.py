"""What each quantizer's docstring states: variances, levels, rotations and sums, by other means."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from reticent.compression.codec import build_codec
from reticent.compression.codec.build import PARAMETERS, QUANTIZERS
from reticent.compression.codec.dither import dither
from reticent.compression.codec.frame import unseal
from reticent.compression.codec.hadamard import Rotated, pieces_of, transform
from reticent.compression.codec.lloyd import POSITIVE_LEVELS, NormalLevels
from reticent.compression.codec.low_rank import LowRank, orthonormal
from reticent.core.errors import PayloadError
from reticent.core.update import Layout, Vector

N = 64
VECTOR = np.random.default_rng(0).normal(size=N).astype(np.float32)


def squared_error(names: tuple[str, ...], vector: Vector, step: float | None = None) -> float:
    """Mean over 400 encodings of the summed squared error."""
    codec, generator, blocks = build_codec(names), np.random.default_rng(1), (len(vector),)
    total = 0.0
    for _ in range(400):
        decoded = codec.decode(codec.encode(vector, blocks, generator, step), blocks)
        total += float(((decoded - vector.astype(np.float64)) ** 2).sum())
    return total / 400


def rounding(vector: Vector, step: float, shift: float = 0.0) -> float:
    part = (vector.astype(np.float64) / step + shift) % 1
    return float((part * (1 - part)).sum() * step**2)


PEAK = float(np.abs(VECTOR).max())
SQUARES = VECTOR.astype(np.float64) ** 2
STATED = [
    *((f"int{b}", None, rounding(VECTOR, PEAK / (2 ** (b - 1) - 1))) for b in range(2, 9)),
    ("int1", None, float((PEAK**2 - SQUARES).sum())),
    *((f"int{b}:shared", b / 8, rounding(VECTOR, b / 8)) for b in range(2, 9)),
    *((f"dither{b}", b / 8, N * (b / 8) ** 2 / 12) for b in range(2, 9)),
    *((f"dither{b}:blocks", None, N * (2 * PEAK / (2**b - 1)) ** 2 / 12) for b in range(1, 9)),
    ("randk:0.25", None, float(SQUARES.sum()) * 3),
    ("sign", None, float(SQUARES.sum() - np.abs(VECTOR).sum() ** 2 / N)),
]


@pytest.mark.parametrize(("name", "step", "stated"), STATED, ids=lambda v: str(v)[:9])
def test_the_variance_is_the_stated_one(name, step, stated) -> None:
    measured = squared_error((name,), VECTOR, step)
    assert measured == pytest.approx(stated, rel=0.06)
    assert measured != pytest.approx(stated * 1.2, rel=0.06)


@pytest.mark.parametrize(
    ("name", "share"),
    [("drive", np.pi / 2 - 1), ("eden2", 0.133), ("eden3", 0.0358), ("eden4", 0.0096)],
)
def test_rotated_few_bits_lose_the_stated_share(name, share) -> None:
    vector = np.random.default_rng(3).standard_t(3, 1024).astype(np.float32)
    codec, generator = build_codec((name,)), np.random.default_rng(4)
    lost = [
        codec.decode(codec.encode(vector, (1024,), generator), (1024,)) - vector for _ in range(30)
    ]
    measured = np.mean([(e.astype(np.float64) ** 2).sum() for e in lost]) / (vector**2).sum()
    assert measured == pytest.approx(share, rel=0.06)
    assert measured != pytest.approx(share * 1.2, rel=0.06)


def test_no_codec_is_left_out_here() -> None:
    """Of the others the error is exact or bounded: identity, topk and lowrank."""
    rotated = {"drive", "eden2", "eden3", "eden4"}
    stated = {name.partition(":0")[0] for name, _, _ in STATED} | rotated
    assert {*QUANTIZERS, *PARAMETERS} - stated == {"identity", "topk", "lowrank"}


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_normal_levels_are_the_fixed_point_of_lloyds_iteration(bits) -> None:
    levels = np.array(POSITIVE_LEVELS[bits])
    edges = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    mass = stats.norm.cdf(edges[1:]) - stats.norm.cdf(edges[:-1])
    means = (stats.norm.pdf(edges[:-1]) - stats.norm.pdf(edges[1:])) / mass
    assert np.allclose(levels, means, atol=1e-6)
    assert not np.allclose(levels * 1.001, means, atol=1e-6)


def test_drive_is_the_scaled_sign_of_its_paper() -> None:
    vector = np.random.default_rng(5).normal(size=16).astype(np.float32)
    codec = build_codec(("drive",))
    payload = codec.encode(vector, (16,), np.random.default_rng(0))
    seed = unseal(payload).side[:16]
    words = np.random.Philox(key=np.frombuffer(seed, "<u8")).random_raw(16)
    rotation = hadamard(16) @ np.diag(1.0 - 2.0 * (words >> np.uint64(63)))
    rotated = rotation @ vector.astype(np.float64)
    scale = (rotated**2).sum() / np.abs(rotated).sum()
    expected = rotation.T @ (scale * np.sign(rotated))
    assert np.allclose(codec.decode(payload, (16,)), expected, rtol=1e-5, atol=1e-6)


def hadamard(n: int) -> np.ndarray:
    """Sylvester's construction, orthonormal."""
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(n)


@pytest.mark.parametrize("n", [1, 2, 8, 64, 1024])
def test_the_transform_is_the_hadamard_matrix(n) -> None:
    rows = np.random.default_rng(n).normal(size=(3, n))
    assert np.allclose(transform(rows), rows @ hadamard(n))
    assert np.allclose(transform(transform(rows)), rows)
    assert transform(np.zeros((0, n))).shape == (0, n)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 5000))
def test_pieces_are_equal_powers_of_two_and_waste_less_than_one(n) -> None:
    pieces = pieces_of(n)
    assert len(set(pieces)) <= 1
    assert all(p & (p - 1) == 0 and 1 <= p <= 1024 for p in pieces)
    assert n <= sum(pieces) < n + (pieces[0] if pieces else 1)


def test_rotation_by_enumeration_keeps_an_unbiased_codec_unbiased_but_not_drive() -> None:
    vector, matrix = np.array([3.0, 1.0]), hadamard(2)
    level = 5.0
    one_bit, drive = [], []
    for signs in product([1, -1], repeat=2):
        rotation = matrix @ np.diag(signs)
        rotated = rotation @ vector
        one_bit.append(rotation.T @ rotated)  # the expectation of int1 is its input
        assert np.abs(rotated).max() <= level
        scale = 10 / np.abs(rotated).sum()
        drive.append(rotation.T @ (scale * np.sign(rotated)))
    assert np.allclose(np.mean(one_bit, axis=0), vector)
    assert np.allclose(drive, [10 / 3, 0.0])
    codec = build_codec(("drive",))
    for seed in range(5):
        payload = codec.encode(vector.astype(np.float32), (2,), np.random.default_rng(seed))
        assert np.allclose(codec.decode(payload, (2,)), [10 / 3, 0.0], atol=1e-6)


@pytest.mark.parametrize("name", ["dither2", "dither4", "dither8", "int2:shared", "int5:shared"])
def test_the_sum_of_the_integers_decodes_to_the_sum(name) -> None:
    """What secure aggregation adds up: integers in a modulus, with the dithers known apart."""
    codec, step, modulus = build_codec((name,)), 0.25, 2**16
    assert codec.sums
    generator, total, dithers, exact = np.random.default_rng(2), np.zeros(N, int), 0.0, 0.0
    for _ in range(20):
        vector = generator.normal(size=N).astype(np.float32)
        payload = codec.encode(vector, (N,), generator, step)
        decoded = codec.decode(payload, (N,)).astype(np.float64)
        u = dither(unseal(payload).side[:16], N) if name.startswith("dither") else np.zeros(N)
        integers = decoded / step + u
        assert np.allclose(integers, np.rint(integers), atol=1e-4)
        total = (total + np.rint(integers).astype(int)) % modulus
        dithers, exact = dithers + u, exact + decoded
    centred = (total + modulus // 2) % modulus - modulus // 2
    assert np.allclose((centred - dithers) * step, exact, atol=1e-4)


@pytest.mark.parametrize("name", ["int4", "dither4:blocks", "sign", "drive", "topk", "randk"])
def test_codecs_that_do_not_commute_leave_the_grid(name) -> None:
    codec = build_codec((name,))
    assert not codec.sums
    payload = codec.encode(VECTOR, (N,), np.random.default_rng(2), 0.25)
    decoded = codec.decode(payload, (N,)).astype(np.float64)
    u = dither(unseal(payload).side[:16], N) if name.startswith("dither") else 0.0
    assert not np.allclose(decoded / 0.25 + u, np.rint(decoded / 0.25 + u), atol=1e-4)


@pytest.mark.parametrize("name", ["topk", "sign", "lowrank:1"])
def test_codecs_that_contract_never_lengthen_the_error(name) -> None:
    codec = build_codec((name,), Layout(("w",), ((8, 8),)))
    for seed in range(200):
        vector = np.random.default_rng(seed).standard_t(2, N).astype(np.float32)
        payload = codec.encode(vector, (N,), np.random.default_rng(seed))
        error = codec.decode(payload, (N,)) - vector.astype(np.float64)
        assert np.linalg.norm(error) <= np.linalg.norm(vector) * (1 + 1e-6)


def test_random_k_keeps_every_set_equally_often() -> None:
    codec, vector = build_codec(("randk:0.5",)), np.ones(4, dtype=np.float32)
    generator, seen = np.random.default_rng(0), {}
    for _ in range(1200):
        decoded = codec.decode(codec.encode(vector, (4,), generator), (4,))
        key = tuple(np.flatnonzero(decoded))
        assert set(decoded[list(key)]) == {2.0}
        seen[key] = seen.get(key, 0) + 1
    assert len(seen) == 6
    assert stats.chisquare(list(seen.values())).pvalue > 1e-3


def test_low_rank_is_a_projection_of_each_matrix_and_exact_at_its_rank() -> None:
    generator = np.random.default_rng(0)
    mask = np.ones(20 * 30 + 7, dtype=bool)
    mask[::9] = False
    layout = Layout(("w", "b"), ((20, 2, 15), (7,)), np.packbits(mask).tobytes())
    full = generator.normal(size=(20, 2)) @ generator.normal(size=(2, 30))
    dense = Layout(layout.names, layout.shapes)
    codec = build_codec(("lowrank:2",), dense)
    exact = np.concatenate([full.ravel(), np.arange(7)]).astype(np.float32)
    payload = codec.encode(exact, dense.blocks, generator)
    assert np.allclose(codec.decode(payload, dense.blocks), exact, atol=1e-5)
    assert len(payload) == 17 + 4 * (2 * (20 + 30) + 7)
    kept = exact[layout.index]
    pruned = build_codec(("lowrank:2",), layout)
    decoded = pruned.decode(pruned.encode(kept, layout.blocks, generator), layout.blocks)
    matrix = np.zeros(607)
    matrix[layout.index] = kept
    singular = np.linalg.svd(matrix[:600].reshape(20, 30), compute_uv=False)
    scattered = np.zeros(607)
    scattered[layout.index] = decoded - kept
    lost, energy = (scattered[:600] ** 2).sum(), (singular**2).sum()
    assert lost < 0.9 * energy
    assert len(pruned.encode(kept, layout.blocks, generator)) == 17 + 4 * (2 * (20 + 30) + 6)
    assert np.array_equal(decoded[-6:], kept[-6:])


def test_low_rank_gives_the_same_bits_with_any_number_of_threads() -> None:
    """Before float32 hides nearly all of what a BLAS with other threads rounds to."""
    code = (
        "import hashlib, numpy as np\n"
        "from reticent.compression.codec.low_rank import LowRank\n"
        "from reticent.core.update import Layout\n"
        "quantizer = LowRank(4, Layout(('w',), ((1000, 1000),)))\n"
        "matrix = np.random.default_rng(0).standard_normal((1000, 1000))\n"
        "factors = quantizer._factors(matrix, np.random.default_rng(1))\n"
        "product = quantizer._product(0, factors)\n"
        "print(hashlib.sha256(factors.tobytes() + product.tobytes()).hexdigest())\n"
    )
    found = set[str]()
    for threads in ("1", "2", "4"):
        variables = os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        done = subprocess.run(
            [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True
        )
        found.add(done.stdout)
    assert len(found) == 1


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_an_orthonormal_basis_spans_what_the_vectors_span(rank: int) -> None:
    """Of vectors that depend on each other some become zero; LAPACK's projection is the same."""
    generator = np.random.default_rng(rank)
    vectors = generator.normal(size=(6, rank)) @ generator.normal(size=(rank, 40))
    vectors *= np.logspace(-8, 8, 6)[:, None]
    basis = orthonormal(vectors)
    lengths = np.linalg.norm(basis, axis=1)
    assert np.allclose(sorted(lengths), [0] * (6 - rank) + [1] * rank, atol=1e-14)
    products = basis @ basis.T
    assert np.abs(products - np.diag(lengths**2)).max() < 1e-14
    right = np.linalg.svd(vectors / np.linalg.norm(vectors, axis=1)[:, None])[2][:rank]
    assert np.allclose(basis.T @ basis, right.T @ right, atol=1e-12)
    assert not orthonormal(np.zeros((2, 5))).any()


def test_low_rank_without_its_layout_is_refused() -> None:
    codec = build_codec(("lowrank",))
    assert isinstance(codec.quantizer, LowRank)
    with pytest.raises(PayloadError, match="the layout has 0"):
        codec.encode(VECTOR, (N,), np.random.default_rng(0))


def test_values_that_would_not_fit_after_scaling_or_rotation_are_refused() -> None:
    huge = np.full(N, 2.0**126, dtype=np.float32)
    for name in ("randk", "drive", "eden2"):
        with pytest.raises(PayloadError, match="at most"):
            build_codec((name,)).encode(huge, (N,), np.random.default_rng(0))


def test_a_rotated_payload_is_not_read_as_a_plain_one() -> None:
    rotated, plain = build_codec(("hadamard", "dither4")), build_codec(("dither4",))
    assert isinstance(rotated.quantizer, Rotated)
    assert not isinstance(plain.quantizer, Rotated | NormalLevels)
    for writer, reader in ((rotated, plain), (plain, rotated)):
        with pytest.raises(PayloadError):
            reader.decode(writer.encode(VECTOR, (N,), np.random.default_rng(0)), (N,))
