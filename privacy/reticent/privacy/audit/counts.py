"""Guesses about which canaries were included, and exact intervals for what was counted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from reticent.core.errors import PrivacyError

CONFIDENCE = 0.99
"""Confidence at which an audit decides; point estimates never do."""

Floats = NDArray[np.float64]
Coins = NDArray[np.bool_]


@dataclass(frozen=True)
class Guesses:
    """What an attacker guessed about ``canaries`` fair coins, abstaining on the rest.

    Attributes:
        canaries: Coins that were thrown, each by itself and with probability 1/2.
        made: Coins that were guessed; fixed before the audited data were seen.
        right: Guesses that were right.

    Raises:
        PrivacyError: Unless 0 <= right <= made <= canaries and canaries >= 1.
    """

    canaries: int
    made: int
    right: int

    def __post_init__(self) -> None:
        """Check the counts."""
        if not (0 <= self.right <= self.made <= self.canaries and self.canaries >= 1):
            raise PrivacyError(
                f"guesses: {self.right} right of {self.made} made on {self.canaries} canaries: "
                "must be 0 <= right <= made <= canaries, and at least 1 canary"
            )


def guess(scores: Floats, included: Coins, top: int, bottom: int) -> Guesses:
    """Guess "included" for the ``top`` largest scores and "left out" for the ``bottom`` smallest.

    This is the attack of Steinke, Nasr and Jagielski 2023 (algorithm 1, lines 9-10). The number of
    guesses does not depend on the scores, which their theorem asks for; ``top`` and ``bottom``
    must not be chosen on these scores.

    Args:
        scores: ``(m,)``, larger for canaries that look included; NaN is refused.
        included: The coins, bool ``(m,)``.
        top: Number of guesses "included".
        bottom: Number of guesses "left out".

    Raises:
        PrivacyError: If the shapes disagree, a score is NaN or there are not that many canaries.
    """
    if scores.ndim != 1 or scores.shape != included.shape or np.isnan(scores).any():
        raise PrivacyError(
            f"scores have shape {scores.shape} and coins {included.shape}: must be equal, of one "
            "dimension and without NaN"
        )
    if top < 0 or bottom < 0 or top + bottom > len(scores):
        raise PrivacyError(
            f"{top} guesses at the top and {bottom} at the bottom: must be >= 0 and together at "
            f"most {len(scores)}, the number of canaries"
        )
    order = np.argsort(scores, kind="stable")
    right = int(included[order[len(scores) - top :]].sum())
    right += int((~included[order[:bottom]]).sum())
    return Guesses(len(scores), top + bottom, right)


def clopper_pearson(count: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the exact two-sided interval for a binomial probability (Clopper and Pearson 1934).

    Guarantee: for every true probability it is inside with at least ``confidence``, and outside on
    either side with at most half of the rest.

    >>> clopper_pearson(0, 10, 0.95)[1] < 0.309
    True

    Raises:
        PrivacyError: Unless 0 <= count <= trials, trials >= 1 and 0 < confidence < 1.
    """
    require_confidence(confidence)
    if not 0 <= count <= trials or trials < 1:
        raise PrivacyError(f"{count} of {trials}: must be 0 <= count <= trials, trials >= 1")
    tail = (1 - confidence) / 2
    low = stats.beta.ppf(tail, count, trials - count + 1) if count else 0.0
    high = stats.beta.ppf(1 - tail, count + 1, trials - count) if count < trials else 1.0
    return float(low), float(high)


def accuracy_interval(guesses: Guesses, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the :func:`clopper_pearson` interval of the share of right guesses."""
    if not guesses.made:
        return 0.0, 1.0
    return clopper_pearson(guesses.right, guesses.made, confidence)


def require_confidence(confidence: float) -> None:
    """Raise :class:`PrivacyError` unless ``confidence`` lies in (0, 1)."""
    if not 0 < confidence < 1:
        raise PrivacyError(f"confidence={confidence!r}: must be > 0 and < 1")
