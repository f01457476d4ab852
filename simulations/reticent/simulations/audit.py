"""``audit_plan``: what canaries show of a plan's epsilon, beside what the ledger claims."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from reticent.core.errors import PlanError
from reticent.core.plan import Plan
from reticent.core.tasks import Task
from reticent.privacy.accounting import epsilon
from reticent.privacy.audit import (
    CONFIDENCE,
    CanaryGame,
    RandomnessCheck,
    any_rejects,
    check_randomness,
    choose_shares,
    clopper_pearson,
    detectors,
    family_bound,
    fdp_rejects,
    gaussian_fit_epsilon,
    guess,
    likelihood_scores,
    one_run_epsilon,
)
from reticent.privacy.schedule import Schedule, participations

from .audit_clients import observe_clients
from .audit_examples import Observed, canary_layout, observe_examples
from .explain import check_plan

CANARIES = {"example": 2000, "client": 1000}
"""Canaries by default, or half of the student's parameters if that is fewer."""

UPDATES = {"example": 6000, "client": 20_000}
"""As many updates are encoded by default as fit a minute, and the rounds follow from them."""

RANDOMNESS_CONFIDENCE = 0.9999
"""Of the test of randomness: shared or missing noise lies so far outside what chance allows that
little is lost by making false alarms rare."""

SCHEMA = 1

Verdict = Literal["consistent", "violated"]


@dataclass(frozen=True)
class Audit:
    """The outcome of an audit.

    Attributes:
        plan: Digest of the plan.
        unit: What the claim protects.
        relation: How neighbours differ.
        claimed: Epsilon of exactly what was charged in the audited rounds.
        delta: Where it is stated.
        lower_bound: Lower bound on epsilon at ``confidence``
            (:func:`reticent.privacy.audit.any_rejects` over
            :func:`reticent.privacy.audit.family_bound`).
        any_dependence: The bound with nothing assumed between canaries
            (:func:`reticent.privacy.audit.fdp_rejects`).
        any_mechanism: The bound with nothing assumed at all
            (:func:`reticent.privacy.audit.one_run_epsilon`).
        estimate: A point estimate without any guarantee; None where none is made.
        method: The method in words.
        canaries: Canaries.
        rounds: Rounds that were run.
        participations: Rounds that one unit takes part in under the plan.
        right: Right guesses among ``canaries``.
        randomness: Direct test of the released noise.
        seconds: Wall time.
    """

    plan: str
    unit: str
    relation: str
    claimed: float
    delta: float
    lower_bound: float
    any_dependence: float
    any_mechanism: float
    estimate: float | None
    method: str
    canaries: int
    rounds: int
    participations: int
    right: int
    randomness: RandomnessCheck
    seconds: float
    confidence: float = CONFIDENCE

    @property
    def verdict(self) -> Verdict:
        """``violated`` if the bound is above the claim or the noise is not what it should be.

        Guarantee: if the mechanism is what the ledger says, the first says so wrongly with
        probability at most 1 - ``confidence``, the second with at most 1 -
        :data:`RANDOMNESS_CONFIDENCE`.
        """
        broken = self.lower_bound > self.claimed or not self.randomness.passed
        return "violated" if broken else "consistent"

    @property
    def interval(self) -> tuple[float, float]:
        """Exact interval of the share of right guesses."""
        return clopper_pearson(self.right, self.canaries, self.confidence)

    def to_json(self, command: str) -> dict[str, Any]:
        """Return the contents of ``audit.json``; ``command`` is how the audit was asked for."""
        r = self.randomness
        return {
            "schema": SCHEMA,
            "plan": self.plan,
            "unit": self.unit,
            "relation": self.relation,
            "claimed": {"epsilon": self.claimed, "delta": self.delta},
            "lower_bound": self.lower_bound,
            "weaker_bounds": {
                "any_dependence": self.any_dependence,
                "any_mechanism": self.any_mechanism,
            },
            "confidence": self.confidence,
            "estimate": self.estimate,
            "method": self.method,
            "canaries": self.canaries,
            "rounds": self.rounds,
            "interval": list(self.interval),
            "interval_of": f"share of right guesses ({self.right} of {self.canaries} canaries)",
            "randomness": {
                "pairs": r.pairs,
                "largest_correlation": r.largest_correlation,
                "limit": r.limit,
                "variance_ratio": r.variance_ratio,
                "variance_interval": list(r.variance_interval) if r.variance_interval else None,
                "passed": r.passed,
            },
            "verdict": self.verdict,
            "seconds": round(self.seconds, 3),
            "command": command,
        }


def audit_plan(
    plan: Plan,
    canaries: int | None = None,
    rounds: int | None = None,
    seed: int = 0,
    used: Schedule | None = None,
) -> Audit:
    """Run rounds of ``plan`` with canaries and compare what they show with what is claimed.

    The mechanism runs with the plan's own noise, rates, clip, steps, codec and trust. What is
    replaced is the data and the student: canaries, and a linear student of the same shape, whose
    gradients are known. How the real student's layers make per-example gradients is not part of
    the audit.

    Args:
        plan: The plan; its noise is calibrated over its whole schedule as always.
        canaries: Number of canaries, each included by a fair coin; :data:`CANARIES` by default.
        rounds: Rounds to run; at most those that one client takes part in. By default all of them,
            or fewer where that would encode more than :data:`UPDATES`. The claim is that of the
            rounds run.
        seed: Draws canaries, coins, samples and noise.
        used: The schedule that a finished run used, instead of one calibrated now.

    Raises:
        PlanError: If privacy is off, or canaries or rounds are out of range.
        ReticentError: If the plan cannot be run.
    """
    began = time.monotonic()
    task, planned = check_plan(plan)
    schedule = used or planned
    if schedule is None:
        raise PlanError(
            'privacy="off": the plan claims nothing (ε = ∞), so there is no claim to audit'
        )
    if schedule.secret:
        raise PlanError(
            "privacy.secret_cohort=true: must be false in an audit: its canary clients take part "
            "in every round, so it can test a round's noise and not the secrecy of the cohort; "
            "audit the plan with --set privacy.secret_cohort=false"
        )
    size = canary_layout(plan, task, seed).size
    count = min(CANARIES[schedule.unit], size // 2) if canaries is None else canaries
    number = _rounds(plan, schedule, count, rounds)
    seen = _OBSERVERS[schedule.unit](plan, task, schedule, count, number, seed)
    return _judged(plan, schedule, seen, number, seed, began)


_Observer = Callable[[Plan, Task, Schedule, int, int, int], Observed]
_OBSERVERS: dict[str, _Observer] = {"example": observe_examples, "client": observe_clients}


def _rounds(plan: Plan, schedule: Schedule, canaries: int, rounds: int | None) -> int:
    most = participations(plan)
    if rounds is None:
        shared = schedule.shares if schedule.unit == "example" else -(-canaries // 2)
        return max(1, min(most, UPDATES[schedule.unit] // shared))
    if not 1 <= rounds <= most:
        raise PlanError(
            f"rounds={rounds}: must be at least 1 and at most {most}, the rounds that one "
            "client takes part in under this plan"
        )
    return rounds


def _judged(
    plan: Plan, schedule: Schedule, seen: Observed, rounds: int, seed: int, began: float
) -> Audit:
    game = _game(schedule, seen.noise_multiplier, rounds)
    coins, m, delta = seen.canaries.coins, len(seen.canaries.coins), schedule.delta
    found = [d.errors(seen.projections, coins) for d in detectors(game, m, seen.events, seed)]
    scores = likelihood_scores(seen.projections, game)
    shares = choose_shares(game, m, seed)
    guesses = guess(scores, coins, *(int(share * m) for share in shares))
    bound = family_bound(lambda f: any_rejects(found, f), seen.events, delta)
    loose = family_bound(lambda f: fdp_rejects(guesses, f), seen.events, delta)
    return Audit(
        plan=plan.digest,
        unit=schedule.unit,
        relation=schedule.relation,
        claimed=epsilon(seen.events, delta),
        delta=delta,
        lower_bound=bound.epsilon,
        any_dependence=loose.epsilon,
        any_mechanism=one_run_epsilon(guesses, delta),
        estimate=_estimate(schedule, seen),
        method=_METHODS[schedule.unit],
        canaries=m,
        rounds=rounds,
        participations=participations(plan),
        right=found[0].right,
        randomness=check_randomness(seen.noise, seen.variance, RANDOMNESS_CONFIDENCE),
        seconds=time.monotonic() - began,
    )


def _game(schedule: Schedule, noise: float, rounds: int) -> CanaryGame:
    left_out = -1.0 if schedule.relation == "replace-one" else 0.0
    return CanaryGame(schedule.sampling_rate, noise, schedule.steps, rounds, left_out)


def _estimate(schedule: Schedule, seen: Observed) -> float | None:
    """Return the Gaussian-fit estimate where a score is Gaussian: canary clients, added or not."""
    included = seen.canaries.coins
    if schedule.unit != "client" or schedule.relation != "add-or-remove-one":
        return None
    if int(included.sum()) < 2 or included.all():
        return None
    sums = seen.projections.sum(axis=0)
    null_std = float(np.std(sums[~included])) if (~included).sum() > 1 else 0.0
    return gaussian_fit_epsilon(sums[included], null_std, schedule.delta) if null_std else None


_METHODS = {
    "example": (
        "white-box gradient canaries through the client's own round, one run: likelihood-ratio "
        "scores, thresholds fixed on simulated scores, Clopper-Pearson bounds of both errors "
        "against the claimed trade-off function (Nasr et al. 2023)"
    ),
    "client": (
        "canary clients through the server's own bound, noise and sum, one run: likelihood-ratio "
        "scores, thresholds fixed on simulated scores, Clopper-Pearson bounds of both errors "
        "against the claimed trade-off function (Nasr et al. 2023); the estimate, which has no "
        "guarantee, is a Gaussian fit (Andrew et al. 2023)"
    ),
}
