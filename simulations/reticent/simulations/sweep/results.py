"""What a sweep found: a row for each setting, over its seeds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reticent.core.run import Run
from reticent.privacy.report.against import epsilons_spent
from reticent.privacy.report.spending import used_schedule
from reticent.privacy.report.tuning import figures, sweep_digest
from reticent.privacy.report.words import portable

from ..runs import duration, traffic
from .points import Point, Settings
from .running import Sweep, finished, reason_of
from .statistics import Estimate, estimate

MEASURED = ("fp32", "int8", "public_only", "up", "down", "total", "seconds")


@dataclass(frozen=True)
class Figures:
    """Figures of one finished run.

    Attributes:
        point: Its point.
        epsilons: Epsilon against each adversary by name, of the client that spent most.
        values: Accuracies (``fp32``, ``int8``, ``public_only``), bytes of one client and round
            (``up``, ``down``) and of the whole run (``total``), and ``seconds`` of its rounds;
            None where the run has no such figure.
        baseline: Accuracy of the student of public data alone in the form that is deployed, int8
            or fp32; None where it is not known.
    """

    point: Point
    epsilons: dict[str, float]
    values: dict[str, float | None]
    baseline: float | None


@dataclass(frozen=True)
class Row:
    """One setting over its seeds.

    Attributes:
        settings: Values of the grid's keys.
        planned: Seeds that were asked for.
        seeds: Seeds whose runs are finished, and whole.
        epsilons: The largest epsilon of any seed, by adversary; empty if nothing is finished.
        estimates: By :data:`MEASURED`; None where no run has that figure.
        baselines: :attr:`Figures.baseline` of each finished seed that has it.
    """

    settings: Settings
    planned: int
    seeds: tuple[int, ...]
    epsilons: dict[str, float]
    estimates: dict[str, Estimate | None]
    baselines: dict[int, float]

    @property
    def label(self) -> str:
        """The settings in a few words, without the sections of their keys."""
        short = (f"{key.rpartition('.')[2]} {value}" for key, value in self.settings)
        return ", ".join(text.replace('"', "") for text in short) or "the plan"

    @property
    def accuracy(self) -> Estimate | None:
        """Accuracy of what is deployed: int8, or fp32 where there is no integer form."""
        return self.estimates["int8"] or self.estimates["fp32"]


@dataclass(frozen=True)
class Results:
    """A sweep's rows, its failures, and what choosing among its runs costs.

    Attributes:
        sweep: The sweep.
        rows: One for each setting, in the grid's order.
        failures: Reason by point's folder, of points that failed or are damaged.
        tuning: For each distinct promise (unit, relation, delta) among the points, what choosing
            among *all* points costs in its terms; see :mod:`reticent.privacy.report.tuning`.
    """

    sweep: Sweep
    rows: tuple[Row, ...]
    failures: dict[str, str]
    tuning: tuple[dict[str, Any], ...]

    @property
    def adversaries(self) -> list[str]:
        """Names of every adversary of any row, in order."""
        return list(dict.fromkeys(name for row in self.rows for name in row.epsilons))

    @property
    def best(self) -> Row | None:
        """The row of highest mean accuracy; None when nothing is finished."""
        known = [row for row in self.rows if row.accuracy is not None]
        return max(known, key=lambda row: row.accuracy.mean if row.accuracy else 0.0, default=None)

    @property
    def finished(self) -> int:
        """How many runs are finished."""
        return sum(len(row.seeds) for row in self.rows)


def collect_results(sweep: Sweep, failures: dict[str, str] | None = None) -> Results:
    """Return the results of what is finished, from the runs' summaries and metrics.

    Points in ``failures``, and finished ones that are damaged, are failures and in no row.
    """
    groups: dict[Settings, list[Figures]] = {point.settings: [] for point in sweep.manifest.points}
    failed = dict(failures or {})
    for point in sweep.manifest.points:
        run = sweep.run_of(point)
        if point.folder not in failed and finished(run, point):
            try:
                groups[point.settings].append(figures_of(run, point))
            except Exception as error:  # a damaged run must not cost the others their page
                failed[point.folder] = reason_of(error)
    planned = Counter(point.settings for point in sweep.manifest.points)
    rows = tuple(_row(settings, planned[settings], found) for settings, found in groups.items())
    return Results(sweep, rows, failed, _tuning(sweep))


def _row(settings: Settings, planned: int, found: Sequence[Figures]) -> Row:
    names = dict.fromkeys(name for figure in found for name in figure.epsilons)
    return Row(
        settings,
        planned,
        tuple(f.point.seed for f in found),
        {name: max(f.epsilons.get(name, 0.0) for f in found) for name in names},
        {key: estimate([f.values[key] for f in found]) for key in MEASURED},
        {f.point.seed: f.baseline for f in found if f.baseline is not None},
    )


def figures_of(run: Run, point: Point) -> Figures:
    """Return the figures of a finished run.

    Raises:
        RunError: If its files are damaged.
        LedgerError: If its ledger is.
    """
    summary, metrics, plan = run.read_summary(), run.read_metrics(), point.plan
    schedule, privacy = used_schedule(plan, summary), summary["privacy"]
    counts = (privacy.get(f"largest_{key}", 0) for key in ("participation", "asked"))
    accuracy = summary["accuracy"]
    return Figures(
        point,
        epsilons_spent(run, plan, schedule, *counts),
        {
            **{key: _known(accuracy.get(key)) for key in ("fp32", "int8", "public_only")},
            **traffic(metrics, plan),
            "seconds": duration(metrics, plan),
        },
        _known(accuracy.get("public_only_int8" if "int8" in accuracy else "public_only")),
    )


def _known(value: Any) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _tuning(sweep: Sweep) -> tuple[dict[str, Any], ...]:
    """Return the cost of choosing among all points, in the terms of each promise."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    rivals = sweep.candidates
    which = {"sweep": sweep_digest(c.plan for c in rivals), "runs": len(rivals)}
    for point in sweep.manifest.points:
        private = point.plan.private
        if private is None:
            continue
        terms = (private.unit, private.relation, private.delta)
        if terms not in found:
            found[terms] = {**which, **figures(rivals, point.plan)}
    return tuple(found.values())


def to_json(results: Results) -> dict[str, Any]:
    """Return the results as JSON-able data; an infinite epsilon is ``"infinity"``."""
    manifest = results.sweep.manifest
    return {
        "schema": 1,
        "sweep": manifest.digest,
        "points": len(manifest.points),
        "finished": results.finished,
        "confidence": 0.95,
        "rows": [
            {
                "settings": dict(row.settings),
                "seeds": list(row.seeds),
                "planned": row.planned,
                "epsilon": {name: portable(value) for name, value in row.epsilons.items()},
                **{k: e.to_json() if e else None for k, e in row.estimates.items()},
            }
            for row in results.rows
        ],
        "tuning": list(results.tuning),
        "failures": results.failures,
    }
