"""Everything a report says, as plain data: no words are chosen and nothing is rounded later."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from reticent.core.errors import RunError
from reticent.core.plan import Plan
from reticent.core.protocol import Refusal
from reticent.core.run import Run

from ..accounting import describe, epsilon
from ..randomness import SeededRandomness, SystemRandomness
from ..schedule import Schedule
from .adversaries import adversary_rows
from .checklist import checklist
from .spending import (
    QUANTILES,
    Spending,
    epsilon_or_none,
    read_spending,
    used_schedule,
    without_sampling,
)
from .words import as_float, portable

SCHEMA = 1
DELTAS = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
_MODELS = (
    ("Teacher", "teacher"),
    ("Student trained on public data only", "public_only"),
    ("The same, pruned", "public_only_pruned"),
    ("The same, int8", "public_only_int8"),
    ("Federated student, fp32", "fp32"),
    ("Federated student, int8 (deployed)", "int8"),
)


def collect(run: Run) -> dict[str, Any]:
    """Return the report of a finished run as JSON-able data.

    Numbers are not rounded; an infinite one is the string ``"infinity"`` and one that is not known
    is None. The ledger's chain is verified on the way.

    Raises:
        RunError: If the run has not finished, or its files are damaged.
        LedgerError: If the ledger is damaged, or counts less than the server saw.
    """
    plan, metrics = run.plan(), run.read_metrics()
    summary = _summary(run, plan)
    schedule = used_schedule(plan, summary)
    rounds = int(summary["privacy"].get("largest_participation", 0)) if schedule else 0
    spending = read_spending(run, plan, schedule, rounds)
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "run": _run(run, plan, summary),
        "promise": _promise(plan, schedule),
        "adversaries": adversary_rows(schedule, spending.worst, _delta(plan)),
        "spent": _spent(plan, spending, metrics),
        "accounting": _accounting(schedule, spending),
        "rounds": [_round(m) for m in metrics],
        "traffic": _traffic(metrics, summary, spending.clients),
        "models": _models(summary),
        "agreement": summary.get("agreement", {}),
    }
    data["checklist"] = checklist(data)
    return _jsonable(data)


def _delta(plan: Plan) -> float:
    return plan.private.delta if plan.private else 0.0


def _summary(run: Run, plan: Plan) -> dict[str, Any]:
    summary = run.read_summary()
    for key in ("plan", "model", "rounds", "parameters", "privacy"):
        if key not in summary:
            raise RunError(f"{run.summary}: has no {key!r}: it is damaged or of another version")
    if summary["plan"] != plan.digest:
        raise RunError(
            f"{run.summary}: belongs to plan {str(summary['plan'])[:12]}, the run's plan is "
            f"{plan.digest[:12]}"
        )
    return summary


def _run(run: Run, plan: Plan, summary: dict[str, Any]) -> dict[str, Any]:
    simulated = run.ledger.is_dir()
    return {
        "plan": plan.digest,
        "model": summary["model"],
        "task": plan.task.name,
        "student": plan.student.model,
        "rounds": summary["rounds"],
        "clients": plan.task.clients,
        "clients_per_round": plan.federation.clients_per_round,
        "quorum": plan.federation.quorum,
        "steps_per_round": plan.federation.steps_per_round,
        "parameters": summary["parameters"],
        # Only a simulation has the devices' ledger in the run's folder.
        "simulated": simulated,
        "randomness": (SeededRandomness if simulated else SystemRandomness).description,
    }


def _promise(plan: Plan, schedule: Schedule | None) -> dict[str, Any]:
    if schedule is None or plan.private is None:
        return {"trust": "off", "epsilon": "infinity", "delta": None, "target": None}
    planned = schedule.over(schedule.round_event(), schedule.participations)
    return {
        "trust": schedule.trust,
        "unit": plan.private.unit,
        "relation": "add-or-remove-one",
        "delta": schedule.delta,
        "epsilon": epsilon([planned], schedule.delta),
        "target": plan.private.epsilon,
        "clip": schedule.clip,
        "noise_multiplier": schedule.noise_multiplier,
        "share_multiplier": schedule.share_multiplier,
        "shares": schedule.shares,
        "sampling_rate": schedule.sampling_rate,
        "steps_per_round": schedule.steps,
        "participations": schedule.participations,
    }


def _spent(plan: Plan, spending: Spending, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    private = plan.private
    limit = (private.budget or private.epsilon or math.inf) if private else math.inf
    refusals = [int(m["dropped"].get(Refusal.BUDGET.text, 0)) for m in metrics]
    worst = math.inf if private is None else max((g.epsilon for g in spending.groups), default=0.0)
    head = spending.head
    return {
        "source": "server" if head is None else "ledger",
        "maximum": worst,
        "quantiles": {f"{q:.0%}": spending.quantile(q) for q in QUANTILES} if private else {},
        "groups": [
            {"clients": g.clients, "epsilon": g.epsilon} for g in spending.groups if private
        ],
        # With privacy off a device need not be charged, so an empty ledger says nothing.
        "clients": spending.clients if private else spending.clients or None,
        "hard_stop": None if head is None else limit,
        "refusals": sum(refusals),
        "rounds_with_refusals": sum(count > 0 for count in refusals),
        "ledger": None if head is None else {"sequence": head.sequence, "head": head.mac},
    }


def _accounting(schedule: Schedule | None, spending: Spending) -> dict[str, Any]:
    if schedule is None:
        return {"accountant": None, "by_delta": [], "prv": None, "rdp": None, "unamplified": None}
    events, delta = spending.worst, schedule.delta
    deltas = sorted({*DELTAS, delta}, reverse=True)
    return {
        "accountant": describe("pld"),
        "by_delta": [{"delta": d, "epsilon": epsilon(events, d)} for d in deltas],
        "prv": {"epsilon": epsilon_or_none(events, delta, "prv"), "how": describe("prv")},
        "rdp": {"epsilon": epsilon(events, delta, "rdp"), "how": describe("rdp")},
        "unamplified": epsilon(without_sampling(events), delta),
    }


def _round(metrics: dict[str, Any]) -> dict[str, Any]:
    keys = ("round", "replies", "bytes_up", "bytes_down", "bytes_constants", "accuracy", "epsilon")
    dropped: dict[str, int] = metrics["dropped"]
    return {**{key: metrics[key] for key in keys}, "dropped": dropped}


def _traffic(
    metrics: list[dict[str, Any]], summary: dict[str, Any], clients: int | None
) -> dict[str, Any]:
    total: Counter[str] = Counter()
    for line in metrics:
        total.update({k: line[k] for k in ("replies", "bytes_up", "bytes_down", "bytes_constants")})
        total["asked"] += line.get("asked", line["replies"])
    replies, constants = total["replies"], total["bytes_constants"]
    dense = 4 * int(summary["parameters"]["total"])
    return {
        "replies": replies,
        "total_up": total["bytes_up"],
        "total_down": total["bytes_down"],
        "total_constants": constants,
        "up": total["bytes_up"] / replies if replies else None,
        "down": total["bytes_down"] / total["asked"] if total["asked"] else None,
        "constants": constants / clients if clients else None,
        "fp32": dense,
        "total_fp32": 2 * dense * replies,
    }


def _models(summary: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [
        {
            "name": name,
            "accuracy": summary.get("accuracy", {}).get(key),
            "bytes": summary.get("bytes", {}).get(key),
            "latency_us": summary.get("latency_us", {}).get(key),
            "latency_p95_us": summary.get("latency_p95_us", {}).get(key),
            "key": key,
        }
        for name, key in _MODELS
    ]
    # A figure that was never measured stands as NaN in a summary.
    return [row for row in rows if not math.isnan(as_float(row["accuracy"]))]


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_jsonable(v) for v in value]
    return portable(value) if isinstance(value, float) else value
