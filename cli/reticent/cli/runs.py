"""``reticent runs``: list the runs under a folder, or compare runs."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import click

from reticent.core.run import Run

from .output import emit, epsilon_text, human_bytes, table

SORTS = ("name", "state", "task", "epsilon", "accuracy", "bytes", "seconds", "date", "seed")


@click.command()
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path), metavar="[DIR | RUN RUN …]")
@click.option("--sort", type=click.Choice(SORTS), default="name", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="JSON for machines.")
def runs(paths: tuple[Path, ...], sort: str, as_json: bool) -> None:
    """List every run under DIR (default: runs), or compare two or more RUNs.

    A damaged run is a line that says what is wrong with it. The comparison has every key in which
    the plans differ, and the figures.
    """
    from reticent.simulations.runs import describe, find_runs, sort_rows

    if len(paths) > 1:
        _compare(paths, as_json)
        return
    folder = paths[0] if paths else Path("runs")
    rows = sort_rows([describe(path) for path in find_runs(folder)], sort)
    if as_json:
        emit(rows)
        return
    if not rows:
        click.echo(f"no runs under {folder}")
        return
    click.echo(table([*_HEADERS], [_cells(row, folder) for row in rows]))
    for row in rows:
        if row["problem"]:
            click.echo(f"{_name(row, folder)}: {row['problem']}")


_HEADERS = ("run", "state", "task", "seed", "trust", "ε", "accuracy", "bytes", "seconds", "date")


def _cells(row: dict[str, Any], folder: Path) -> list[str]:
    return [_name(row, folder), _state(row), *(_text(row, key) for key in _FIGURES)]


_FIGURES = ("task", "seed", "trust", "epsilon", "accuracy", "bytes", "seconds", "date")


def _name(row: dict[str, Any], folder: Path) -> str:
    path = Path(row["run"])
    return str(path.relative_to(folder)) if path != folder else str(path)


def _state(row: dict[str, Any]) -> str:
    if row["state"] in ("finished", "damaged"):
        return row["state"]
    return f"{row['state']} at {row['round']}/{row['rounds']}"


def _text(row: dict[str, Any], key: str) -> str:
    value = row[key]
    if value is None:
        return "–"
    shown = {
        "epsilon": lambda: epsilon_text(value),
        "accuracy": lambda: f"{value:.1%}",
        "bytes": lambda: human_bytes(value),
        "seconds": lambda: f"{value:.1f}",
        "date": lambda: _local(value),
    }
    return shown[key]() if key in shown else str(value)


def _local(date: str) -> str:
    """Return a time on this machine's clock; a day alone as it is."""
    if "T" not in date:
        return date
    return datetime.fromisoformat(date).astimezone().strftime("%Y-%m-%d %H:%M")


_COMPARED = ("state", "epsilon", "server_epsilon", "accuracy", "bytes", "seconds", "date")


def _compare(paths: tuple[Path, ...], as_json: bool) -> None:
    from reticent.simulations.runs import describe, differing_keys

    plans = [Run(path).plan() for path in paths]  # a run without a plan cannot be compared
    rows = [describe(path) for path in paths]
    keys = differing_keys(plans)
    if as_json:
        emit({"plan": dict(keys), "runs": rows})
        return
    shown = [[key, *("–" if v is None else str(v) for v in values)] for key, values in keys]
    for key in _COMPARED:
        shown.append([key, *(_compared(row, key) for row in rows)])
    click.echo(table(["", *map(str, paths)], shown))
    for row in rows:
        if row["problem"]:
            click.echo(f"{row['run']}: {row['problem']}")


def _compared(row: dict[str, Any], key: str) -> str:
    if key == "state":
        return _state(row)
    if key == "server_epsilon":
        return "–" if row[key] is None else epsilon_text(row[key])
    return _text(row, key)
