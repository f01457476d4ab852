"""A lower bound on epsilon from one run, with no assumption about the mechanism."""

from __future__ import annotations

import math

import numpy as np
from scipy import optimize, special, stats

from ..accounting import require_delta
from .counts import CONFIDENCE, Guesses, require_confidence

MOST = 200.0


def one_run_p_value(guesses: Guesses, epsilon: float, delta: float) -> float:
    """Return an upper bound on the chance of this many right guesses if the claim is true.

    Guarantee: if each canary is included by a fair coin of its own and the mechanism is
    (epsilon, delta)-differentially private under the relation that the coins decide, then every
    attacker that makes at most ``guesses.made`` guesses has at least ``guesses.right`` of them
    right with at most the returned probability. Nothing is assumed about how the canaries
    influence each other's scores (Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1)
    training run", arXiv 2305.08846).
    """
    m, made, right = guesses.canaries, guesses.made, guesses.right
    chance = float(special.expit(epsilon))
    beta = float(stats.binom.sf(right - 1, made, chance))
    if delta == 0 or right == 0:
        return min(beta, 1.0)
    back = np.arange(1, right + 1)
    alpha = float(np.max((stats.binom.sf(right - back - 1, made, chance) - beta) / back, initial=0))
    return min(beta + 2 * m * delta * alpha, 1.0)


def one_run_epsilon(guesses: Guesses, delta: float, confidence: float = CONFIDENCE) -> float:
    """Return a lower bound on epsilon at ``delta`` that holds with ``confidence``.

    The largest epsilon that :func:`one_run_p_value` rejects; 0 if none. Valid for one set of
    guesses whose number was fixed beforehand. No finite number of guesses can show more than a
    certain epsilon; the result is at most 200.

    Raises:
        PrivacyError: If ``delta`` or ``confidence`` is not in (0, 1).
    """
    require_delta(delta)
    require_confidence(confidence)

    def excess(epsilon: float) -> float:
        return one_run_p_value(guesses, epsilon, delta) - (1 - confidence)

    if excess(0.0) > 0:
        return 0.0
    if excess(MOST) <= 0:  # pragma: no cover - needs more than e^200 canaries
        return MOST
    found = float(optimize.brentq(excess, 0.0, MOST, xtol=1e-7))  # pyright: ignore[reportArgumentType]
    return max(0.0, math.nextafter(found - 1e-7, 0.0))
