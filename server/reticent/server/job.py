"""What every step of one run on the server needs."""

from __future__ import annotations

from dataclasses import dataclass

from reticent.core.plan import Plan
from reticent.core.run import Run
from reticent.core.tasks import Task
from reticent.privacy.schedule import Schedule

from .journal import Journal
from .preparation import Start


@dataclass(frozen=True)
class Job:
    """One run of one plan, prepared: its directory, data, mechanism, start and journal."""

    run: Run
    plan: Plan
    task: Task
    schedule: Schedule | None
    start: Start
    journal: Journal
