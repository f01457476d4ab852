"""The points of a sweep: the product of a grid of settings and of seeds."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from reticent.core.errors import PlanError, ReticentError
from reticent.core.plan import Plan, parse_plan
from reticent.core.tasks import Task
from reticent.privacy.report.render import require_templates
from reticent.privacy.report.tuning import Candidate, candidate

from ..accelerators import require_accelerator
from ..explain import check_plan, sketched_constants

MOST_POINTS = 10_000
_LONGEST = 100
_OPEN, _CLOSE, _QUOTES = "[{", "]}", "\"'"

Settings = tuple[tuple[str, str], ...]
Grid = dict[str, tuple[str, ...]]
"""Values of each key of the plan, in order, as ``--set`` takes them."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
        settings: ``(key, value)`` of every key of the grid.
        seed: The seed of its plan.
        plan: Its plan.
        kept: Name of its run directory, if a sweep has it already; it may spell settings otherwise.
    """

    settings: Settings
    seed: int
    plan: Plan
    kept: str | None = None

    @property
    def label(self) -> str:
        """The settings and the seed, for people."""
        return " ".join([*(f"{key}={value}" for key, value in self.settings), f"seed={self.seed}"])

    @property
    def folder(self) -> str:
        """Name of its run directory: safe characters only, unique by the plan's digest."""
        if self.kept is not None:
            return self.kept
        short = [f"{key.rpartition('.')[2]}-{value}" for key, value in self.settings]
        parts = [re.sub(r"[^A-Za-z0-9.+-]+", "-", part).strip("-") for part in short]
        safe = "_".join([*parts, f"seed-{self.seed}"])
        return f"{safe[:_LONGEST].strip('.-_')}_{self.plan.digest[:8]}"


def parse_grid(texts: Sequence[str]) -> Grid:
    """Parse ``KEY=V1,V2,…``; commas inside brackets or quotes do not separate.

    >>> parse_grid(['privacy.epsilon=1,2', 'updates.codec=["int8","ans"],["identity"]'])
    {'privacy.epsilon': ('1', '2'), 'updates.codec': ('["int8","ans"]', '["identity"]')}

    Raises:
        PlanError: If a text has no key or no value, or a key is given twice.
    """
    grid: Grid = {}
    for text in texts:
        key, equals, rest = (part.strip() for part in text.partition("="))
        values = tuple(_split(rest))
        if not key or not equals or not all(values):
            raise PlanError(f"--grid {text}: must look like section.key=value,value")
        if key in grid:
            raise PlanError(f"--grid {key}: is given twice: write all values into one --grid")
        grid[key] = values
    return grid


def _split(text: str) -> Iterator[str]:
    depth, quote, start = 0, "", 0
    for index, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in _QUOTES:
            quote = character
        elif character in _OPEN + _CLOSE:
            depth += 1 if character in _OPEN else -1
        elif character == "," and depth == 0:
            yield text[start:index].strip()
            start = index + 1
    yield text[start:].strip()


@dataclass(frozen=True)
class Base:
    """The plan that a sweep varies, as it was written.

    Attributes:
        text: TOML.
        overrides: ``key=value`` of ``--set``.
        where: What errors call it.
    """

    text: str = ""
    overrides: tuple[str, ...] = ()
    where: str = "plan"

    def plan(self, *more: str) -> Plan:
        """Return the plan with ``more`` overrides applied last."""
        return parse_plan(self.text, [*self.overrides, *more], where=self.where)


def points_of(base: Base, grid: Mapping[str, Sequence[str]], seeds: int) -> list[Point]:
    """Return every point, in the grid's order; the seeds of a setting stand together.

    Seeds count up from the plan's own.

    Raises:
        PlanError: Naming *every* point that is not a plan, every plan that occurs twice, and every
            point that could not be resumed.
    """
    if "seed" in grid and seeds != 1:
        raise PlanError("--seeds: cannot be used with --grid seed=…: both choose seeds")
    count = math.prod([seeds, *map(len, grid.values())])
    if count > MOST_POINTS:
        raise PlanError(f"the grid has {count:,} points: at most {MOST_POINTS:,} are allowed")
    made: list[Point] = []
    problems: list[str] = []
    for values in product(*grid.values()):
        settings = tuple(zip(grid, values, strict=True))
        try:
            made += _seeded(base, settings, seeds)
        except PlanError as error:
            problems.append(f"{_words(settings)}: {error}")
    problems += [*_duplicates(made), *_not_resumable(made)]
    _refuse(problems, PlanError)
    return made


def _seeded(base: Base, settings: Settings, seeds: int) -> list[Point]:
    overrides = [f"{key}={value}" for key, value in settings]
    plan = base.plan(*overrides)
    plans = [plan, *(base.plan(*overrides, f"seed={plan.seed + k}") for k in range(1, seeds))]
    shown = tuple(setting for setting in settings if setting[0] != "seed")
    return [Point(shown, plan.seed, plan) for plan in plans]


def _words(settings: Settings) -> str:
    return " ".join(f"{key}={value}" for key, value in settings) or "the plan"


def _duplicates(made: Sequence[Point]) -> list[str]:
    same: dict[str, list[Point]] = defaultdict(list)
    for point in made:
        same[point.plan.digest].append(point)
    return [
        f"{' and '.join(point.label for point in group)}: are the same plan "
        f"{digest[:12]} (engine does not count, but for its device: it cannot change any result)"
        for digest, group in same.items()
        if len(group) > 1
    ]


def _not_resumable(made: Sequence[Point]) -> list[str]:
    """Name the points that a sweep which was stopped could not go on with; together, as one."""
    found = [point.label for point in made if point.plan.engine.kind == "flower-ray"]
    if not found:
        return []
    who = "every point" if len(found) == len(made) else " and ".join(found)
    return [
        f'{who}: engine.kind="flower-ray": must be "inprocess" or "ray" in a sweep: a run on '
        "Flower's own Ray engine cannot be resumed, so a sweep that was stopped could never be "
        "finished"
    ]


def checked(made: Sequence[Point]) -> list[Candidate]:
    """Check every point as ``reticent simulate`` does, and return what each may spend.

    Each data set is looked for once: where it is missing, the first point on it is named.

    Raises:
        DependencyError: If the reports could not be written.
        ReticentError: Naming *every* point that cannot be run; of the class of what is wrong, or
            a PlanError where classes differ.
    """
    require_templates()
    tested: set[str] = set()
    found: list[Candidate] = []
    problems: list[str] = []
    kinds: set[type[ReticentError]] = set()
    for point in made:
        try:
            task, schedule = check_plan(point.plan)
            found.append(candidate(point.plan, schedule))
            _require_means(point.plan, task, tested)
        except ReticentError as error:
            problems.append(f"{point.label}: {error}")
            kinds.add(type(error))
    _refuse(problems, kinds.pop() if len(kinds) == 1 else PlanError)
    return found


def _require_means(plan: Plan, task: Task, tested: set[str]) -> None:
    """Check that data and device of a plan are there; data of a section ``task`` once.

    Raises:
        ReticentError: Saying what is not.
    """
    section = plan.task.model_dump_json()
    if section not in tested:
        tested.add(section)
        task.test()
    if plan.engine.device != "cpu":
        require_accelerator(plan, task, sketched_constants(plan, task))


def _refuse(problems: Sequence[str], kind: type[ReticentError]) -> None:
    if problems:
        lines = "\n  ".join(problems)
        noun = "problem" if len(problems) == 1 else "problems"
        raise kind(f"the sweep has {len(problems)} {noun}, and nothing was started:\n  {lines}")
