"""A test of a whole trade-off function from one run, with nothing assumed between canaries."""

from __future__ import annotations

from .counts import CONFIDENCE, Guesses, require_confidence
from .tradeoff import TradeOff


def fdp_rejects(guesses: Guesses, claim: TradeOff, confidence: float = CONFIDENCE) -> bool:
    """Return whether the guesses contradict the claim.

    Guarantee: if each canary is included by a fair coin of its own and the mechanism is f-DP for
    the claimed f, an attacker whose number of guesses is fixed is right often enough to be
    rejected here with probability at most ``1 - confidence``, however the canaries' scores depend
    on each other (Mahloujifar, Melis and Chaudhuri 2024, "Auditing f-differential privacy in one
    run", arXiv 2410.22235, for two choices a canary).

    Raises:
        PrivacyError: If ``confidence`` is not in (0, 1).
    """
    require_confidence(confidence)
    m, made, right = guesses.canaries, guesses.made, guesses.right
    r = (1 - confidence) * right / m
    h = (1 - confidence) * (made - right) / m
    for i in range(right - 1, -1, -1):
        higher = claim.blow_up_inverse(r)
        if higher <= h:
            break
        r = min(r + i / (made - i) * (higher - h), 1.0)
        h = higher
    return r + h > made / m
