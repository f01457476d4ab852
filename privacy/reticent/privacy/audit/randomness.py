"""Direct tests of released noise, for faults that no canary can see."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from reticent.core.errors import PrivacyError

from .counts import CONFIDENCE, require_confidence

_BLOCK = 512


@dataclass(frozen=True)
class RandomnessCheck:
    """What was found in released noise.

    Attributes:
        pairs: Pairs of releases that were compared.
        largest_correlation: Largest magnitude of a correlation; None without a pair.
        limit: What chance allows for it.
        variance_ratio: Mean square over what it should be; None when that is not known.
        variance_interval: What chance allows for it.
    """

    pairs: int
    largest_correlation: float | None
    limit: float | None
    variance_ratio: float | None
    variance_interval: tuple[float, float] | None

    @property
    def tested(self) -> bool:
        """Whether there was anything to test."""
        return self.largest_correlation is not None or self.variance_ratio is not None

    @property
    def passed(self) -> bool:
        """Whether everything that could be tested is within what chance allows."""
        correlated = _outside(self.largest_correlation, 0.0, self.limit)
        low, high = self.variance_interval or (0.0, math.inf)
        return not correlated and not _outside(self.variance_ratio, low, high)


def check_randomness(
    noise: NDArray[np.floating], variance: float | None, confidence: float = CONFIDENCE
) -> RandomnessCheck:
    """Compare releases that should be independent noise with each other and with their variance.

    Guarantee: if all values are independent N(0, variance), the check fails with probability at
    most ``1 - confidence``: half of that for the largest of all correlations (each exactly
    distributed as Student's t; Bonferroni over the pairs) and half for the mean square
    (chi-square). Noise that two releases share shows as a correlation of 1.

    Args:
        noise: ``(releases, coordinates)``: at least 1 release and 3 coordinates.
        variance: What the variance should be; None to leave it untested.
        confidence: In (0, 1).

    Raises:
        PrivacyError: If there is too little, or a value is not finite.
    """
    require_confidence(confidence)
    if noise.ndim != 2 or noise.shape[0] < 1 or noise.shape[1] < 3 or not np.isfinite(noise).all():
        raise PrivacyError(
            f"noise has shape {noise.shape}: must be (releases, coordinates) with at least 1 and "
            "3, and finite"
        )
    tail = (1 - confidence) / 2
    count, width = noise.shape
    pairs = count * (count - 1) // 2
    largest = _largest_correlation(noise) if pairs else None
    limit = _correlation_limit(tail / (2 * pairs), width) if pairs else None
    if variance is None:
        return RandomnessCheck(pairs, largest, limit, None, None)
    ratio = float(np.mean(noise.astype(np.float64) ** 2)) / variance
    free = count * width
    low, high = (float(stats.chi2.ppf(p, free)) / free for p in (tail / 2, 1 - tail / 2))
    return RandomnessCheck(pairs, largest, limit, ratio, (low, high))


def _largest_correlation(noise: NDArray[np.floating]) -> float:
    rows = noise.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not norms.all():
        return 1.0  # a release without noise is as bad as a copied one
    rows = (rows / norms).astype(np.float32)
    largest = 0.0
    for start in range(0, len(rows), _BLOCK):
        block = np.abs(rows[start : start + _BLOCK] @ rows[start:].T)
        block[np.tril_indices(len(block), m=block.shape[1])] = 0.0
        largest = max(largest, float(block.max()))
    return min(largest, 1.0)


def _correlation_limit(tail: float, width: int) -> float:
    # Of two independent directions r, r * sqrt((width - 1) / (1 - r^2)) is Student's t.
    t = float(stats.t.isf(tail, width - 1))
    return t / math.sqrt(width - 1 + t**2)


def _outside(value: float | None, low: float, high: float | None) -> bool:
    return value is not None and high is not None and not low <= value <= high
