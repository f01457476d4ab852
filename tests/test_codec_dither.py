"""Independence of the dithered error, and the dependence that stochastic rounding has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from reticent.compression.codec import Codec, build_codec
from reticent.compression.codec.dither import dither
from reticent.core.errors import PayloadError

STEP = 0.5
N = 4000


def errors_at(codec: Codec, fraction: float, seed: int = 0) -> np.ndarray:
    """Errors, in steps, of N values that lie ``fraction`` of a step above a level.

    The last value fixes the scale of codecs that take it from the data, so that one step is STEP
    for them too; its error is left out.
    """
    vector = np.full(N + 1, (1 + fraction) * STEP, dtype=np.float32)
    vector[-1] = 7 * STEP
    payload = codec.encode(vector, (N + 1,), np.random.default_rng(seed), STEP)
    return ((codec.decode(payload, (N + 1,)) - vector.astype(np.float64)) / STEP)[:N]


def uniform_p(errors: np.ndarray) -> float:
    result: Any = stats.kstest(errors, stats.uniform(-0.5, 1).cdf)
    return float(result.pvalue)


def same_p(first: np.ndarray, second: np.ndarray) -> float:
    result: Any = stats.ks_2samp(first, second)
    return float(result.pvalue)


@pytest.mark.parametrize("names", [("dither4",), ("dither4", "ans"), ("dither8", "zstd")])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.5, 0.9])
def test_dithered_error_is_uniform_whatever_the_fractional_part(names, fraction) -> None:
    errors = errors_at(build_codec(names), fraction)
    assert uniform_p(errors) > 1e-3
    assert np.var(errors) == pytest.approx(1 / 12, rel=0.06)
    assert uniform_p(errors * 2 / 3) < 1e-6


def independence_p(codec: Codec) -> float:
    """P-value of independence in the table of (fractional part of input) by (error)."""
    generator = np.random.default_rng(5)
    vector = generator.uniform(-3, 3, 20000).astype(np.float32)
    vector[0] = 7 * STEP
    payload = codec.encode(vector, (20000,), generator, STEP)
    exact = vector.astype(np.float64) / STEP
    errors = codec.decode(payload, (20000,)) / STEP - exact
    table = np.histogram2d(exact % 1, errors, bins=[8, 8])[0]
    result: Any = stats.chi2_contingency(table)
    return float(result.pvalue)


def test_dithered_error_is_independent_of_the_input() -> None:
    assert independence_p(build_codec(("dither4", "ans"))) > 1e-3


def test_stochastic_rounding_depends_on_the_fractional_part() -> None:
    codec = build_codec(("int4", "ans"))
    assert codec.error == "dependent"
    assert independence_p(codec) < 1e-9
    on_a_level, between = errors_at(codec, 0.0), errors_at(codec, 0.5)
    assert np.abs(on_a_level).max() < 1e-5
    assert np.abs(between).min() > 0.49
    assert same_p(on_a_level, between) < 1e-9
    assert uniform_p(on_a_level) < 1e-9


def test_dither_that_is_not_subtracted_would_fail_the_same_test() -> None:
    u = np.random.default_rng(0).uniform(-0.5, 0.5, N)
    assert uniform_p(np.rint(1.25 + u) - 1.25) < 1e-9


def test_dithered_errors_of_two_fractional_parts_have_one_distribution() -> None:
    codec = build_codec(("dither4",))
    assert same_p(errors_at(codec, 0.0, 1), errors_at(codec, 0.5, 2)) > 1e-3


def test_values_outside_the_alphabet_are_escaped_and_keep_a_uniform_error() -> None:
    codec = build_codec(("dither4", "ans"))
    vector = np.linspace(-5000, 5000, N).astype(np.float32)
    decoded = codec.decode(codec.encode(vector, (N,), np.random.default_rng(2), STEP), (N,))
    errors = (decoded.astype(np.float64) - vector) / STEP
    # Float32 has about 1e-3 steps of resolution here.
    assert np.abs(errors).max() <= 0.5 + 1e-3
    assert uniform_p(errors) > 1e-3
    saturated = np.clip(decoded, -7 * STEP, 7 * STEP).astype(np.float64)
    assert uniform_p((saturated - vector) / STEP) < 1e-9


def test_integers_up_to_31_bits_are_stored_exactly() -> None:
    codec = build_codec(("dither4",))
    vector = np.array([2.0**31 - 256, -(2.0**31) + 256, 2.0**20, 0], dtype=np.float32)
    decoded = codec.decode(codec.encode(vector, (4,), np.random.default_rng(0), 1.0), (4,))
    assert np.array_equal(decoded[:2], vector[:2])
    assert np.abs(decoded[2:] - vector[2:]).max() <= 0.5


@pytest.mark.parametrize("step", [1e-30, 5e-324])
def test_values_above_31_bits_of_steps_are_refused(step) -> None:
    with pytest.raises(PayloadError, match="too small"):
        build_codec(("dither4",)).encode(
            np.ones(1, np.float32), (1,), np.random.default_rng(0), step
        )


@pytest.mark.parametrize("step", [0.0, -1.0, np.nan, np.inf, 1e39])
def test_steps_that_are_no_steps_are_refused(step) -> None:
    with pytest.raises(PayloadError, match="step="):
        build_codec(("dither8",)).encode(
            np.ones(1, np.float32), (1,), np.random.default_rng(0), step
        )


def test_the_header_says_where_the_step_came_from() -> None:
    codec, vector = build_codec(("dither4",)), np.ones(3, np.float32)
    flags = [codec.encode(vector, (3,), np.random.default_rng(0), s)[4] for s in (None, 1.0)]
    assert flags == [1, 0]


def test_zero_with_a_public_step_is_dithered_like_any_other_value() -> None:
    codec = build_codec(("dither4", "ans"))
    payload = codec.encode(np.zeros(N, np.float32), (N,), np.random.default_rng(9), STEP)
    assert uniform_p(codec.decode(payload, (N,)).astype(np.float64) / STEP) > 1e-3


def philox(key: tuple[int, int], block: int) -> list[int]:
    """Philox4x64-10 (Salmon et al. 2011, section 4.3) in plain integers, written again."""
    mask, words, (k0, k1) = 2**64 - 1, [block, 0, 0, 0], key
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
        words = [
            (second >> 64) ^ words[1] ^ k0,
            second & mask,
            (first >> 64) ^ words[3] ^ k1,
            first & mask,
        ]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return words


def test_the_dither_is_philox_of_the_seed_whatever_the_version_of_numpy() -> None:
    seed = bytes(range(100, 116))
    key = (int.from_bytes(seed[:8], "little"), int.from_bytes(seed[8:], "little"))
    words = [word for block in (1, 2, 3) for word in philox(key, block)]
    assert dither(seed, 12).tolist() == [(word >> 11) / 2**53 - 0.5 for word in words]
