"""Where noise comes from: right scale, no repetition, no dependence on order."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from reticent.privacy.randomness import (
    Randomness,
    SeededRandomness,
    SystemRandomness,
    _CipherStream,
    _SeededStream,
)

SOURCES = [SeededRandomness(3), SystemRandomness()]


def plausible(sample: np.ndarray, cdf: object, level: float = 1e-6) -> bool:
    return stats.kstest(sample, cdf).pvalue > level  # type: ignore[arg-type]


@pytest.mark.parametrize("source", SOURCES, ids=["seeded", "system"])
def test_normal_draws_have_unit_scale_and_two_thirds_is_rejected(source: Randomness) -> None:
    sample = source.stream("noise", 1).normal(20_001)
    assert sample.shape == (20_001,)
    assert plausible(sample, stats.norm(0, 1).cdf)
    assert not plausible(sample * 2 / 3, stats.norm(0, 1).cdf)
    assert abs(np.corrcoef(sample[:-1], sample[1:])[0, 1]) < 0.05


@pytest.mark.parametrize("source", SOURCES, ids=["seeded", "system"])
def test_uniform_draws_fill_the_unit_interval(source: Randomness) -> None:
    sample = source.stream("batch", 1).uniform(20_000)
    assert sample.min() >= 0
    assert sample.max() < 1
    assert plausible(sample, stats.uniform(0, 1).cdf)
    assert not plausible(sample**1.2, stats.uniform(0, 1).cdf)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 65_535, 65_536, 65_537, 200_001])
def test_normal_draws_in_blocks_are_box_muller_written_in_two_lines(count: int) -> None:
    key, pairs = bytes(range(32)), (count + 1) // 2
    plain, stream = _CipherStream(key), _CipherStream(key)
    radius = np.sqrt(-2.0 * np.log(1.0 - plain.uniform(pairs)))
    angle = 2.0 * np.pi * plain.uniform(pairs)
    expected = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
    assert np.array_equal(stream.normal(count), expected)
    assert stream.bytes(8) == plain.bytes(8)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 32_767, 32_768, 32_769, 100_001])
def test_seeded_normal_draws_are_box_muller_of_32_bit_uniforms_up_to_rounding(count: int) -> None:
    key, pairs, block = bytes(range(32)), (count + 1) // 2, 1 << 14
    plain, stream = _CipherStream(key), _SeededStream(key)
    words = [
        np.frombuffer(plain.bytes(8 * min(block, pairs - at)), "<u4").reshape(2, -1)
        for at in range(0, pairs, block)
    ]
    radii, angles = np.concatenate([np.empty((2, 0)), *words], axis=1) * 2.0**-32
    radius = np.sqrt(-2.0 * np.log(radii + 2.0**-33))
    angle = 2.0 * np.pi * angles
    expected = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
    np.testing.assert_allclose(stream.normal(count), expected, rtol=0, atol=4e-4)
    assert np.quantile(abs(_SeededStream(key).normal(count) - expected), 0.9) < 2e-6 if count else 1
    assert stream.bytes(8) == plain.bytes(8)


def test_seeded_normal_draws_have_the_moments_and_the_tails_of_a_normal() -> None:
    sample = SeededRandomness(1).stream("tails").normal(4_000_000)
    for power, wanted in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        spread = np.sqrt(np.mean(sample ** (2 * power)) / len(sample))
        assert abs(np.mean(sample**power) - wanted) < 6 * spread
    for bound in (3.0, 4.0, 4.5):
        expected = 2 * stats.norm.sf(bound) * len(sample)
        assert abs((abs(sample) > bound).sum() - expected) < 6 * np.sqrt(expected)
    assert not abs((abs(sample / 0.9) > 3.0).sum() - 2 * stats.norm.sf(3.0) * len(sample)) < 600


def test_uniform_draws_are_the_upper_53_bits_of_eight_bytes() -> None:
    key = bytes(range(32))
    words = np.frombuffer(_CipherStream(key).bytes(8000), dtype="<u8")
    expected = [(int(word) >> 11) / 2**53 for word in words]
    assert _CipherStream(key).uniform(1000).tolist() == expected


def test_no_two_clients_rounds_or_steps_share_seeded_noise() -> None:
    source = SeededRandomness(0)
    paths = [("noise", "run", c, r, s) for c in range(4) for r in range(4) for s in range(4)]
    paths += [("batch", "run", 0, 0, 0), ("noise", "nur", 0, 0, 0), ("noise", "run", 1, 11, 1)]
    draws = np.stack([source.stream(*p).normal(200) for p in paths])
    overlap = np.corrcoef(draws) - np.eye(len(paths))
    assert np.abs(overlap).max() < 0.4
    assert len(np.unique(draws[:, 0])) == len(paths)


def test_seeded_noise_depends_on_the_path_only() -> None:
    first = SeededRandomness(5).stream("noise", "r", 1, 2).normal(8)
    SeededRandomness(5).stream("noise", "r", 9, 9).normal(100)
    again = SeededRandomness(5).stream("noise", "r", 1, 2).normal(8)
    other = SeededRandomness(6).stream("noise", "r", 1, 2).normal(8)
    assert (first == again).all()
    assert (first != other).all()


def test_system_noise_never_repeats_even_for_the_same_path() -> None:
    source = SystemRandomness()
    a, b = (source.stream("noise", "r", 1, 2).normal(50) for _ in range(2))
    assert (a != b).all()


def test_a_stream_advances() -> None:
    for source in SOURCES:
        stream = source.stream("x")
        assert stream.bytes(16) != stream.bytes(16)
        assert (stream.normal(10) != stream.normal(10)).all()


def test_descriptions_say_which_is_safe() -> None:
    assert "simulation only" in SeededRandomness(0).description
    assert "AES-256" in SystemRandomness().description
