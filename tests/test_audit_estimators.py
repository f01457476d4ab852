"""Audit estimators: they hold at the stated confidence, say something, and agree with others.

Reference values were computed by running ``jax_privacy.auditing`` 2.0.0 (Google DeepMind, Apache
2.0) on the same counts. It needs JAX to be imported, so it is not a dependency.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from dp_accounting import get_sigma_gaussian
from numpy.typing import NDArray
from scipy import stats

from reticent.core.errors import PrivacyError
from reticent.privacy.accounting import epsilon
from reticent.privacy.audit import (
    CanaryGame,
    Errors,
    Guesses,
    TradeOff,
    accuracy_interval,
    any_rejects,
    check_randomness,
    choose_shares,
    clopper_pearson,
    detectors,
    errors_epsilon,
    errors_reject,
    family_bound,
    fdp_rejects,
    gaussian_fit_epsilon,
    guess,
    likelihood_scores,
    one_run_epsilon,
    one_run_p_value,
    trade_off,
    two_population_epsilon,
)
from reticent.privacy.events import Composed, NonPrivate, PoissonGaussian, gaussian

Floats = NDArray[np.float64]

# canaries, guesses, right, confidence, delta, one-run bound, f-DP bound of the Gaussian
ONE_RUN = (
    (1000, 100, 95, 0.99, 1e-05, 1.917159, 2.709681),
    (1000, 1000, 700, 0.99, 1e-05, 0.684955, 1.075945),
    (500, 50, 50, 0.99, 1e-05, 2.305074, 3.428131),
    (200, 40, 38, 0.95, 1e-06, 1.741, 3.373586),
    (1000, 200, 150, 0.99, 1e-05, 0.711297, 1.015612),
    (100, 100, 52, 0.99, 1e-05, 0.0, 0.0),
    (5000, 500, 460, 0.99, 1e-07, 2.063361, 3.296918),
    (2000, 2000, 1999, 0.99, 0.001, 1.523153, 7.41809),
    (300, 30, 30, 0.999, 0.01, 0.0, 0.798764),
)
# included, missed, left out, false, confidence, delta, Clopper-Pearson bound of either direction
FIXED = (
    (500, 100, 500, 20, 0.99, 1e-05, 2.396048),
    (500, 5, 480, 200, 0.99, 1e-05, 2.927257),
    (1000, 0, 1000, 0, 0.99, 1e-05, 5.237706),
    (100, 50, 100, 50, 0.95, 1e-05, 0.0),
    (250, 200, 300, 1, 0.95, 1e-2, 2.04347),
)
DELTA = 1e-5
# Rejections of a true claim in so many trials at 1 %: a hundred thousandth of the time it is more.
TRIALS, MOST = 250, int(stats.binom.isf(1e-5, 250, 0.01))
GAMES = {
    "gaussian": CanaryGame(1.0, 1.5, 1, 1),
    "sampled": CanaryGame(0.5, 1.0, 1, 6),
    "steps": CanaryGame(0.5, 1.5, 4, 2),
    "replaced": CanaryGame(0.5, 2.0, 1, 6, left_out=-1.0),
}


def events_of(game: CanaryGame) -> list[PoissonGaussian]:
    relation = "replace-one" if game.left_out else "add-or-remove-one"
    steps = game.rounds * game.steps
    return [PoissonGaussian(game.sampling_rate, game.noise_multiplier, steps, relation)]


def play(
    game: CanaryGame, trials: int, canaries: int, noise: float = 1.0
) -> tuple[Floats, NDArray[np.bool_]]:
    """Return exact projections ``(rounds, trials, canaries)`` and coins; ``noise`` scales noise."""
    generator = np.random.default_rng(7)
    coins = generator.random((trials, canaries)) < 0.5
    shape = (game.rounds, trials, canaries)
    taken = generator.binomial(game.steps, game.sampling_rate, size=shape)
    scale = noise * game.noise_multiplier * game.steps**0.5
    normal = scale * generator.standard_normal(shape)
    return taken * np.where(coins, 1.0, game.left_out) + normal, coins


@pytest.mark.parametrize("row", ONE_RUN)
def test_the_one_run_bound_is_that_of_jax_privacy(row: tuple[float, ...]) -> None:
    m, made, right, confidence, delta, expected, _ = row
    guesses = Guesses(int(m), int(made), int(right))
    assert one_run_epsilon(guesses, delta, confidence) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("row", ONE_RUN)
def test_the_fdp_test_of_gaussians_turns_where_that_of_jax_privacy_does(
    row: tuple[float, ...],
) -> None:
    m, made, right, confidence, delta, _, expected = row
    guesses = Guesses(int(m), int(made), int(right))

    def rejects(at: float) -> bool:
        claim = trade_off([gaussian(float(get_sigma_gaussian(at, delta)))])
        return fdp_rejects(guesses, claim, confidence)

    assert not rejects(max(expected, 0.1) * 1.01)
    assert not expected or rejects(expected * 0.99)


@pytest.mark.parametrize("row", FIXED)
def test_the_bound_of_a_fixed_threshold_is_that_of_jax_privacy(row: tuple[float, ...]) -> None:
    *counts, confidence, delta, expected = row
    errors = Errors(*(int(count) for count in counts))
    assert errors_epsilon(errors, delta, confidence) == pytest.approx(expected, abs=2e-6)


def test_the_exact_interval_is_that_of_scipy() -> None:
    for count, trials in ((0, 10), (3, 10), (10, 10), (700, 1000)):
        ours = clopper_pearson(count, trials, 0.99)
        theirs = stats.binomtest(count, trials).proportion_ci(0.99, method="exact")
        assert ours == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert accuracy_interval(Guesses(10, 0, 0)) == (0.0, 1.0)


@pytest.mark.parametrize("name", GAMES)
def test_a_true_claim_is_rejected_by_errors_in_at_most_the_stated_share_of_trials(
    name: str,
) -> None:
    game = GAMES[name]
    m = 600
    both = detectors(game, m, events_of(game), 0)

    def share(noise: float, against: TradeOff, trials: int) -> float:
        projections, coins = play(game, trials, m, noise)
        found = [
            tuple(detector.errors(projections[:, i], coins[i]) for detector in both)
            for i in range(trials)
        ]
        return float(np.mean([any_rejects(errors, against) for errors in found]))

    claim, weaker = trade_off(events_of(game)), trade_off(events_of(game), 5.0)
    assert share(1.0, claim, TRIALS) <= MOST / TRIALS
    # It must say something: a claim of five times the noise is refuted, and so is the true claim by
    # two fifths of the noise.
    assert share(1.0, weaker, 60) > 0.9
    assert share(0.4, claim, 60) > 0.9


@pytest.mark.parametrize("name", GAMES)
def test_a_true_claim_is_rejected_in_one_run_in_at_most_the_stated_share_of_trials(
    name: str,
) -> None:
    game, m, trials = GAMES[name], 600, 150
    top, bottom = (int(share * m) for share in choose_shares(game, m, 0))
    claim = trade_off(events_of(game))
    true = epsilon(events_of(game), DELTA)

    projections, coins = play(game, trials, m)
    found = [
        guess(likelihood_scores(projections[:, i], game), coins[i], top, bottom)
        for i in range(trials)
    ]

    def share(against: TradeOff) -> int:
        rejected = {g: fdp_rejects(g, against) for g in set(found)}
        return sum(rejected[g] for g in found)

    assert share(claim) <= stats.binom.isf(1e-5, trials, 0.01)
    assert share(trade_off(events_of(game), 6.0)) > 0.9 * trials
    bounds = [one_run_epsilon(g, DELTA) for g in found]
    assert max(bounds) <= true and np.median(bounds) > 0.1 * true


def test_the_one_run_p_value_is_exact_for_randomised_response() -> None:
    made, true = 400, 1.0
    chance = float(np.exp(true) / (1 + np.exp(true)))
    right = np.random.default_rng(3).binomial(made, chance, size=20_000)
    p = {k: one_run_p_value(Guesses(made, made, int(k)), true, 1e-12) for k in set(right.tolist())}
    rejected = np.mean([p[k] <= 0.01 for k in right.tolist()])
    assert 0.005 < rejected <= 0.0125
    bounds = [one_run_epsilon(Guesses(made, made, int(k)), 1e-12) for k in right[:50]]
    assert np.median(bounds) > 0.6 * true


def test_choosing_the_threshold_on_the_same_scores_would_break_the_confidence() -> None:
    """The naive way is kept so that it is seen to fail; the hold-out split holds."""
    trials, n, confidence, delta = 100, 400, 0.8, 1e-6
    generator = np.random.default_rng(5)
    coins = np.arange(2 * n) < n

    def naive(inside: Floats, outside: Floats) -> float:
        scores = np.concatenate([inside, outside])
        found = (Errors.at(s * scores, coins, t) for s in (1, -1) for t in s * scores[::20])
        return max(errors_epsilon(e, delta, confidence) for e in found)

    # The two populations are one: epsilon is 0, and every larger bound is wrong.
    pairs = [(generator.standard_normal(n), generator.standard_normal(n)) for _ in range(trials)]
    wrong = sum(naive(a, b) > 0 for a, b in pairs)
    split = (two_population_epsilon(a, b, delta, generator, confidence) for a, b in pairs)
    held = sum(bound > 0 for bound in split)
    limit = stats.binom.isf(1e-3, trials, 1 - confidence)
    assert held <= limit < wrong


def test_two_populations_far_apart_show_what_their_numbers_allow() -> None:
    generator = np.random.default_rng(0)
    far = 5.0 + generator.standard_normal(2000), generator.standard_normal(2000)
    assert 4.5 < two_population_epsilon(*far, 1e-5, generator) < 5.3
    same = generator.standard_normal(500), generator.standard_normal(500)
    assert two_population_epsilon(*same, 1e-5, generator) < 0.3


@pytest.mark.parametrize("relation", ["add-or-remove-one", "replace-one"])
def test_the_trade_off_of_gaussians_is_the_textbook_one(relation: str) -> None:
    steps, sigma = 4, 3.0
    event = PoissonGaussian(1.0, sigma, steps, relation)
    mu = steps**0.5 / sigma * (2 if relation == "replace-one" else 1)
    f = trade_off([Composed((event,))])
    for x in (1e-4, 0.01, 0.2, 0.5, 0.9):
        exact = stats.norm.cdf(stats.norm.isf(x) - mu)
        assert f(x) <= exact + 1e-12
        assert f(x) == pytest.approx(exact, abs=3e-4)
        assert f.blow_up_inverse(1 - x) == pytest.approx(f(x), abs=1e-12)


def test_a_family_bound_is_above_the_claim_exactly_when_the_claim_is_rejected() -> None:
    events = [gaussian(1.0)]
    claimed, rejected = epsilon(events, DELTA), {}
    for missed in (100, 150, 200, 240):
        errors = Errors(250, missed, 250, 20)
        bound = family_bound(partial(errors_reject, errors), events, DELTA)
        rejected[missed] = errors_reject(errors, trade_off(events))
        assert (bound.epsilon >= claimed * (1 - 1e-6)) == rejected[missed]
    assert rejected[100] and not rejected[240]


def test_few_canaries_show_something_of_a_very_large_claim() -> None:
    # 16 times the noise still has a far larger epsilon than 300 canaries can show.
    perfect = Errors(150, 0, 150, 0)
    claim = [PoissonGaussian(1.0, 0.02, 3, unit="client")]
    found = family_bound(lambda f: errors_reject(perfect, f), claim, 1e-5)
    shown = errors_epsilon(perfect, 1e-5)
    assert 3 < shown < found.epsilon < 100
    assert found.noise > 16


def test_no_errors_at_all_give_a_large_bound_and_chance_gives_none() -> None:
    events = [gaussian(1.0)]
    perfect = family_bound(partial(errors_reject, Errors(300, 0, 300, 0)), events, DELTA)
    assert perfect.epsilon > 10 and perfect.noise < 0.4
    chance = family_bound(partial(errors_reject, Errors(900, 450, 900, 450)), events, DELTA)
    assert chance.epsilon == 0.0


def test_likelihood_scores_of_full_batches_are_linear_in_the_sum() -> None:
    game = CanaryGame(1.0, 2.0, 1, 3)
    x = np.random.default_rng(0).standard_normal((3, 50))
    assert np.allclose(likelihood_scores(x, game), (x.sum(axis=0) - 1.5) / 4.0)


def test_the_gaussian_fit_estimates_and_does_not_bound() -> None:
    generator, mu = np.random.default_rng(1), 1.0
    true = epsilon([gaussian(1 / mu)], DELTA)
    many = gaussian_fit_epsilon(mu + generator.standard_normal(400_000), 1.0, DELTA)
    assert many == pytest.approx(true, rel=0.03)
    few = [gaussian_fit_epsilon(mu + generator.standard_normal(200), 1.0, DELTA) for _ in range(60)]
    # Above the truth about as often as not: nothing may be decided on it.
    assert 15 < sum(value > true for value in few) < 55
    assert gaussian_fit_epsilon(generator.standard_normal(100_000), 1.0, 0.1) == 0.0


def noise_of(count: int, width: int, seed: int) -> Floats:
    return np.random.default_rng(seed).standard_normal((count, width))


def test_independent_noise_passes_in_at_least_the_stated_share_of_trials() -> None:
    passed = [check_randomness(noise_of(20, 60, seed), 1.0).passed for seed in range(300)]
    assert passed.count(False) <= stats.binom.isf(1e-5, 300, 0.01)


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        (lambda x: x * 2 / 3, "variance"),
        (lambda x: x * 1.5, "variance"),
        (lambda x: np.vstack([x[:-1], x[:1]]), "correlation"),
        (lambda x: np.vstack([x[:-1], -x[:1]]), "correlation"),
        (lambda x: np.vstack([x[:-1], (x[:1] + x[1:2]) / 2**0.5]), "correlation"),
        (lambda x: np.vstack([x[:-1], 0 * x[:1]]), "correlation"),
    ],
)
def test_noise_that_is_scaled_shared_or_missing_fails(
    fault: Callable[[Floats], Floats], seen: str
) -> None:
    sound, check = noise_of(600, 200, 0), check_randomness(fault(noise_of(600, 200, 0)), 1.0)
    assert check_randomness(sound, 1.0).passed and not check.passed
    assert check.pairs == 600 * 599 // 2
    assert check.largest_correlation is not None and check.limit is not None
    assert check.variance_ratio is not None and check.variance_interval is not None
    low, high = check.variance_interval
    if seen == "variance":
        assert check.largest_correlation <= check.limit
        assert not low <= check.variance_ratio <= high
    else:
        assert check.largest_correlation > check.limit


def test_the_largest_correlation_is_that_of_plain_arithmetic() -> None:
    noise = noise_of(700, 40, 2)
    unit = noise / np.linalg.norm(noise, axis=1, keepdims=True)
    plain = np.abs(np.triu(unit @ unit.T, k=1)).max()
    check = check_randomness(noise, None)
    assert check.largest_correlation == pytest.approx(float(plain), abs=1e-6)
    assert check.variance_ratio is None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Guesses(10, 11, 0), "11 made on 10"),
        (lambda: Guesses(10, 5, 6), "must be 0 <= right <= made"),
        (lambda: guess(np.zeros(3), np.zeros(4, dtype=bool), 1, 0), "scores have shape"),
        (lambda: guess(np.array([np.nan]), np.zeros(1, dtype=bool), 1, 0), "without NaN"),
        (lambda: guess(np.zeros(3), np.zeros(3, dtype=bool), 2, 2), "at most 3"),
        (lambda: clopper_pearson(3, 2), "3 of 2"),
        (lambda: clopper_pearson(1, 2, 1.0), "confidence=1.0"),
        (lambda: one_run_epsilon(Guesses(2, 1, 1), 0.0), "delta=0.0"),
        (lambda: trade_off([NonPrivate()]), "that all have noise"),
        (lambda: trade_off([]), "at least one"),
        (lambda: trade_off([gaussian(1.0)], 0.0), "noise=0.0"),
        (lambda: likelihood_scores(np.zeros(3), GAMES["gaussian"]), "rounds, canaries"),
        (lambda: check_randomness(np.zeros((2, 2)), 1.0), "shape"),
        (lambda: gaussian_fit_epsilon(np.ones(5), 1.0, 0.1), "varying"),
        (
            lambda: two_population_epsilon(np.ones(1), np.ones(2), 0.1, np.random.default_rng(0)),
            "inside scores",
        ),
    ],
)
def test_what_cannot_be_counted_is_refused_in_words(call: Callable[[], object], words: str) -> None:
    with pytest.raises(PrivacyError, match=words):
        call()
