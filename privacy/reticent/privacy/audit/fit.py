"""A point estimate of epsilon from canaries' scores: an estimate, without any guarantee."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from reticent.core.errors import PrivacyError

from ..accounting import require_delta

Floats = NDArray[np.float64]

_MOST = 500.0


def gaussian_fit_epsilon(included: Floats, null_std: float, delta: float) -> float:
    """Return the epsilon of telling N(0, null_std^2) from a normal fitted to ``included``.

    The estimate of Andrew, Kairouz, Oh, Oprea, McMahan and Suriyakumar 2023 (arXiv 2302.03098,
    section 3 and algorithm 2): scores of canaries that were left out have a known normal
    distribution, those of included ones are fitted by mean and standard deviation. It has no
    guarantee and may be above the truth: show it, and never decide on it.

    Args:
        included: ``(m,)`` scores of included canaries, m >= 2.
        null_std: Standard deviation of the score of a canary that was left out, > 0.
        delta: In (0, 1).

    Raises:
        PrivacyError: If there are fewer than two scores or they do not vary.
    """
    require_delta(delta)
    spread = float(np.std(included, ddof=1)) if len(included) > 1 else 0.0
    if not (spread > 0 and null_std > 0 and np.isfinite(included).all()):
        raise PrivacyError(
            f"{len(included)} scores of standard deviation {spread}, null {null_std}: must be at "
            "least 2, finite and varying"
        )
    mean, spread = float(np.mean(included)) / null_std, spread / null_std
    reach = 14 * max(1.0, spread)
    x = np.linspace(min(0.0, mean) - reach, max(0.0, mean) + reach, 40_001)
    null = -(x**2) / 2
    fitted = -(((x - mean) / spread) ** 2) / 2 - np.log(spread)
    width = (x[1] - x[0]) / np.sqrt(2 * np.pi)

    def gap(epsilon: float) -> float:
        both = (_hockey_stick(fitted, null, epsilon), _hockey_stick(null, fitted, epsilon))
        return width * max(both) - delta

    if gap(0.0) <= 0:
        return 0.0
    return float(optimize.brentq(gap, 0.0, _MOST)) if gap(_MOST) < 0 else _MOST  # pyright: ignore[reportArgumentType]


def _hockey_stick(log_p: Floats, log_q: Floats, epsilon: float) -> float:
    above = np.maximum(log_p - log_q - epsilon, 0.0)
    return float(np.sum(-np.exp(log_p) * np.expm1(-above)))
