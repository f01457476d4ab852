"""Activation ranges from public data: what the integers of a layer's output are to cover."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from reticent.core.plan import Observer

_BATCH, _SMOOTHING = 50, 0.1
_BINS, _SHARES, _LEVELS = 2048, 64, 255

Floats = NDArray[np.float64]


def activation_range(values: torch.Tensor, observer: Observer) -> tuple[float, float]:
    """Return the range ``(low, high)`` of one layer's outputs on public examples.

    - ``min-max``: the extremes.
    - ``moving-average``: extremes of each 50 examples in turn, averaged as they come:
      ``m + 0.1 * (x - m)``, beginning with the first 50 (Jacob et al. 2018, section 3.1).
    - ``histogram``: of 64 x 64 ranges that shrink the extremes towards zero, the one with the least
      expected squared error of 255 steps over a histogram of 2,048 bins. Within the range that is
      ``step^2 / 12``, beyond it the squared distance to the nearer end. It is the aim of torch's
      HistogramObserver, which moves the two ends in turns and so may stop early.

    The range always holds zero when it came from ``histogram``.

    Args:
        values: Float32, the first dimension examples, at least one number. Never private.
        observer: The rule.
    """
    if observer == "moving-average":
        return _averaged(values)
    low, high = float(values.min()), float(values.max())
    if observer == "min-max" or low == high:
        return low, high
    return _least_error(values.numpy().astype(np.float64).ravel(), min(low, 0.0), max(high, 0.0))


def _averaged(values: torch.Tensor) -> tuple[float, float]:
    parts = values.split(_BATCH)
    low, high = float(parts[0].min()), float(parts[0].max())
    for part in parts[1:]:
        low += _SMOOTHING * (float(part.min()) - low)
        high += _SMOOTHING * (float(part.max()) - high)
    return low, high


def _least_error(values: Floats, low: float, high: float) -> tuple[float, float]:
    counts, edges = np.histogram(values, bins=_BINS, range=(low, high))
    centers = (edges[:-1] + edges[1:]) / 2
    shares = np.arange(1, _SHARES + 1) / _SHARES
    lows, highs = low * shares, high * shares
    below = _beyond(-centers[::-1], counts[::-1], -lows)
    above = _beyond(centers, counts, highs)
    inside = ((highs - lows[:, None]) / _LEVELS) ** 2 / 12 * counts.sum()
    row, column = np.unravel_index(
        np.argmin(inside + below[:, None] + above), (len(lows), len(highs))
    )
    return float(lows[row]), float(highs[column])


def _beyond(centers: Floats, counts: NDArray[np.int64], ends: Floats) -> Floats:
    """Return for each of ``ends`` the summed squared distance of the values above it."""
    excess = np.maximum(centers - ends[:, None], 0.0)
    return np.square(excess) @ counts.astype(np.float64)
