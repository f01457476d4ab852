"""Tasks: data and models, by name or of a user's own making."""

from __future__ import annotations

import difflib

from ..errors import DataError, PlanError
from ..models import call_own
from ..plan import TaskSection
from .arrays import ArrayTask
from .base import Examples, Task
from .har import HAR
from .images import ImageTask
from .owned import OwnedTask
from .partition import Deal
from .sources import SOURCES
from .text import TEXT

__all__ = ["ArrayTask", "Deal", "Examples", "ImageTask", "OwnedTask", "Task", "load_task"]

OWNED = {source.name: source for source in (HAR, TEXT)}
"""Tasks of people, by name."""


def load_task(section: TaskSection, seed: int) -> Task:
    """Return the task that a plan names: a built-in one (``docs/tasks.md``) or a user's own.

    A name ``"package.module:attribute"`` is imported, and the attribute is called with
    ``(section, seed)`` and must return a :class:`Task`. Importing runs that module's code.

    >>> load_task(TaskSection(name="digits", clients=10), seed=0).nominal_examples
    43

    Raises:
        PlanError: If there is no task of that name.
        DataError: If the task's data cannot serve the section, or what a user's own attribute
            returns is not a task.
    """
    if ":" in section.name:
        return _own_task(section, seed)
    if section.name in SOURCES:
        return ImageTask(SOURCES[section.name], section, seed)
    if section.name in OWNED:
        return OwnedTask(OWNED[section.name], section, seed)
    names = [*SOURCES, *OWNED]
    close = difflib.get_close_matches(section.name, names, n=1)
    hint = f' (did you mean "{close[0]}"?)' if close else ""
    raise PlanError(
        f'task.name="{section.name}": must be one of {", ".join(names)}, or '
        f'"package.module:attribute"{hint}'
    )


def _own_task(section: TaskSection, seed: int) -> Task:
    task = call_own("task.name", section.name, section, seed)
    if not isinstance(task, Task):
        wanted = [*Task.__annotations__, "public", "client", "test", "teacher", "student"]
        missing = [name for name in wanted if not hasattr(task, name)]
        raise DataError(
            f'task.name="{section.name}": returned a {type(task).__name__}, which is not a task: '
            f"it has no {', '.join(missing)}"
        )
    return task
