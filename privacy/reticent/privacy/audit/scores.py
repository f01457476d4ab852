"""Scores of canaries, and how many of them to guess about."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from reticent.core.errors import PrivacyError

from ..events import Event
from .counts import CONFIDENCE, Coins, Guesses, clopper_pearson, guess
from .family import Family
from .tradeoff import TradeOff
from .two_populations import Errors, errors_reject

Floats = NDArray[np.float64]

_ONE_SIDE = tuple((share, 0.0) for share in (0.02, 0.05, 0.1, 0.2, 0.35))
_BOTH_SIDES = tuple((share, share) for share in (0.05, 0.1, 0.15, 0.25, 0.5))
_SHARES = (*_ONE_SIDE, *_BOTH_SIDES)
# From the middle outwards: the first give a bound that most of the others need not beat.
_QUANTILES = (0.5, 0.6, 0.4, 0.7, 0.8, 0.3, 0.85, 0.2, 0.9, 0.93, 0.1, 0.96, 0.05, 0.98, 0.02)
_SIMULATED = 20_000


@dataclass(frozen=True)
class CanaryGame:
    """How an included canary shows in the released sums, if the claim is true.

    Attributes:
        sampling_rate: Probability at which an included canary joins a step.
        noise_multiplier: Noise of a step's sum along a canary, over the clip.
        steps: Steps whose noised sums are released together as one round's sum.
        rounds: Rounds.
        left_out: Part of a canary's direction that is in the sums when its coin says "left out": 0
            under add-or-remove-one; -1 under replace-one, where its opposite takes its place.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int
    rounds: int
    left_out: float = 0.0


def likelihood_scores(projections: Floats, game: CanaryGame) -> Floats:
    """Return each canary's log-likelihood ratio of "included" against "left out".

    The most powerful score there is if the claim is true (Neyman and Pearson 1933); a function of
    released sums only, so that the guarantee of a guess never depends on it.

    Args:
        projections: float64 ``(rounds, m)``: released sums along each canary's unit direction,
            over the clip.
        game: The claim.

    Returns:
        float64 ``(m,)``.
    """
    if projections.ndim != 2:
        raise PrivacyError(
            f"projections have shape {projections.shape}: must be (rounds, canaries)"
        )
    total = np.zeros(projections.shape[1], dtype=np.float64)
    for sums in projections:
        total += _log_likelihood(sums, game, 1.0) - _log_likelihood(sums, game, game.left_out)
    return total


def _log_likelihood(x: Floats, game: CanaryGame, part: float) -> Floats:
    """Return log E over K ~ Bin(steps, q) of exp(-(x - part K)^2 / 2v), up to a constant."""
    variance = game.steps * game.noise_multiplier**2
    if part == 0:
        return -(x**2) / (2 * variance)
    counts = np.arange(game.steps + 1)
    weights = stats.binom.logpmf(counts, game.steps, game.sampling_rate)
    terms = weights - (x[..., None] - part * counts) ** 2 / (2 * variance)
    return np.asarray(special.logsumexp(terms, axis=-1))


@dataclass(frozen=True)
class Detector:
    """A score and the threshold from which to guess "included"; both fixed before the data are."""

    game: CanaryGame
    threshold: float

    def errors(self, projections: Floats, coins: Coins) -> Errors:
        """Return the errors on audited projections, ``(rounds, m)``, and coins ``(m,)``."""
        return Errors.at(likelihood_scores(projections, self.game), coins, self.threshold)


def detectors(
    game: CanaryGame, canaries: int, events: Iterable[Event], seed: int
) -> tuple[Detector, Detector]:
    """Return two attackers: the best one if the claim is true, and one made for half the noise.

    The first gives the larger bound when all is well. The second sees a mechanism with far too
    little noise, which the first mistakes for bad luck where sampling is rare.
    """
    claim = tuple(events)
    quiet = replace(game, noise_multiplier=game.noise_multiplier / 2)
    first, second = (Detector(g, choose_threshold(g, canaries, claim, seed)) for g in (game, quiet))
    return first, second


def any_rejects(found: Iterable[Errors], claim: TradeOff, confidence: float = CONFIDENCE) -> bool:
    """Return whether one of several attackers contradicts the claim.

    Guarantee: as :func:`errors_reject`, with the doubt divided among them (Bonferroni), so that a
    true claim is rejected with probability at most ``1 - confidence``.
    """
    each = list(found)
    doubt = (1 - confidence) / max(1, len(each))
    return any(errors_reject(errors, claim, 1 - doubt) for errors in each)


def choose_threshold(game: CanaryGame, canaries: int, events: Iterable[Event], seed: int) -> float:
    """Return the score from which to guess "included".

    Chosen on *simulated* scores of ``game``, never on the audited ones, so that the choice needs no
    correction: it is fixed before the data are seen. The best threshold is the one whose expected
    errors give the largest :func:`.family.family_bound` for the claimed ``events``.
    """
    scores, coins = _simulated(game, seed)
    part = canaries / len(scores)
    family, best, lowest = Family(events), 0.0, None
    for threshold in np.quantile(scores, _QUANTILES).tolist():
        e = Errors.at(scores, coins, threshold)
        expected = Errors(*(round(part * n) for n in astuple(e)))
        rejects = partial(errors_reject, expected)
        step = family.least_rejected(rejects, *(() if lowest is None else (lowest,)))
        if step is not None:
            best, lowest = threshold, step
    return best


def choose_shares(game: CanaryGame, canaries: int, seed: int) -> tuple[float, float]:
    """Return which shares of the canaries to guess about when abstaining: top and bottom.

    Chosen on simulated scores as in :func:`choose_threshold`: the pair whose expected number of
    right guesses shows the largest log odds at 99 %.
    """
    scores, coins = _simulated(game, seed)
    values = [_worth(_expected(scores, coins, pair, canaries)) for pair in _SHARES]
    return _SHARES[int(np.argmax(values))]


def _simulated(game: CanaryGame, seed: int) -> tuple[Floats, Coins]:
    generator = np.random.default_rng(seed)
    coins = generator.random(_SIMULATED) < 0.5
    shape = (game.rounds, len(coins))
    taken = generator.binomial(game.steps, game.sampling_rate, size=shape)
    noise = generator.standard_normal(shape) * game.noise_multiplier * game.steps**0.5
    return likelihood_scores(taken * np.where(coins, 1.0, game.left_out) + noise, game), coins


def _expected(scores: Floats, coins: Coins, shares: tuple[float, float], canaries: int) -> Guesses:
    many = guess(scores, coins, *(int(s * len(scores)) for s in shares))
    made = sum(int(s * canaries) for s in shares)
    return Guesses(canaries, made, round(many.right / many.made * made))


def _worth(guesses: Guesses) -> float:
    if not guesses.right:
        return -np.inf
    low = clopper_pearson(guesses.right, guesses.made, CONFIDENCE)[0]
    return float(special.logit(low))
