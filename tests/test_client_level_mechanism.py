"""Client-level privacy as arithmetic: bounds, noise scales, counts and the moving bound."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

from reticent.core.errors import PayloadError, PlanError, PrivacyError
from reticent.core.plan import parse_plan
from reticent.privacy.accounting import epsilon
from reticent.privacy.calibrate import max_rounds
from reticent.privacy.client_level import (
    CLIP_RANGE,
    ClipRule,
    client_event,
    clipped,
    finite,
    is_within,
    noised_fraction,
    noised_sum,
    split_bit,
    sum_multiplier,
    with_bit,
)
from reticent.privacy.events import NonPrivate, gaussian
from reticent.privacy.randomness import SeededRandomness, SystemRandomness
from reticent.privacy.schedule import schedule_for

FLOAT32 = arrays.arrays(
    np.float32, st.integers(0, 40), elements=st.floats(width=32, allow_nan=True)
)
FLOAT64 = arrays.arrays(np.float64, st.integers(0, 40), elements=st.floats(allow_nan=True))
CLIPS = st.floats(1e-12, 1e12)


def exact_square(vector: np.ndarray) -> Fraction:
    """The squared norm in rational arithmetic: the second implementation."""
    return sum((Fraction(float(v)) ** 2 for v in vector), Fraction(0))


@settings(max_examples=200, deadline=None)
@given(st.one_of(FLOAT32, FLOAT64), CLIPS)
@example(np.full(40, np.finfo(np.float32).max, dtype=np.float32), 1.0)
@example(np.full(40, np.finfo(np.float64).max), 1e-12)
@example(np.full(40, 1e-45, dtype=np.float32), 1e-12)
@example(np.full(40, 5e-324), 1.0)
@example(np.zeros(3, dtype=np.float32), 0.5)
def test_the_norm_of_any_bounded_update_is_at_most_the_bound_exactly(
    vector: np.ndarray, clip: float
) -> None:
    bounded = clipped(vector, clip)
    assert bounded.dtype == np.float64 and bounded.shape == vector.shape
    assert np.isfinite(bounded).all()
    assert exact_square(bounded) <= Fraction(clip) ** 2


@settings(max_examples=100, deadline=None)
@given(FLOAT32, CLIPS)
def test_bounding_twice_is_bounding_once_and_keeps_what_is_within(
    vector: np.ndarray, clip: float
) -> None:
    bounded = clipped(vector, clip)
    np.testing.assert_allclose(clipped(bounded, clip), bounded, rtol=1e-12)
    if is_within(vector, clip):
        assert np.array_equal(bounded, vector.astype(np.float64))


@pytest.mark.parametrize("size", [1, 1000, 300_000])
def test_large_updates_keep_their_direction_and_almost_all_of_the_bound(size: int) -> None:
    vector = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    bounded = clipped(1e3 * vector, 0.7)
    # fsum rounds once: a sum of squares that does not share numpy's order of additions.
    norm = math.sqrt(math.fsum(v * v for v in bounded.tolist()))
    assert 0.7 * (1 - 1e-8) < norm <= 0.7
    np.testing.assert_allclose(bounded / norm, vector / np.linalg.norm(vector.astype(float)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_update_becomes_zeros(bad: float) -> None:
    vector = np.array([1.0, bad, 2.0], dtype=np.float32)
    assert np.array_equal(clipped(vector, 1.0), np.zeros(3))
    assert np.array_equal(finite(vector), np.zeros(3))
    assert is_within(finite(vector), 1e-9) and not is_within(vector, 1e9)


def test_a_zero_update_stays_zero() -> None:
    zero = np.zeros(5, dtype=np.float32)
    assert np.array_equal(clipped(zero, 0.5), zero) and is_within(zero, 0.5)


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan, math.inf])
def test_a_bound_that_bounds_nothing_is_refused(clip: float) -> None:
    with pytest.raises(PrivacyError, match="must be finite and > 0"):
        clipped(np.ones(2), clip)


def test_the_bit_travels_in_front_and_nothing_but_a_bit_is_taken() -> None:
    assert split_bit(with_bit(b"abc", True)) == (True, b"abc")
    assert split_bit(with_bit(b"", False)) == (False, b"")
    for bad in (b"", b"\x02abc", b"\xff"):
        with pytest.raises(PayloadError, match="bit"):
            split_bit(bad)


def accepts(draws: np.ndarray, scale: float) -> bool:
    """Whether draws look like N(0, scale^2): spread by chi-square, shape by Kolmogorov-Smirnov."""
    square = float(np.sum(np.square(draws / scale)))
    tail = stats.chi2(len(draws))
    spread = min(tail.cdf(square), tail.sf(square))
    return bool(spread > 1e-4 and stats.kstest(draws / scale, "norm").pvalue > 1e-4)


@pytest.mark.parametrize("source", [SeededRandomness(3), SystemRandomness()])
def test_the_noise_of_the_sum_has_its_scale_and_two_thirds_of_it_is_rejected(
    source: SeededRandomness | SystemRandomness,
) -> None:
    clip, multiplier = 0.3, 1.7
    draws = noised_sum(np.zeros(4000), clip, multiplier, source.stream("server", "sum", "r", 1))
    assert accepts(draws, clip * multiplier)
    assert not accepts(draws, clip * multiplier * 1.5)  # as if two thirds had been drawn
    assert not accepts(draws * 2 / 3, clip * multiplier)


def test_the_noise_of_the_count_has_its_scale_and_two_thirds_of_it_is_rejected() -> None:
    clients, noise = 200, 10.0
    streams = (SeededRandomness(1).stream("count", n) for n in range(2000))
    found = np.array([noised_fraction(130, 190, clients, noise, s) for s in streams])
    # 130 bits of +1/2, 60 of -1/2, and 10 clients that did not reply and count as zero.
    draws = (found - 0.5) * clients - (130 - 60) / 2
    assert accepts(draws, noise)
    assert not accepts(draws * 2 / 3, noise)


class Silent:
    """A stream of zeros, to see sums without noise."""

    def uniform(self, count: int) -> np.ndarray:
        return np.zeros(count)

    normal = uniform

    def bytes(self, count: int) -> bytes:
        return bytes(count)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 50), st.integers(0, 50), st.booleans())
def test_one_client_moves_the_count_by_one_half_at_most(inside: int, out: int, bit: bool) -> None:
    clients, replies = 100, inside + out
    without = noised_fraction(inside, replies, clients, 1.0, Silent())
    added = noised_fraction(inside + bit, replies + 1, clients, 1.0, Silent())
    other = noised_fraction(inside + (not bit), replies + 1, clients, 1.0, Silent())
    assert abs(added - without) * clients == pytest.approx(0.5)
    assert abs(added - other) * clients == pytest.approx(1.0)  # replaced by another


@pytest.mark.parametrize("relation", ["add-or-remove-one", "replace-one"])
@pytest.mark.parametrize(
    ("sigma", "clients", "rounds"), [(1.0, 50, 1), (0.6, 20, 8), (3.0, 40, 60)]
)
def test_sum_and_count_together_spend_what_one_gaussian_of_the_whole_noise_spends(
    relation: str, sigma: float, clients: int, rounds: int
) -> None:
    together = client_event(sigma, relation, clients / 20).times(rounds)
    alone = gaussian(sigma, rounds, relation, "client")
    for delta in (1e-3, 1e-6):
        expected = epsilon([alone], delta)
        assert epsilon([together], delta) == pytest.approx(expected, rel=2e-3)
        assert sum_multiplier(sigma, clients / 20) > sigma


def closed_form(multiplier: float, delta: float) -> float:
    """Epsilon of one Gaussian mechanism by bisection of Balle and Wang 2018, theorem 8."""

    def spent(eps: float) -> float:
        a, b = 1 / (2 * multiplier), eps * multiplier
        return float(stats.norm.cdf(a - b) - math.exp(eps) * stats.norm.cdf(-a - b))

    low, high = 0.0, 700.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > delta else (low, middle)
    return high


@pytest.mark.parametrize(("relation", "moves"), [("add-or-remove-one", 1), ("replace-one", 2)])
def test_a_round_spends_what_the_closed_form_of_the_gaussian_says(
    relation: str, moves: int
) -> None:
    for sigma, rounds in ((1.0, 1), (2.0, 10)):
        expected = closed_form(sigma / (moves * math.sqrt(rounds)), 1e-5)
        for count_noise in (None, 5.0):
            event = client_event(sigma, relation, count_noise).times(rounds)
            assert epsilon([event], 1e-5) == pytest.approx(expected, rel=2e-3)


def test_a_count_that_would_reveal_too_much_is_refused_with_what_to_change() -> None:
    with pytest.raises(PlanError, match="at least 21 clients_per_round"):
        sum_multiplier(2.0, 20 / 20)
    assert sum_multiplier(2.0, 21 / 20) > 2.0
    assert sum_multiplier(2.0, None) == 2.0


@pytest.mark.parametrize("tiny", [1e-160, 1e-200, 5e-324])
def test_hardly_any_noise_is_all_the_sums_and_too_much_is_refused(tiny: float) -> None:
    """An order may ask for any positive number; none may end in an arithmetic error."""
    assert sum_multiplier(tiny, 2.0) == tiny
    for huge in (1e200, 1.7e308):
        with pytest.raises(PlanError, match="clip_quantile"):
            sum_multiplier(huge, 2.0)


def settle(
    rule: ClipRule, norms: np.ndarray, rounds: int, clients: int, noise: float, seed: int
) -> list[float]:
    """The bounds of many rounds in which clients with random norms say whether they are within."""
    generator, source = np.random.default_rng(seed), SeededRandomness(seed)
    clip, bounds = rule.start, []
    for number in range(rounds):
        inside = int(np.sum(generator.choice(norms, clients) <= clip))
        stream = source.stream("count", number)
        clip = rule.next(clip, noised_fraction(inside, clients, clients, noise, stream))
        bounds.append(clip)
    return bounds


@pytest.mark.parametrize("start", [0.1, 1.0, 300.0])
@pytest.mark.parametrize("quantile", [0.3, 0.5, 0.9])
def test_the_bound_settles_at_the_quantile_from_below_and_from_above(
    start: float, quantile: float
) -> None:
    norms = np.exp(np.random.default_rng(0).normal(2.0, 0.5, 5000))  # median 7.4
    bounds = settle(ClipRule(start, quantile), norms, 400, 100, 5.0, seed=1)
    reached = float(np.mean(norms <= np.mean(bounds[-100:])))
    assert reached == pytest.approx(quantile, abs=0.06)


def test_a_bound_far_below_the_norms_rises_and_one_far_above_falls() -> None:
    ten = np.full(10, 10.0)
    rising = settle(ClipRule(1.0, 0.5), ten, 10, 100, 0.0, seed=0)
    falling = settle(ClipRule(50.0, 0.5), ten, 10, 100, 0.0, seed=0)
    assert np.all(np.diff([1.0, *rising]) > 0) and rising[-1] == pytest.approx(math.exp(1.0))
    assert np.all(np.diff([50.0, *falling]) < 0)


def test_the_bound_moves_as_in_the_paper_and_stays_in_its_public_range() -> None:
    rule = ClipRule(2.0, 0.75)
    assert rule.next(3.0, 0.5) == pytest.approx(3.0 * math.exp(0.2 * 0.25), rel=1e-12)
    assert rule.next(3.0, 0.75) == 3.0
    clip = 2.0
    for _ in range(200):
        clip = rule.next(clip, -1e300)
        assert rule.allows(clip)
    assert clip == 2.0 * CLIP_RANGE and not rule.allows(clip * 1.01)
    for _ in range(400):
        clip = rule.next(clip, 1e300)
        assert rule.allows(clip)
    assert clip == 2.0 / CLIP_RANGE and not rule.allows(clip * 0.99)


def test_a_fixed_bound_is_the_plans_and_nothing_else() -> None:
    rule = ClipRule(2.0)
    assert rule.next(2.0, 0.0) == 2.0
    assert rule.allows(2.0) and not rule.allows(math.nextafter(2.0, 3.0))


CLIENT = ["privacy.unit=client", "federation.steps_per_round=5"]


def test_a_client_level_schedule_counts_rounds_and_not_local_steps() -> None:
    plan = parse_plan("", [*CLIENT, "federation.sampling_rate=0.3"])
    schedule = schedule_for(plan)
    assert schedule is not None
    event = gaussian(schedule.noise_multiplier, unit="client")
    assert schedule.round_event() == event
    assert isinstance(schedule.server_event(), NonPrivate)
    whole = schedule.over(schedule.round_event(), schedule.participations)
    assert 7.9 < epsilon([whole], schedule.delta) <= 8.0
    assert schedule.share_multiplier == 0


def test_an_adaptive_schedule_is_calibrated_for_sum_and_count_together() -> None:
    fixed = schedule_for(parse_plan("", CLIENT))
    adaptive = schedule_for(parse_plan("", [*CLIENT, "privacy.clip_quantile=0.5"]))
    assert fixed is not None and adaptive is not None
    assert adaptive.noise_multiplier == pytest.approx(fixed.noise_multiplier, rel=1e-3)
    assert adaptive.sum_multiplier > fixed.sum_multiplier == fixed.noise_multiplier
    whole = adaptive.over(adaptive.round_event(), adaptive.participations)
    assert 7.9 < epsilon([whole], adaptive.delta) <= 8.0
    # A device that stops exactly at the target can take part in every round of the plan.
    assert max_rounds(8.0, adaptive.delta, adaptive.round_event()) >= adaptive.participations


@pytest.mark.parametrize("unit", ["example", "client"])
def test_replace_one_needs_twice_the_noise_or_nearly(unit: str) -> None:
    given = [f"privacy.unit={unit}", "federation.sampling_rate=1.0"]
    one = schedule_for(parse_plan("", given))
    two = schedule_for(parse_plan("", [*given, "privacy.relation=replace-one"]))
    assert one is not None and two is not None
    assert two.noise_multiplier == pytest.approx(2 * one.noise_multiplier, rel=5e-3)


def test_a_plan_whose_count_reveals_too_much_is_refused() -> None:
    small = [*CLIENT, "privacy.clip_quantile=0.5", "federation.clients_per_round=10"]
    with pytest.raises(PlanError, match=r"clip_quantile.*clients_per_round / 20 = 0\.5"):
        schedule_for(parse_plan("", small))
