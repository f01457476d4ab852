"""``reticent sweep``: one plan over a grid of settings and over seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reticent.core.errors import PlanError, RunError

from .output import Progress, epsilon_text, table
from .simulations import committed_rounds, interruptible, overrides_option

if TYPE_CHECKING:
    from reticent.simulations.sweep import Manifest, Point, Results, Sweep


@click.command()
@click.argument("plan_file", required=False, type=click.Path(path_type=Path), metavar="[PLAN]")
@overrides_option
@click.option(
    "--grid",
    "grids",
    multiple=True,
    metavar="KEY=V1,V2,…",
    help="Values of a key of the plan; may be repeated, and the product is run.",
)
@click.option("--seeds", type=click.IntRange(1, 1000), default=1, show_default=True)
@click.option("--run", "folder", type=click.Path(path_type=Path), help="The sweep's folder.")
@click.option("--resume", is_flag=True, help="Continue the sweep in --run as it was begun.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def sweep(
    plan_file: Path | None,
    overrides: tuple[str, ...],
    grids: tuple[str, ...],
    seeds: int,
    folder: Path | None,
    resume: bool,
    as_json: bool,
) -> None:
    """Run PLAN with every combination of --grid values, with --seeds seeds each.

    Each point is an ordinary run directory in the sweep's folder. The same command, or --resume,
    continues after what is finished. Ends with tables, plots and a page. Exit status 8 when a point
    failed; the others are run all the same.
    """
    from reticent.simulations.sweep import collect_results, open_sweep, run_sweep, write_results
    from reticent.simulations.sweep.results import to_json

    manifest = _manifest(plan_file, overrides, grids, seeds, folder, resume)
    where = folder or Path("runs") / f"sweep-{manifest.digest[:8]}"
    opened = open_sweep(where, manifest)
    show = _Show(opened, as_json)
    show.say(_headline(manifest, where))
    words = (
        "interrupted: finished runs and committed rounds are kept; continue with `reticent "
        f"sweep --run {where} --resume`"
    )
    with interruptible(show.clear, lambda: words):
        failures = run_sweep(opened, show.told())
    results = collect_results(opened, failures)
    written = write_results(results)
    if as_json:
        click.echo(json.dumps(to_json(results)))
    else:
        click.echo(_closing(results, written[-1]))
    if results.failures:
        reasons = "\n  ".join(f"{name}: {why}" for name, why in results.failures.items())
        raise RunError(
            f"{len(results.failures)} of {len(manifest.points)} points failed; continue with "
            f"`reticent sweep --run {where} --resume`:\n  {reasons}"
        )


def _manifest(
    plan_file: Path | None,
    overrides: tuple[str, ...],
    grids: tuple[str, ...],
    seeds: int,
    folder: Path | None,
    resume: bool,
) -> Manifest:
    from reticent.simulations.sweep import parse_grid, read_manifest
    from reticent.simulations.sweep.manifest import manifest_of
    from reticent.simulations.sweep.points import Base

    if resume and folder is None:
        raise PlanError("--resume: needs --run, the folder of the sweep to continue")
    if resume and folder is not None and not (plan_file or overrides or grids or seeds > 1):
        return read_manifest(folder)
    if not grids and seeds == 1:
        raise PlanError(
            "a sweep needs --grid KEY=V1,V2,… or --seeds: without them it is `reticent simulate`"
        )
    base = Base("", overrides, "default plan")
    if plan_file is not None:
        base = Base(_text(plan_file), overrides, str(plan_file))
    return manifest_of(base, parse_grid(grids), seeds)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: cannot be read: {error}") from error


def _headline(manifest: Manifest, where: Path) -> str:
    from reticent.privacy.report.words import count_text

    runs, seeds = len(manifest.points), manifest.seeds_each
    return (
        f"sweep {manifest.digest[:12]}: {count_text(runs, 'run')} "
        f"({count_text(runs // seeds, 'setting')}, {count_text(seeds, 'seed')} each)\n"
        f"sweep folder {where}"
    )


class _Show:
    """Tells a person, or a machine, how the sweep goes."""

    def __init__(self, sweep: Sweep, as_json: bool) -> None:
        self._sweep, self._json = sweep, as_json
        self._progress = Progress(1, as_json)
        self._folder, self._said = "", set[str]()

    def told(self) -> Any:
        """Return what :func:`run_sweep` calls."""
        from reticent.simulations.sweep.running import Show

        return Show(self._begins, self._says, self._round, self._ended)

    def say(self, line: str) -> None:
        """Print a line of its own."""
        self._progress.say(line)

    def clear(self) -> None:
        """End the live line."""
        self._progress.clear()

    def _begins(self, number: int, point: Point) -> None:
        run = self._sweep.run_of(point)
        before, self._folder = committed_rounds(run), str(run.folder)
        self._progress = Progress(point.plan.federation.rounds, self._json, before)
        self._progress.say(f"[{number}/{len(self._sweep.manifest.points)}] {point.label}")

    def _says(self, line: str) -> None:
        # What each run says is said once; where its files are, the sweep's folder tells.
        if line not in self._said and self._folder not in line:
            self._said.add(line)
            self._progress.say(line if self._json else f"    {line}")

    def _round(self, metrics: dict[str, Any]) -> None:
        if self._progress.live:  # a log has one line a run; each run's rounds are in its folder
            self._progress.round(metrics)

    def _ended(self, point: Point, outcome: dict[str, Any] | str, took: float) -> None:
        from reticent.privacy.schedule import draws_in_secret

        self._progress.erase()
        if isinstance(outcome, str):
            self._progress.say(f"    failed: {outcome}")
            return
        accuracy, privacy = outcome["accuracy"], outcome["privacy"]
        deployed = accuracy.get("int8", accuracy["fp32"])
        # Seconds grow with the number of clients that were drawn, and lines end up in logs.
        seconds = "" if draws_in_secret(point.plan) else f"   {took:.0f} s"
        self._progress.say(
            f"    accuracy {deployed:.1%}   ε {epsilon_text(privacy['epsilon'])}{seconds}"
        )


def _closing(results: Results, page: Path) -> str:
    from reticent.simulations.sweep.writing import cells, headers, legend, tuning_lines

    rows = [cells(results, row) for row in results.rows]
    lines = ["", table(headers(results), rows), "", legend(results)]
    lines += [f"\n{line}" for line in tuning_lines(results) if line]
    return "\n".join([*lines, "", f"page  {page}"])
