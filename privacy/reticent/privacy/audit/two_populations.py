"""Tests and bounds from independent scores of included and left-out canaries."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from reticent.core.errors import PrivacyError

from ..accounting import require_delta
from .counts import CONFIDENCE, Coins, clopper_pearson, require_confidence
from .tradeoff import TradeOff

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Errors:
    """Errors of a fixed threshold.

    Attributes:
        included: Canaries that were included.
        missed: Those of them that were guessed to be left out.
        left_out: Canaries that were left out.
        false: Those of them that were guessed to be included.
    """

    included: int
    missed: int
    left_out: int
    false: int

    @staticmethod
    def at(scores: Floats, coins: Coins, threshold: float) -> Errors:
        """Guess "included" for scores of at least ``threshold``; NaN counts as left out."""
        guessed = scores >= threshold
        return Errors(
            int(coins.sum()),
            int((coins & ~guessed).sum()),
            int((~coins).sum()),
            int((~coins & guessed).sum()),
        )

    @property
    def right(self) -> int:
        """Right guesses."""
        return self.included + self.left_out - self.missed - self.false

    def bounds(self, confidence: float) -> tuple[float, float]:
        """Return upper bounds of false alarms and misses that hold together with ``confidence``."""
        # A two-sided interval spends half of its doubt on its upper end; so does each bound.
        pairs = ((self.false, self.left_out), (self.missed, self.included))
        false, missed = (clopper_pearson(c, n, confidence)[1] if n else 1.0 for c, n in pairs)
        return false, missed


def errors_reject(errors: Errors, claim: TradeOff, confidence: float = CONFIDENCE) -> bool:
    """Return whether the errors of a threshold contradict the claim.

    Guarantee: if the mechanism is f-DP for the claimed f, the scores of the canaries are
    independent of each other given their coins, and the threshold was fixed beforehand, this
    rejects with probability at most ``1 - confidence``: no attacker's two errors lie below f
    (Dong, Roth and Su 2022), and both are below their bounds (Clopper and Pearson, each at half
    of the doubt). Under a claim of independent noise on orthogonal canaries the independence is
    part of the claim; where the scores may depend on each other use :func:`.fdp.fdp_rejects`.
    After Nasr, Hayes, Steinke, Balle, Tramer, Jagielski, Carlini and Terzis 2023, "Tight auditing
    of differentially private machine learning", section 4.
    """
    false, missed = errors.bounds(confidence)
    return missed < claim(false)


def errors_epsilon(errors: Errors, delta: float, confidence: float = CONFIDENCE) -> float:
    """Return a lower bound on epsilon at ``delta`` from the errors of a fixed threshold.

    Holds with ``confidence`` for independent scores and any mechanism: the larger of
    log((1 - misses - delta) / false alarms) and the same with the two exchanged, at their upper
    bounds (Jagielski, Ullman and Oprea 2020, theorem 1; Nasr et al. 2021, section 4); 0 if both
    are below.
    """
    require_delta(delta)
    false, missed = (np.array([bound]) for bound in errors.bounds(confidence))
    return max(0.0, float(_worth(false, missed, delta)[0]))


def two_population_epsilon(
    inside: Floats,
    outside: Floats,
    delta: float,
    generator: np.random.Generator,
    confidence: float = CONFIDENCE,
) -> float:
    """Return a lower bound on epsilon at ``delta`` that holds with ``confidence``.

    Guarantee: if the scores are independent draws of an (epsilon, delta)-private mechanism's
    output on two neighbouring data sets, the bound exceeds epsilon with probability at most
    ``1 - confidence``. Threshold and direction are chosen on one random half of the scores, and
    :func:`errors_epsilon` bounds the errors on the other half. Choosing them on the same scores
    would need a correction and is not done. Nothing is assumed about the mechanism, so the bound is
    far below the truth where delta is small.

    Args:
        inside: ``(n,)`` scores where the canary was included, n >= 2.
        outside: ``(k,)`` scores where it was left out, k >= 2.
        delta: In (0, 1).
        generator: Splits the scores.
        confidence: In (0, 1).

    Raises:
        PrivacyError: If a population has fewer than two scores or one is NaN.
    """
    require_delta(delta)
    require_confidence(confidence)
    for name, scores in (("inside", inside), ("outside", outside)):
        if scores.ndim != 1 or len(scores) < 2 or np.isnan(scores).any():
            raise PrivacyError(
                f"{name} scores have shape {scores.shape}: must be (n,), n >= 2, without NaN"
            )
    first, second = (_halves(s, generator) for s in (inside, outside))
    threshold, sign = _choice(first[0], second[0], delta, confidence)
    scores = sign * np.concatenate([first[1], second[1]])
    coins = np.arange(len(scores)) < len(first[1])
    return errors_epsilon(Errors.at(scores, coins, threshold), delta, confidence)


def _halves(scores: Floats, generator: np.random.Generator) -> tuple[Floats, Floats]:
    mixed = generator.permutation(scores)
    cut = len(mixed) // 2
    return mixed[:cut], mixed[cut:]


def _choice(
    inside: Floats, outside: Floats, delta: float, confidence: float
) -> tuple[float, float]:
    best = (-math.inf, 0.0, 1.0)
    for sign in (1.0, -1.0):
        thresholds = np.unique(np.concatenate([sign * inside, sign * outside]))
        values = _bounds(sign * inside, sign * outside, thresholds, delta, confidence)
        index = int(np.argmax(values))
        best = max(best, (float(values[index]), float(thresholds[index]), sign))
    return best[1], best[2]


def _bounds(
    inside: Floats, outside: Floats, thresholds: Floats, delta: float, confidence: float
) -> Floats:
    """Return the bound of :func:`errors_epsilon` at each threshold, possibly below 0."""
    missed = np.searchsorted(np.sort(inside), thresholds, side="left")
    false = len(outside) - np.searchsorted(np.sort(outside), thresholds, side="left")
    tail = (1 - confidence) / 2
    return _worth(_upper(false, len(outside), tail), _upper(missed, len(inside), tail), delta)


def _worth(false: Floats, missed: Floats, delta: float) -> Floats:
    return np.maximum(_ratio(1 - missed - delta, false), _ratio(1 - false - delta, missed))


def _ratio(top: Floats, bottom: Floats) -> Floats:
    return np.where(top > 0, np.log(np.maximum(top, 1e-300)) - np.log(bottom), -np.inf)


def _upper(count: NDArray[np.int64], trials: int, tail: float) -> Floats:
    bound = stats.beta.ppf(1 - tail, count + 1, np.maximum(trials - count, 1))
    return np.where(count < trials, bound, 1.0)
