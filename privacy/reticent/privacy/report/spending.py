"""What the clients of a run spent, from the ledger or, without one, from the server's count."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reticent.core.errors import LedgerError, PrivacyError, RunError
from reticent.core.plan import Plan
from reticent.core.run import Run

from ..accounting import epsilon
from ..events import Event, NonPrivate, PoissonGaussian, merge
from ..ledger import Head, Ledger
from ..schedule import Schedule, schedule_for

QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Group:
    """So many clients with the same history, and its epsilon at the plan's delta."""

    clients: int
    events: tuple[Event, ...]
    epsilon: float


@dataclass(frozen=True)
class Spending:
    """Spending of every client that was charged.

    Attributes:
        groups: The largest epsilon first; empty when nobody was charged.
        head: Head of the ledger, verified unless that was left out; None when there is no ledger
            here, and then ``groups`` holds one client, the one that took part most often.
    """

    groups: tuple[Group, ...]
    head: Head | None

    @property
    def worst(self) -> tuple[Event, ...]:
        """History of the client that spent most."""
        return self.groups[0].events if self.groups else ()

    @property
    def clients(self) -> int | None:
        """Number of clients that were charged; None when only their devices know."""
        return None if self.head is None else sum(group.clients for group in self.groups)

    def quantile(self, share: float) -> float | None:
        """Return the least epsilon that ``share`` of the charged clients did not exceed."""
        if not self.clients:
            return None
        rank = max(1, math.ceil(share * self.clients))
        for group in reversed(self.groups):
            rank -= group.clients
            if rank <= 0:
                return group.epsilon
        return self.groups[0].epsilon


def used_schedule(plan: Plan, summary: dict[str, Any]) -> Schedule | None:
    """Return the schedule with the noise multiplier that was used; None when privacy is off.

    The recorded value is taken, so that a report written years later by another version of the
    accountant is about the noise that was added, not about the noise it would choose.

    Raises:
        RunError: If the summary contradicts the plan.
    """
    if plan.private is None:
        return None
    recorded = summary.get("privacy", {}).get("noise_multiplier")
    if not isinstance(recorded, int | float) or not 0 < recorded < math.inf:
        raise RunError(
            f"summary.json: privacy.noise_multiplier={recorded!r}: must be a number > 0, because "
            "the run's plan has a privacy section"
        )
    update = {"epsilon": None, "noise_multiplier": float(recorded)}
    private = plan.private.model_copy(update=update)
    return schedule_for(plan.model_copy(update={"privacy": private}))


def counted_rounds(run: Run, used: int, asked: int) -> int:
    """Return the server's count of rounds for its most frequent client.

    Beside a ledger it is what the ledger must at least hold; without one it stands for the devices'
    own ledgers, and counts every round that was asked: an update may have come too late to be used.
    """
    return used if run.ledger.is_dir() else max(used, asked)


def read_spending(
    run: Run, plan: Plan, schedule: Schedule | None, rounds: int, verify: bool = True
) -> Spending:
    """Return what was spent; ``rounds`` is the server's count for its most frequent client.

    Without ``verify`` the ledger's chain is not walked.

    Raises:
        LedgerError: If the ledger is damaged, or counts less than the server saw.
    """
    if not run.ledger.is_dir():
        return _counted(schedule, rounds)
    if not (run.ledger / "ledger.db").is_file():
        raise LedgerError(f"{run.ledger}: holds no ledger.db: restore it; nothing can be reported")
    delta = plan.private.delta if plan.private else 1e-5
    with Ledger.open(run.ledger, verify=False) as ledger:
        head = ledger.verify() if verify else ledger.head()
        rows = ledger.summary(delta)
    groups = tuple(Group(len(row.devices), tuple(row.events), row.epsilon) for row in rows)
    spending = Spending(groups, head)
    if schedule is not None:
        before = () if schedule.earlier is None or not rounds else (schedule.earlier,)
        steps = _steps([schedule.round_event()]) * rounds + _steps(before)
        _require_enough(run, spending, steps)
    return _of_all(spending, plan, schedule)


def _of_all(spending: Spending, plan: Plan, schedule: Schedule | None) -> Spending:
    """Return what everybody spent, where it is secret who is drawn: drawn or not, the same."""
    if schedule is None or not schedule.secret:
        return spending
    whole: Event = schedule.over(schedule.round_event(), schedule.participations)
    events = spending.worst or (whole,)
    group = Group(plan.task.clients, events, epsilon(events, schedule.delta))
    return Spending((group,), spending.head)


def _counted(schedule: Schedule | None, rounds: int) -> Spending:
    events: tuple[Event, ...] = (NonPrivate(),)
    if schedule is not None:
        events = (schedule.over(schedule.round_event(), rounds),) if rounds else ()
        return Spending((Group(1, events, epsilon(events, schedule.delta)),), None)
    return Spending((Group(1, events, math.inf),), None)


def _require_enough(run: Run, spending: Spending, steps: int) -> None:
    most = max((_steps(group.events) for group in spending.groups), default=0)
    if most < steps:
        raise LedgerError(
            f"{run.ledger}: charges at most {most} steps to a device, but the server counted "
            f"{steps} of one client: it was rolled back, truncated or replaced"
        )


def _steps(events: Iterable[Event]) -> int:
    return sum(event.steps for event in merge(events) if isinstance(event, PoissonGaussian))


def apart(
    events: Sequence[Event], earlier: PoissonGaussian | None
) -> tuple[list[Event], list[Event]]:
    """Return what ``events`` hold besides ``earlier``, and ``earlier`` if they hold it."""
    parts: list[Event] = [*merge(events)]
    if earlier is None:
        return parts, []
    for index, part in enumerate(parts):
        if isinstance(part, PoissonGaussian) and replace(part, steps=earlier.steps) == earlier:
            left = part.steps - earlier.steps
            if left >= 0:
                rest = [replace(part, steps=left)] if left else []
                return [*parts[:index], *rest, *parts[index + 1 :]], [earlier]
    return parts, []


def with_noise(events: Sequence[Event], factor: float) -> list[Event]:
    """Return the events as seen by someone for whom the noise is ``factor`` times as large.

    Composed events are taken apart.
    """
    return [
        replace(event, noise_multiplier=event.noise_multiplier * factor)
        if isinstance(event, PoissonGaussian)
        else event
        for event in merge(events)
    ]


def without_sampling(events: Sequence[Event]) -> list[Event]:
    """Return the events as if every example had been in every batch."""
    return [
        replace(event, sampling_rate=1.0) if isinstance(event, PoissonGaussian) else event
        for event in merge(events)
    ]


def epsilon_or_none(events: Sequence[Event], delta: float, accountant: str) -> float | None:
    """Return an accountant's epsilon, or None where it is out of the accountant's reach."""
    try:
        return epsilon(events, delta, accountant)
    except PrivacyError:
        return None
