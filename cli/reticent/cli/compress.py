"""``reticent compress``: the best student and the cheapest update that keep a target."""

from __future__ import annotations

from pathlib import Path

import click

from reticent.core.errors import PlanError

from .output import emit, human_bytes, table
from .simulations import overrides_option, read_plan


@click.command()
@click.argument("path", required=False, type=click.Path(path_type=Path), metavar="[PLAN]")
@overrides_option
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="KIND=LIMIT",
    help="size=20kB, latency=100us or bytes=2kB (one update, up); may be repeated.",
)
@click.option("--trials", type=click.IntRange(1, 1000), default=30, show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("compressed"), show_default=True
)
@click.option("--json", "as_json", is_flag=True, help="JSON for machines.")
def compress(
    path: Path | None,
    overrides: tuple[str, ...],
    targets: tuple[str, ...],
    trials: int,
    out: Path,
    as_json: bool,
) -> None:
    """Search the techniques for the most accurate student that meets every target.

    Reads public data only, so it costs no privacy budget. Writes to --out the table of candidates
    (pareto.md, pareto.json), its plot (pareto.svg) and the plan that won (plan.toml). Exit status
    3 when no candidate meets the targets; the files are written all the same.
    """
    from reticent.simulations.compress import parse_targets, search
    from reticent.simulations.compress.search import standard_error, ties
    from reticent.simulations.compress.writing import (
        HEADERS,
        nearest,
        require_writable,
        rows,
        to_json,
        write_outcome,
    )

    plan, limits = read_plan(path, overrides), parse_targets(targets)
    require_writable(out)
    say = (lambda line: None) if as_json else (lambda line: click.echo(line, err=True))
    outcome = search(plan, limits, trials, say)
    write_outcome(outcome, out)
    if as_json:
        emit(to_json(outcome))
    else:
        best = outcome.best
        click.echo(table(list(HEADERS), rows(outcome)))
        click.echo(
            f"\nbest: {best.candidate.name}: {human_bytes(best.size)}, {best.latency:.0f} µs, "
            f"{human_bytes(best.bytes)} up, {best.accuracy:.1%} of {best.judged} held-out public "
            f"examples, ± {standard_error(best):.1%}\n"
            f"{len(ties(outcome))} others meet the targets and are as accurate within that\n"
            f"wrote {out}; run it with `reticent simulate {out / 'plan.toml'}`"
        )
    if not outcome.met:
        raise PlanError(
            f"no candidate of {len(outcome.trials)} meets "
            f"{' and '.join(t.text for t in limits)}: {nearest(outcome)}"
        )
