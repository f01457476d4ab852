"""A finished run as the tests of reports want it: written, not trained."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from reticent.core.plan import parse_plan
from reticent.core.protocol import Refusal
from reticent.core.run import Run, create_run
from reticent.core.signing import make_signing_key
from reticent.privacy.accounting import epsilon
from reticent.privacy.events import Event, NonPrivate
from reticent.privacy.ledger import Budget, Ledger
from reticent.privacy.schedule import schedule_for

ROUNDS = 4
PLAN = """
privacy = { noise_multiplier = 1.5, budget = 9.0 }
[task]
name = "digits"
clients = 6
[federation]
rounds = 4
clients_per_round = 4
eval_every = 2
sampling_rate = 0.2
"""
FIGURES = {
    "accuracy": {"teacher": 0.84, "public_only": 0.77, "fp32": 0.82, "int8": 0.81},
    "agreement": {"fake_quantized": 1.0, "largest_logit_difference": 0.0, "fp32": 0.985},
    "latency_us": {"int8": 88.1},
    "latency_p95_us": {"int8": 97.4},
    "bytes": {"int8": 17_200},
}


def build(folder: Path, *settings: str, signed: bool = True, **figures: Any) -> Run:
    """Write a finished run: four of six clients take part in every round, two in none."""
    plan = parse_plan(PLAN, settings)
    run = create_run(folder, plan)
    schedule, private = schedule_for(plan), plan.private
    event: Event = schedule.round_event() if schedule else NonPrivate()
    budget = Budget(private.budget or math.inf if private else math.inf, 1e-5)
    with Ledger.open(run.ledger) as ledger:
        for number in range(1, ROUNDS + 1):
            names = [f"client-{c}" for c in range(4)]
            ledger.charge_many(names, "run", number, event, budget)
    lines = [metrics_of(number) for number in range(1, ROUNDS + 1)]
    if schedule is not None:
        spent = (schedule.over(event, number) for number in range(1, ROUNDS + 1))
        known = [{"epsilon": epsilon([all_of_it], schedule.delta)} for all_of_it in spent]
        lines = [line | more for line, more in zip(lines, known, strict=True)]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    privacy: dict[str, Any] = {"trust": "off"}
    if schedule is not None:
        sigma = schedule.noise_multiplier
        privacy = {"noise_multiplier": sigma, "largest_participation": ROUNDS}
    summary = {"plan": plan.digest, "model": "ab" * 32, "rounds": ROUNDS, "privacy": privacy}
    sizes = {"parameters": {"kept": 7300, "total": 14600}}
    run.summary.write_text(json.dumps({**summary, **sizes, **FIGURES, **figures}))
    if signed:
        make_signing_key(run.keys)
    return run


def metrics_of(number: int) -> dict[str, Any]:
    tested = number % 2 == 0
    return {
        "round": number,
        "replies": 3,
        "asked": 5,
        "dropped": {Refusal.BUDGET.text: 1, "the payload cannot be decoded": 1},
        "bytes_up": 3 * 3700 + number,
        "bytes_down": 5 * 7300,
        "bytes_constants": 4 * 1900 if number == 1 else 0,
        "accuracy": 0.78 + 0.005 * number if tested else None,
        "epsilon": 1.0 + 0.1 * number if tested else None,
    }
