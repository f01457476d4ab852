"""What a sweep leaves behind: tables, plots and one self-contained page."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reticent.core.errors import RunError
from reticent.core.run import write_atomic
from reticent.privacy.report.render import filled
from reticent.privacy.report.tuning import tuning_note
from reticent.privacy.report.words import bytes_text, epsilon_text
from reticent.privacy.schedule import draws_in_secret

from .plots import plots, standalone
from .results import MEASURED, Results, Row, to_json
from .running import FAILURES, failures_text
from .statistics import Estimate

PAGE = "index.html"
_SHORT = {
    "Readers of the models": "readers",
    "Another client": "client",
    "The server": "server",
    "Someone on the network": "network",
}


def write_results(results: Results) -> list[Path]:
    """Write ``results.{md,json,csv}``, the plots, ``index.html`` and failures beside the runs.

    Raises:
        RunError: If the folder cannot be written.
        DependencyError: If Jinja2 is not installed.
    """
    drawn = plots(results)
    contents = {
        "results.md": markdown(results),
        "results.json": json.dumps(to_json(results), indent=2, allow_nan=False) + "\n",
        "results.csv": csv_text(results),
        **{f"{name}.svg": standalone(plot["svg"]) for name, plot in drawn.items()},
        PAGE: page(results, drawn),
    }
    if results.failures:  # a damaged run is found only when its figures are read
        contents = {FAILURES: failures_text(results.failures), **contents}
    folder = results.sweep.folder
    try:
        for name, text in contents.items():
            write_atomic(folder / name, text.encode())
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror}") from error
    return [folder / name for name in contents]


def headers(results: Results) -> list[str]:
    """Return the names of the table's columns."""
    whole = [key for key, _ in results.rows[0].settings]
    short = [key.rpartition(".")[2] for key in whole]
    keys = short if len({*short}) == len(short) else whole
    names = [f"ε {_SHORT.get(name, name)}" for name in results.adversaries]
    return [*(keys or ["plan"]), "n", *names, "fp32 %", "int8 %", "up", "down", "seconds"]


def cells(results: Results, row: Row) -> list[str]:
    """Return a row of the table; accuracies with their 95 % intervals where n > 1."""
    epsilons = [row.epsilons.get(name) for name in results.adversaries]
    settings = [value.replace('"', "") for _, value in row.settings] or ["as given"]
    return [
        *settings,
        f"{len(row.seeds)}" if len(row.seeds) == row.planned else f"{len(row.seeds)}/{row.planned}",
        *("–" if value is None else epsilon_text(_portable(value)) for value in epsilons),
        *(_with_interval(row.estimates[key], 100, most=1.0) for key in ("fp32", "int8")),
        *(_mean(row.estimates[key], bytes_text) for key in ("up", "down")),
        _with_interval(row.estimates["seconds"], 1),
    ]


def _portable(value: float) -> float | str:
    return "infinity" if value == float("inf") else value


def _with_interval(value: Estimate | None, scale: float, most: float = math.inf) -> str:
    """Return ``mean ± std [low, high]``, cut where no value can be; the mean alone for one."""
    if value is None:
        return "–"
    if value.std is None:
        return f"{scale * value.mean:.1f}"
    low, high = scale * max(0.0, value.low), scale * min(most, value.high)
    return f"{scale * value.mean:.1f} ± {scale * value.std:.1f} [{low:.1f}, {high:.1f}]"


def _mean(value: Estimate | None, text: Callable[[float], str]) -> str:
    return "–" if value is None else text(value.mean)


LEGEND = (
    "Mean ± sample standard deviation over n seeds, in brackets the 95 % confidence interval of "
    "the mean (Student's t, n − 1 degrees of freedom; about seeds, not other data; cut at 0 and "
    "100 %). ε is the largest of any seed, of the client that spent most, each run by itself. "
    "Bytes are of one client and round, as encoded. Seconds are of all rounds of a run."
)
ROUNDED = (
    " Under aggregator trust bytes of updates are rounded up to two figures, in all files: the "
    "promise does not cover them."
)
LEFT_OUT = (
    " Bytes and seconds are not shown where clients are drawn in secret: they tell how many were."
)


def legend(results: Results) -> str:
    """Return what the figures of the table are."""
    plans = [point.plan for point in results.sweep.manifest.points]
    shown = [plan for plan in plans if not draws_in_secret(plan)]
    rounded = any(plan.private and plan.private.trust == "aggregator" for plan in shown)
    left_out = len(shown) < len(plans)
    return LEGEND + (ROUNDED if rounded else "") + (LEFT_OUT if left_out else "")


def tuning_lines(results: Results) -> list[str]:
    """Return what choosing among the runs costs, a sentence or two for each kind of promise."""
    return [tuning_note(tuning) for tuning in results.tuning]


def markdown(results: Results) -> str:
    """Return the table and what belongs to it as Markdown."""
    columns = headers(results)
    settings = len(results.rows[0].settings) or 1
    lines = [
        f"# Sweep of {len(results.sweep.manifest.points)} runs",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * settings}{'---:|' * (len(columns) - settings)}",
        *(f"| {' | '.join(cells(results, row))} |" for row in results.rows),
        "",
        legend(results),
        "",
        *(line + "\n" for line in tuning_lines(results)),
    ]
    if results.failures:
        lines += ["Failed:", "", *(f"- {k}: {why}" for k, why in results.failures.items()), ""]
    return "\n".join(lines)


def csv_text(results: Results) -> str:
    """Return one line a setting, rounded no further; not known is empty, infinity is ``inf``."""
    stream = io.StringIO()
    rows = csv.writer(stream, lineterminator="\n")
    keys = [key for key, _ in results.rows[0].settings]
    figures = [f"{key}_{part}" for key in MEASURED for part in ("mean", "std", "ci95")]
    rows.writerow([*keys, "n", *(f"epsilon {name}" for name in results.adversaries), *figures])
    for row in results.rows:
        estimates: list[Any] = []
        for key in MEASURED:
            value = row.estimates[key]
            estimates += [value.mean, value.std, value.half] if value else [None] * 3
        epsilons = [row.epsilons.get(name) for name in results.adversaries]
        rows.writerow(
            [*(value for _, value in row.settings), len(row.seeds), *epsilons, *estimates]
        )
    return stream.getvalue()


def page(results: Results, drawn: dict[str, dict[str, Any]]) -> str:
    """Return the self-contained page: no scripts, no fonts, no requests.

    Raises:
        DependencyError: If Jinja2 is not installed.
    """
    manifest, best = results.sweep.manifest, results.best
    plan = manifest.points[0].plan
    links = [
        {
            "label": point.label.replace('"', ""),
            "folder": point.folder,
            "report": (results.sweep.run_of(point).folder / "report.html").is_file(),
            "problem": results.failures.get(point.folder, ""),
        }
        for point in manifest.points
    ]
    values = {
        "task": plan.task.name,
        "clients": plan.task.clients,
        "runs": len(manifest.points),
        "finished": results.finished,
        "seeds": manifest.seeds_each,
        "digest": manifest.digest,
        "settings": [key for key, _ in results.rows[0].settings] or ["plan"],
        "headers": headers(results),
        "rows": [
            {"cells": cells(results, row), "best": row is best and len(results.rows) > 1}
            for row in results.rows
        ],
        "best": best
        and {"label": best.label, "accuracy": best.accuracy, "epsilons": best.epsilons},
        "legend": legend(results),
        "tuning": list(zip(results.tuning, tuning_lines(results), strict=True)),
        "plots": drawn,
        "links": links,
        "failures": results.failures,
    }
    return filled("sweep.html.j2", values, escaped=True, package=__package__ or __name__)
