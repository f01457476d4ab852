"""The numbers of the technical part: one history of events, read in every way a report states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from reticent.core.plan import Plan

from ..accounting import describe, epsilon
from ..events import RELATIONS, Event, PoissonGaussian, merge
from ..gdp import gdp
from ..groups import group_epsilon
from ..schedule import Schedule, participations
from .spending import epsilon_or_none, without_sampling

DELTAS = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
MOST_POINTS = 25

_NOTHING: dict[str, Any] = {
    "accountant": None,
    "by_delta": [],
    "by_relation": [],
    "gdp": None,
    "prv": None,
    "rdp": None,
    "unamplified": None,
    "user_level": None,
}


def accounting(
    schedule: Schedule | None, events: Sequence[Event], users: int | None
) -> dict[str, Any]:
    """Return the figures of the client whose history is ``events``, against readers of the models.

    Args:
        schedule: The mechanism; None when privacy is off, and then there are no figures.
        events: Composed events are taken apart.
        users: Most examples of one person at one client, when the plan gives such a bound.
    """
    if schedule is None:
        return dict(_NOTHING)
    parts, delta = merge(events), schedule.delta
    deltas = sorted({*DELTAS, delta}, reverse=True)
    return {
        "accountant": describe("pld"),
        "by_delta": [{"delta": d, "epsilon": epsilon(parts, d)} for d in deltas],
        "by_relation": by_relation(parts, delta),
        "gdp": _gdp(parts),
        "prv": {"epsilon": epsilon_or_none(parts, delta, "prv"), "how": describe("prv")},
        "rdp": {"epsilon": epsilon(parts, delta, "rdp"), "how": describe("rdp")},
        "unamplified": epsilon(without_sampling(parts), delta),
        "user_level": _user_level(parts, delta, users),
    }


def by_relation(events: Sequence[Event], delta: float) -> list[dict[str, Any]]:
    """Return epsilon of the same noise under each neighbouring relation.

    A noise multiplier is the noise over the bound of *one* unit's contribution, so the same number
    stands in the event under either relation; the accountant knows how far the sum may move.
    """
    return [
        {"relation": relation, "epsilon": epsilon(related(events, relation), delta)}
        for relation in RELATIONS
    ]


def related(events: Sequence[Event], relation: str) -> list[Event]:
    """Return the events under another neighbouring relation."""
    return [
        replace(event, relation=relation) if isinstance(event, PoissonGaussian) else event
        for event in merge(events)
    ]


def _gdp(events: Sequence[Event]) -> dict[str, Any]:
    summary = gdp(events)
    return {"mu": summary.mu, "regret": summary.regret}


def _user_level(events: Sequence[Event], delta: float, users: int | None) -> dict[str, Any] | None:
    if users is None:
        return None
    return {"examples": users, "epsilon": group_epsilon(events, delta, users)}


def planned_curve(schedule: Schedule | None, plan: Plan) -> list[dict[str, Any]]:
    """Return the most that one client can have spent after each of up to 25 rounds of a run.

    Passes deal everybody in turn as long as all are there. Where devices are away others are asked
    ahead of theirs, and a buffer is filled as fast as devices end: there a client may be asked in
    every round, until it has been as often as the schedule allows at all.

    Args:
        schedule: The mechanism; None when privacy is off, and then there is no curve.
        plan: The plan.
    """
    if schedule is None:
        return []
    rounds = plan.federation.rounds
    shown = sorted({round(1 + k * (rounds - 1) / (MOST_POINTS - 1)) for k in range(MOST_POINTS)})
    there = plan.fleet is None or plan.fleet.availability.kind == "always"
    in_turn, whole = there and plan.federation.buffered is None, participations(plan)
    most = [participations(plan, n) if in_turn else min(n, whole) for n in shown]
    event, delta = schedule.round_event(), schedule.delta
    values = {n: epsilon(merge([schedule.over(event, n)]), delta) for n in set(most)}
    return [{"round": r, "epsilon": values[n]} for r, n in zip(shown, most, strict=True)]
