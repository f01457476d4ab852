"""Weights that learned from the clients' data before the run: a release of their own."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from reticent.core.errors import PlanError
from reticent.core.plan import Plan

from ..accounting import epsilon
from ..schedule import Schedule
from .words import delta_text, epsilon_text, number_text

UNCHECKED = (
    "How the weights that the models begin with were trained",
    "is the word of whoever signed the plan: a device counts what is declared, and cannot see "
    "whether less noise was added or other data were used",
)


def brought(plan: Plan, schedule: Schedule) -> dict[str, Any]:
    """Return the section ``weights`` of the report of a plan whose models bring weights along.

    Raises:
        PlanError: If they bring none.
    """
    trained, earlier = plan.teacher.trained, schedule.earlier
    if trained is None or earlier is None:
        raise PlanError("teacher.trained: is absent")
    rounds = schedule.round_event().times(schedule.participations)
    return {
        "sha256": trained.weights,
        "event": asdict(earlier),
        "epsilon": epsilon([earlier], schedule.delta),
        "delta": schedule.delta,
        "rounds_epsilon": epsilon([rounds], schedule.delta),
    }


def weights_released(weights: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the row of :mod:`.releases` for these weights, if there are any."""
    if weights is None:
        return []
    return [
        {
            "value": f"Weights that the models begin with ({weights['sha256'][:12]}), before the "
            "run",
            "leaves": "the server",
            "count": 1,
            "bytes": None,
            "mechanism": f"as the plan declares: {_event(weights['event'])}; charged to a device's "
            "ledger once, whatever run asks",
            "depends": "on private examples, through that mechanism",
        }
    ]


def weights_text(weights: dict[str, Any] | None) -> str:
    """Return the charge for the teacher in a sentence or two."""
    if weights is None:
        return (
            "none: the teacher is trained on public data only, from random weights or from weights "
            "that the task's own code declares public; the tool cannot check that declaration"
        )
    return (
        f"ε = {epsilon_text(weights['epsilon'])} at δ = {delta_text(weights['delta'])} by itself "
        f"({_event(weights['event'])}), for weights {weights['sha256'][:12]} that learned from the "
        "clients' data before; composed with the rounds, which by themselves have at most ε = "
        f"{epsilon_text(weights['rounds_epsilon'])}, in every number of this report. The plan "
        "declares it and the tool cannot check it; where the weights come of rounds that a "
        "device's ledger holds already, they are counted twice"
    )


def _event(event: dict[str, Any]) -> str:
    return (
        f"{event['steps']:,} sums with Gaussian noise, q = {number_text(event['sampling_rate'])}, "
        f"σ = {number_text(event['noise_multiplier'])}, one {event['unit']}, {event['relation']}"
    )
