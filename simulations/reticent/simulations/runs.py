"""Finding runs, and what each of them is: its state, its promise and its figures."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reticent.core.errors import ReticentError, RunError
from reticent.core.plan import Plan
from reticent.core.run import Run, write_atomic
from reticent.privacy.report.collect import size_rule
from reticent.privacy.schedule import draws_in_secret

FAILURE = "failure.json"
_MARKS = ("plan.sha256", "journal.db")

_EMPTY: dict[str, Any] = {
    "state": "damaged",
    "round": 0,
    "rounds": None,
    "task": None,
    "trust": None,
    "epsilon": None,
    "server_epsilon": None,
    "accuracy": None,
    "bytes": None,
    "seconds": None,
    "date": None,
    "seed": None,
    "problem": None,
}


def find_runs(folder: Path) -> list[Path]:
    """Return every run directory at or below ``folder``, whole or damaged, in order of names.

    A run's own folders are not searched, hidden ones neither; links are not followed.

    Raises:
        RunError: If there is no such folder.
    """
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder")
    return sorted(_found(folder))


def _found(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        if any(mark in files for mark in _MARKS):
            folders.clear()
            yield Path(place)
        folders[:] = [name for name in folders if not name.startswith(".")]


def describe(folder: Path) -> dict[str, Any]:
    """Return what a run directory holds; of a damaged one, as much as can be read, and why.

    ``state`` is ``finished``, ``ended`` (by budgets, before the last round), ``running``,
    ``failed``, ``stopped`` or ``damaged``; a figure that is not known is None, an infinite epsilon
    ``"infinity"``. Epsilon is that of the client that spent
    most; before the end, what the schedule had allowed after the last committed round.
    """
    run = Run(folder)
    row = {"run": str(folder), **_EMPTY}
    try:
        plan = run.plan()
        row |= _of_plan(plan)
        row["date"] = _date(run, plan)
        metrics = run.read_metrics()
        row |= _of_metrics(metrics, plan)
        row |= _of_summary(run, plan) if run.summary.is_file() else _unfinished(run)
        if damaged := _drop_damaged(row):
            raise ValueError(", ".join(damaged))
    except (ReticentError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        known = isinstance(error, ReticentError | OSError)
        what = str(error) if known else f"a figure is missing or damaged: {error!r}"
        _drop_damaged(row)
        row |= {"state": "damaged", "problem": what}
    return row


_FIGURES = ("accuracy", "epsilon", "server_epsilon", "bytes", "seconds")


def _drop_damaged(row: dict[str, Any]) -> list[str]:
    """Forget the figures that are not numbers, and return what they were."""
    wrong = [key for key in _FIGURES if not _is_figure(row[key])]
    found = [f"{key}={row[key]!r:.40}" for key in wrong]
    row |= dict.fromkeys(wrong)
    return found


def _is_figure(value: Any) -> bool:
    if value is None or value == "infinity":
        return True
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _of_plan(plan: Plan) -> dict[str, Any]:
    private = plan.private
    trust = "off" if private is None else private.trust
    if private is not None and private.unit == "client":
        trust = "aggregator, client"
    rounds, seed = plan.federation.rounds, plan.seed
    return {"task": plan.task.name, "trust": trust, "rounds": rounds, "seed": seed}


def _date(run: Run, plan: Plan) -> str:
    """Return when it ended or began; the day alone where the time follows from secret draws."""
    file = run.summary if run.summary.is_file() else run.plan_file
    time = datetime.fromtimestamp(file.stat().st_mtime, UTC)
    return time.date().isoformat() if draws_in_secret(plan) else time.isoformat(timespec="seconds")


def _of_metrics(metrics: Sequence[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    tested = [row for row in metrics if row["accuracy"] is not None]
    known = [row["epsilon"] for row in metrics if row["epsilon"] is not None]
    off = plan.private is None
    return {
        "round": metrics[-1]["round"] if metrics else 0,
        "accuracy": tested[-1]["accuracy"] if tested else None,
        "epsilon": "infinity" if off and metrics else known[-1] if known else None,
        "bytes": traffic(metrics, plan)["total"],
        "seconds": duration(metrics, plan),
    }


def duration(metrics: Sequence[dict[str, Any]], plan: Plan) -> float | None:
    """Return seconds of all rounds; None where they would tell how many a secret draw gave."""
    total = sum(row["seconds"] for row in metrics)
    return None if draws_in_secret(plan) else round(total, 3)


def traffic(metrics: Sequence[dict[str, Any]], plan: Plan) -> dict[str, float | None]:
    """Return encoded bytes of a run as its report shows them.

    ``up`` and ``down`` are means of one client and round (None before the first), ``total`` is of
    the whole run, public constants included. Under aggregator trust sizes of updates are rounded
    up to two figures: the promise does not cover them. All are None where they would tell how many
    clients a secret draw gave.
    """
    if draws_in_secret(plan):
        return dict.fromkeys(("up", "down", "total"))
    shown = size_rule("off" if plan.private is None else plan.private.trust)
    sums = {
        key: sum(row[key] for row in metrics)
        for key in ("replies", "bytes_up", "bytes_down", "bytes_constants")
    }
    asked = sum(row.get("asked", row["replies"]) for row in metrics)
    return {
        "up": shown(sums["bytes_up"] / sums["replies"]) if sums["replies"] else None,
        "down": sums["bytes_down"] / asked if asked else None,
        "total": shown(sums["bytes_up"]) + sums["bytes_down"] + sums["bytes_constants"],
    }


def _of_summary(run: Run, plan: Plan) -> dict[str, Any]:
    summary = run.read_summary()
    if summary["plan"] != plan.digest:
        raise RunError(f"{run.summary}: belongs to another plan")
    accuracies, privacy = summary["accuracy"], summary["privacy"]
    ended = summary.get("stopped") is not None
    return {
        "state": "ended" if ended else "finished",
        "problem": _failure(run) if ended else None,
        "accuracy": accuracies["int8"] if "int8" in accuracies else accuracies["fp32"],
        "epsilon": privacy["epsilon"],
        "server_epsilon": privacy["server_epsilon"],
    }


def _unfinished(run: Run) -> dict[str, Any]:
    if _in_use(run):
        return {"state": "running"}
    reason = _failure(run)
    return {"state": "stopped"} if reason is None else {"state": "failed", "problem": reason}


def _in_use(run: Run) -> bool:
    """Return whether a process of this machine holds the run, without taking its lock."""
    with suppress(OSError):
        inode = (run.folder / ".lock").stat().st_ino
        locks = Path("/proc/locks").read_text().splitlines()
        return any("FLOCK" in line and f":{inode} " in line for line in locks)
    return False


def record_failure(run: Run, reason: str) -> None:
    """Write why a run ended without finishing, if its folder can be written."""
    with suppress(OSError):
        write_atomic(run.folder / FAILURE, json.dumps({"reason": reason}).encode() + b"\n")


def forget_failure(run: Run) -> None:
    """Remove what :func:`record_failure` wrote: the run goes on."""
    with suppress(OSError):
        (run.folder / FAILURE).unlink(missing_ok=True)


def _failure(run: Run) -> str | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads((run.folder / FAILURE).read_text(encoding="utf-8"))["reason"])
    return None


def sort_rows(rows: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Return rows in order of a column; the best or newest first, what is not known last."""
    column = "run" if key == "name" else key
    known = [row for row in rows if row[column] is not None]
    down = key in ("accuracy", "date")
    ordered = sorted(known, key=lambda row: (_sortable(row[column]), row["run"]), reverse=down)
    return [*ordered, *(row for row in rows if row[column] is None)]


def _sortable(value: Any) -> Any:
    return float("inf") if value == "infinity" else value


def differing_keys(plans: Sequence[Plan]) -> list[tuple[str, list[Any]]]:
    """Return ``(key, values)`` for every key of the plan in which not all ``plans`` agree."""
    flat = [dict(_leaves(plan.model_dump(mode="json"))) for plan in plans]
    keys = dict.fromkeys(key for leaves in flat for key in leaves)
    rows = [(key, [leaves.get(key) for leaves in flat]) for key in keys]
    return [(key, values) for key, values in rows if any(v != values[0] for v in values)]


def _leaves(data: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
