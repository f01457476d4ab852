"""Epsilon of what was spent, by adversary: one number wherever a run's epsilon is shown."""

from __future__ import annotations

from typing import Any

from reticent.core.plan import Plan
from reticent.core.run import Run

from ..schedule import Schedule
from .adversaries import adversary_rows
from .spending import Spending, counted_rounds, read_spending
from .words import as_float


def rows_against(
    plan: Plan, schedule: Schedule | None, spending: Spending | None
) -> list[dict[str, Any]]:
    """Return a row for each adversary, for the client that spent most."""
    delta = plan.private.delta if plan.private else 0.0
    worst = () if spending is None else spending.worst
    return adversary_rows(schedule, worst, delta, plan.updates.pad)


def epsilons_spent(
    run: Run, plan: Plan, schedule: Schedule | None, used: int, asked: int
) -> dict[str, float]:
    """Return the epsilons of the report by adversary's name, of the client that spent most.

    Where the ledger is here, what it refused was not spent. Its chain is left to the report to
    verify, which walks the whole of it.

    Args:
        run: Where the ledger is, if it is here.
        plan: The run's plan.
        schedule: Its schedule, with the noise that was used.
        used: Rounds in which the server used an update of its most frequent client.
        asked: Rounds for which it asked the client that it asked most often.

    Raises:
        LedgerError: If the ledger is damaged, or counts less than the server saw.
    """
    spending = None
    if schedule is not None:
        rounds = counted_rounds(run, used, asked)
        spending = read_spending(run, plan, schedule, rounds, verify=False)
    rows = rows_against(plan, schedule, spending)
    return {row["name"]: as_float(row["epsilon"]) for row in rows}
