"""Whether an order may be followed at all; nothing here needs torch, so that saying no is cheap."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from reticent.core.errors import PlanError
from reticent.core.plan import Plan, plan_from_json
from reticent.core.protocol import BEFORE, Order, Refusal
from reticent.privacy.client_level import ClipRule
from reticent.privacy.events import DeclaredPublic, Event, NonPrivate
from reticent.privacy.schedule import schedule_with


class Refused(Exception):
    """The round is not trained, for a reason that has a fixed code."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.text)
        self.refusal = refusal


@lru_cache(maxsize=4)
def plan_of(text: str) -> Plan:
    """Return the plan that ``text`` is the JSON of."""
    return plan_from_json(text)


def check_order(order: Order, plan_text: str) -> Plan:
    """Return the client's own plan if the order belongs to it.

    Raises:
        Refused: If the order names another plan, or its round, noise or clip contradicts the plan.
    """
    try:
        plan = plan_of(plan_text)
    except PlanError as error:
        raise Refused(Refusal.WRONG_PLAN) from error
    if order.plan != plan.digest:
        raise Refused(Refusal.WRONG_PLAN)
    require_round(order, plan)
    if (order.noise_multiplier > 0) != (plan.private is not None):
        raise Refused(Refusal.BAD_ORDER)
    if not allows_clip(plan, order.clip):
        raise Refused(Refusal.BAD_ORDER)
    return plan


def require_round(order: Order, plan: Plan) -> None:
    """Refuse a round that the plan does not have: its schedule is what was promised and accounted.

    Raises:
        Refused: If so.
    """
    if order.round > plan.federation.rounds:
        raise Refused(Refusal.BAD_ORDER)


def allows_clip(plan: Plan, clip: float) -> bool:
    """Return whether an order of ``plan`` may have this bound: the plan's, or one it can become."""
    privacy = plan.private
    if privacy is None:
        return clip == 0
    return ClipRule(privacy.clip, privacy.clip_quantile).allows(clip)


def round_event(plan: Plan, noise_multiplier: float) -> Event:
    """Return the event of one round of ``plan``.

    Raises:
        PlanError: If an adaptive bound's count alone reveals more than the noise multiplier allows.
        PrivacyError: If no event may have this noise multiplier.
    """
    schedule = schedule_with(plan, noise_multiplier)
    return NonPrivate() if schedule is None else schedule.round_event()


@dataclass(frozen=True)
class Due:
    """What a ledger must hold before a round is trained: an event, under a run's name and round."""

    run: str
    round: int
    event: Event


def charges(plan: Plan, noise_multiplier: float, run: str, round: int) -> list[Due]:
    """Return what to charge before ``round`` of ``run`` is trained, in order; the round comes last.

    It comes alone, as :func:`round_event` says, with two exceptions.

    Where the plan declares that the models begin with weights that learned from the clients' data
    (``teacher.trained``), their event comes first, under the name of the weights: a ledger charges
    it once, whatever run and server asks. What has been released cannot be released again, and
    everything that is made of the weights is post-processing of them and of the rounds.

    Where the sampling of clients is counted (``privacy.secret_cohort``), a sampled round costs a
    client what it does whether the client is drawn or not, so charging only rounds in which it is
    would count too little: the first order charges every round in which the client may be drawn,
    as round 0, and each round itself is then an entry that spends nothing.

    Raises:
        PlanError: If an adaptive bound's count alone reveals more than the noise multiplier allows.
        PrivacyError: If no event may have this noise multiplier.
    """
    schedule, event = schedule_with(plan, noise_multiplier), round_event(plan, noise_multiplier)
    if schedule is None:
        return [Due(run, round, event)]
    due: list[Due] = []
    if (trained := plan.teacher.trained) is not None and schedule.earlier is not None:
        due.append(Due(BEFORE + trained.weights, 0, schedule.earlier))
    if not schedule.secret:
        return [*due, Due(run, round, event)]
    whole = event.times(schedule.participations)
    nothing = DeclaredPublic("a round of a run that was charged whole, before")
    return [*due, Due(run, 0, whole), Due(run, round, nothing)]
