"""Means with what is known of their uncertainty."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        n: How many values there are, at least 1.
        mean: Their mean.
        std: Their sample standard deviation; None for one value.
        half: Half the width of the 95 % confidence interval of the mean, by Student's t with
            n - 1 degrees of freedom; None for one value. It takes the values to be independent and
            normally distributed, and is about *seeds*, not about other data.
    """

    n: int
    mean: float
    std: float | None
    half: float | None

    @property
    def low(self) -> float:
        """Lower end of the interval, or the mean of one value."""
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        """Upper end of the interval, or the mean of one value."""
        return self.mean + (self.half or 0.0)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dictionary."""
        return asdict(self)


def estimate(values: Sequence[float | None]) -> Estimate | None:
    """Return the estimate of the values that are known; None without any.

    >>> estimate([1.0, 2.0, 3.0]).half.__round__(3)
    2.484
    """
    known = [float(value) for value in values if value is not None]
    if not known:
        return None
    mean, n = statistics.fmean(known), len(known)
    if n == 1:
        return Estimate(1, mean, None, None)
    from scipy.stats import t

    std = statistics.stdev(known)
    quantile = float(t.ppf((1 + CONFIDENCE) / 2, n - 1))
    return Estimate(n, mean, std, quantile * std / math.sqrt(n))
