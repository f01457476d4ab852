"""Everything a report says, as plain data: no words are chosen and nothing is rounded later."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from reticent.core.errors import RunError
from reticent.core.plan import Plan
from reticent.core.protocol import Refusal
from reticent.core.run import Run

from ..accounting import epsilon
from ..randomness import SeededRandomness, SystemRandomness
from ..schedule import Schedule
from .against import rows_against
from .audited import read_audit
from .checklist import checklist
from .drawn import OF_ROUND, without_draws
from .figures import accounting, planned_curve
from .plain import not_covered, plain
from .releases import releases
from .schema import SCHEMA, SCHEMA_ID, load_schema, problems
from .spending import QUANTILES, Spending, counted_rounds, read_spending, used_schedule
from .tuning import read_tuning
from .weights import brought, weights_released
from .words import as_float, portable
from .writer import writer

_MODELS = (
    ("Teacher", "teacher"),
    ("Student trained on public data only", "public_only"),
    ("The same, pruned", "public_only_pruned"),
    ("The same, int8", "public_only_int8"),
    ("Federated student, fp32", "fp32"),
    ("Federated student, int8 (deployed)", "int8"),
)


_TABLES = ("accuracy", "bytes", "latency_us", "latency_p95_us")
_MOST, _ASKED = "largest_participation", "largest_asked"


def collect(run: Run) -> dict[str, Any]:
    """Return the report of a finished run as JSON-able data, as ``report-schema-2.json`` says.

    Numbers are not rounded, except sizes of updates where the promise does not cover them; an
    infinite one is the string ``"infinity"`` and one that is not known is None. The ledger's chain
    is verified on the way.

    Raises:
        RunError: If the run has not finished, or its files are damaged.
        LedgerError: If the ledger is damaged, or counts less than the server saw.
    """
    plan = run.plan()
    summary = _summary(run, plan)
    metrics = _metrics(run, summary["rounds"])
    stopped = _stopped(run, summary)
    asked = [*metrics, *stopped]  # also in a round that could not be held
    schedule = used_schedule(plan, summary)
    used, most = (summary["privacy"].get(key, 0) for key in (_MOST, _ASKED))
    rounds = counted_rounds(run, used, most) if schedule else 0
    spending = read_spending(run, plan, schedule, rounds)
    private, promise = plan.private, _promise(plan, schedule)
    shown = size_rule(promise["trust"])
    data: dict[str, Any] = {
        "$schema": SCHEMA_ID,
        "schema": SCHEMA,
        "writer": writer(),
        "run": _run(run, plan, summary),
        "promise": promise,
        "adversaries": rows_against(plan, schedule, spending),
        "spent": _spent(plan, spending, asked, schedule),
        "accounting": accounting(
            schedule, spending.worst, private.examples_per_user if private else None
        ),
        "audit": read_audit(run, plan),
        "rounds": [_round(m, shown) for m in metrics],
        "planned": _planned(run, plan, schedule),
        "traffic": _traffic(asked, summary, spending.clients, shown),
        "models": _models(summary),
        "agreement": summary.get("agreement", {}),
    }
    if schedule is not None and schedule.earlier is not None:
        data["weights"] = brought(plan, schedule)
    tuning = read_tuning(run, plan)
    if tuning is not None:
        data["tuning"] = tuning
    data = without_draws(_jsonable(data))
    _require_whole(run, data)
    artifact = summary.get("bytes", {}).get("int8")
    data["releases"] = [
        *weights_released(data.get("weights")),
        *releases(data["promise"], data["run"], data["traffic"], asked, artifact),
    ]
    # Words are chosen from the numbers as a reader of the JSON finds them.
    return worded(data)


def worded(data: dict[str, Any]) -> dict[str, Any]:
    """Return ``data`` with its words chosen anew; they are a function of its numbers."""
    said = {**data, "not_covered": not_covered(data)}
    said["plain"] = plain(said)
    said["checklist"] = checklist(said)
    return said


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
    for key in ("parameters", "privacy", "agreement", *_TABLES):
        if not isinstance(summary.get(key, {}), dict):
            raise RunError(f"{run.summary}: {key} must be an object: it is damaged")
    most = (summary["privacy"].get(key, 0) for key in (_MOST, _ASKED))
    counts = (summary["rounds"], summary["parameters"].get("total"), *most)
    figures = [value for key in _TABLES for value in summary.get(key, {}).values()]
    known = all(value is None or type(value) in (int, float) for value in figures)
    if not known or not all(type(count) is int and count >= 0 for count in counts):
        raise RunError(f"{run.summary}: holds something else where a number must be: it is damaged")
    return summary


def _metrics(run: Run, rounds: int) -> list[dict[str, Any]]:
    """Return the rounds as they were committed, each with what older versions did not write.

    All of them: where one is missing, bytes and refusals would be under-stated.
    """
    shown = load_schema()["properties"]["rounds"]["items"]["properties"]
    lines: list[dict[str, Any]] = []
    for number, line in enumerate(run.read_metrics(), 1):
        whole = {"asked": line.get("replies"), "clip": None, "within_clip": None} | line
        row = {key: whole[key] for key in shown if key in whole}
        wrong = _wrong(row)
        if wrong:
            raise RunError(f"{run.metrics}: line {number}: damaged: {'; '.join(wrong[:3])}")
        lines.append(row)
    if [line["round"] for line in lines] != list(range(1, rounds + 1)):
        raise RunError(
            f"{run.metrics}: must hold each of {rounds} rounds once and in order: it was cut or "
            f"altered; `{run.resume_command}` makes it again"
        )
    return lines


def _wrong(row: dict[str, Any]) -> list[str]:
    """Return what is wrong with a recorded round; only a report may leave out its counts."""
    absent = [f"{key}: null" for key in (*OF_ROUND, "dropped") if row.get(key, 0) is None]
    return [*problems([row], "rounds"), *absent]


def _stopped(run: Run, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the round that could not be held because budgets were spent, as a round, if any."""
    if summary.get("stopped") is None:
        return []
    known = summary["stopped"] if isinstance(summary["stopped"], dict) else {}
    never = ("accuracy", "epsilon", "clip", "within_clip")
    rows: list[dict[str, Any]] = [{**known, **dict.fromkeys(never)}]
    wrong = _wrong(rows[0])
    if wrong or rows[0]["round"] != summary["rounds"] + 1:
        raise RunError(f"{run.summary}: stopped: damaged: {'; '.join(wrong[:3]) or 'its round'}")
    return rows


def _require_whole(run: Run, data: dict[str, Any]) -> None:
    """Refuse files with values that no run writes, before words are made of them."""
    parts = ("run", "traffic", "models", "agreement")
    wrong = [problem for part in parts for problem in problems(data[part], part)]
    if wrong:
        raise RunError(f"{run.summary}: damaged: {'; '.join(wrong[:3])}")


def _run(run: Run, plan: Plan, summary: dict[str, Any]) -> dict[str, Any]:
    simulated = run.ledger.is_dir()
    return {
        "plan": plan.digest,
        "model": summary["model"],
        "task": plan.task.name,
        "student": plan.student.model,
        "rounds": summary["rounds"],
        "stopped": summary["stopped"]["round"] if "stopped" in summary else None,
        "clients": plan.task.clients,
        "clients_per_round": plan.federation.clients_per_round,
        "quorum": plan.federation.quorum,
        # A simulation takes replies in an order that depends on no client's time.
        "enough": plan.federation.enough if plan.first_come and not simulated else None,
        "steps_per_round": plan.federation.steps_per_round,
        "sampling_rate": plan.federation.sampling_rate,
        "client_sampling": plan.federation.sampling,
        "codec": list(plan.updates.codec),
        "padded": plan.updates.pad,
        "parameters": summary["parameters"],
        # Only a simulation has the devices' ledger in the run's folder.
        "simulated": simulated,
        "randomness": (SeededRandomness if simulated else SystemRandomness).description,
        # Only with client-level privacy does the server draw noise of its own.
        "server_randomness": summary["privacy"].get("server_randomness"),
    }


def _promise(plan: Plan, schedule: Schedule | None) -> dict[str, Any]:
    private = plan.private
    if schedule is None or private is None:
        return {"trust": "off", "epsilon": "infinity", "delta": None, "target": None}
    planned = schedule.over(schedule.round_event(), schedule.participations)
    return {
        "trust": schedule.trust,
        "unit": schedule.unit,
        "relation": schedule.relation,
        "delta": schedule.delta,
        "epsilon": epsilon([planned], schedule.delta),
        "target": private.epsilon,
        "clip": schedule.clip,
        "clipping": private.clipping,
        "clip_quantile": schedule.clip_quantile,
        "noise_multiplier": schedule.noise_multiplier,
        "share_multiplier": schedule.share_multiplier,
        "shares": schedule.shares,
        "sampling_rate": schedule.sampling_rate,
        "steps_per_round": schedule.steps,
        "participations": schedule.participations,
    }


def _spent(
    plan: Plan, spending: Spending, metrics: list[dict[str, Any]], schedule: Schedule | None
) -> dict[str, Any]:
    private = plan.private
    limit = (private.budget or private.epsilon or math.inf) if private else math.inf
    refusals = [int(m["dropped"].get(Refusal.BUDGET.text, 0)) for m in metrics]
    worst = math.inf if private is None else max((g.epsilon for g in spending.groups), default=0.0)
    head = spending.head
    return {
        "source": "server" if head is None else "ledger",
        "maximum": worst,
        "quantiles": {f"{q:.0%}": spending.quantile(q) for q in QUANTILES} if private else {},
        "groups": _groups(plan, spending, limit, schedule) if private else [],
        # With privacy off a device need not be charged, so an empty ledger says nothing.
        "clients": spending.clients if private else spending.clients or None,
        "hard_stop": None if head is None else limit,
        "refusals": sum(refusals),
        "rounds_with_refusals": sum(count > 0 for count in refusals),
        "ledger": None if head is None else {"sequence": head.sequence, "head": head.mac},
    }


def _groups(
    plan: Plan, spending: Spending, limit: float, schedule: Schedule | None
) -> list[dict[str, Any]]:
    """Return clients by what they spent, those that were never asked included, the most first.

    Who was never asked spent nothing in the rounds; where who is asked is secret, all are one group
    already. What weights spent that were trained before, they spent of everybody.
    """
    known = spending.head is not None
    rows = [(group.clients, group.epsilon) for group in spending.groups]
    idle = plan.task.clients - sum(clients for clients, _ in rows)
    if known and idle > 0:
        rows.append((idle, _of_the_unasked(schedule)))
    # An epsilon may pass the limit by a rounding error of the accountant's; what is left does not.
    return [
        {"clients": n, "epsilon": e, "left": max(0.0, limit - e) if known else None}
        for n, e in rows
    ]


def _of_the_unasked(schedule: Schedule | None) -> float:
    if schedule is None or schedule.earlier is None:
        return 0.0
    return epsilon([schedule.earlier], schedule.delta)


def _planned(run: Run, plan: Plan, schedule: Schedule | None) -> list[dict[str, Any]]:
    # On real devices nodes come and go, and only the bound on participations holds.
    if not run.ledger.is_dir():
        return []
    return planned_curve(schedule, plan)


def coarse(size: float) -> int:
    """Return a size rounded up to two significant figures.

    >>> [coarse(n) for n in (0, 7, 99, 101, 123_456)]
    [0, 7, 99, 110, 130000]
    """
    whole = math.ceil(size)
    unit = 10 ** max(0, len(str(whole)) - 2)
    return -(-whole // unit) * unit


def size_rule(trust: str) -> Callable[[float], float]:
    """Return how the size of updates is shown under a trust, or with privacy ``off``.

    Under aggregator trust a size follows from single updates, whose noise is a share or none: the
    promise to readers of this report does not cover it. It is shown too coarsely to count on, and
    said not to be covered.
    """
    return coarse if trust == "aggregator" else lambda size: size


def _round(metrics: dict[str, Any], shown: Callable[[float], float]) -> dict[str, Any]:
    return metrics | {"bytes_up": shown(metrics["bytes_up"])}


def _traffic(
    metrics: list[dict[str, Any]],
    summary: dict[str, Any],
    clients: int | None,
    shown: Callable[[float], float],
) -> dict[str, Any]:
    total: Counter[str] = Counter()
    for line in metrics:
        sums = ("replies", "asked", "bytes_up", "bytes_down", "bytes_constants")
        total.update({key: line[key] for key in sums})
    replies, constants = total["replies"], total["bytes_constants"]
    dense = 4 * int(summary["parameters"]["total"])
    return {
        "replies": replies,
        "asked": total["asked"],
        "total_up": shown(total["bytes_up"]),
        "total_down": total["bytes_down"],
        "total_constants": constants,
        "up": shown(total["bytes_up"] / replies) if replies else None,
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
