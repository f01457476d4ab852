"""``reticent audit``: an empirical lower bound on epsilon beside the claim."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reticent.core.errors import PlanError, PrivacyError, RunError
from reticent.core.plan import Plan
from reticent.core.run import Run, write_atomic

from .output import emit, epsilon_text, table
from .simulations import overrides_option, read_plan

if TYPE_CHECKING:
    from reticent.privacy.schedule import Schedule
    from reticent.simulations.audit import Audit


@click.command()
@click.argument("path", required=False, type=click.Path(path_type=Path), metavar="[PLAN|RUN]")
@overrides_option
@click.option("--canaries", type=click.IntRange(min=1), help="Canaries; more show more.")
@click.option("--rounds", type=click.IntRange(min=1), help="Rounds to run; the claim is of these.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="JSON for machines.")
def audit(
    path: Path | None,
    overrides: tuple[str, ...],
    canaries: int | None,
    rounds: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Audit a plan, or the plan of a run: canaries through the real mechanism.

    Prints a lower bound on epsilon that holds at 99 % confidence, beside the claim, and tests the
    noise directly. For a run the result is also written to RUN/audit.json, for the report. The exit
    status is 5 if the audit contradicts the claim.
    """
    from reticent.simulations.audit import audit_plan

    plan, run = _subject(path, overrides)
    outcome = audit_plan(plan, canaries, rounds, seed, _used(plan, run))
    data = outcome.to_json(_command(path, overrides, canaries, rounds, seed))
    if run is not None:
        _write(run.folder / "audit.json", data)
        click.echo(
            f"wrote {run.folder / 'audit.json'}; `reticent report {run.folder}` shows it", err=True
        )
    if as_json:
        emit(data)
    else:
        click.echo(table(["what", "value"], _rows(outcome)))
    if outcome.verdict == "violated":
        raise PrivacyError(
            f"the audit contradicts the claim of ε {epsilon_text(outcome.claimed)}: "
            f"{_reason(outcome)}; do not rely on this build's privacy"
        )


def _write(path: Path, data: dict[str, Any]) -> None:
    try:
        write_atomic(path, json.dumps(data, indent=2).encode() + b"\n")
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from error


def _subject(path: Path | None, overrides: tuple[str, ...]) -> tuple[Plan, Run | None]:
    if path is None or not path.is_dir():
        return read_plan(path, overrides), None
    if overrides:
        raise PlanError(f"--set: cannot be used with a run: the plan of {path} is what it was")
    run = Run(path)
    return run.plan(), run


def _used(plan: Plan, run: Run | None) -> Schedule | None:
    """Return the schedule of a finished run: its noise, not what would be chosen today."""
    from reticent.privacy.report.spending import used_schedule

    if run is None or not run.summary.is_file():
        return None
    return used_schedule(plan, run.read_summary())


def _command(
    path: Path | None,
    overrides: tuple[str, ...],
    canaries: int | None,
    rounds: int | None,
    seed: int,
) -> str:
    parts = ["reticent", "audit", *([str(path)] if path else [])]
    for override in overrides:
        parts += ["--set", override]
    for name, value in (("canaries", canaries), ("rounds", rounds), ("seed", seed or None)):
        parts += [f"--{name}", str(value)] if value is not None else []
    return shlex.join(parts)


def _rows(a: Audit) -> list[list[str]]:
    low, high = a.interval
    rows = [
        ["plan", a.plan[:12]],
        ["what one neighbour is", f"one {a.unit}, {a.relation}"],
        [f"claimed ε (δ {a.delta:g})", epsilon_text(a.claimed)],
        ["lower bound on ε, 99 %", _bound(a.lower_bound)],
        ["  with any dependence between canaries", _bound(a.any_dependence)],
        ["  with any mechanism", _bound(a.any_mechanism)],
    ]
    if a.estimate is not None:
        rows.append(["estimate of ε, no guarantee", f"{a.estimate:.2f}"])
    rows += [
        ["right guesses", f"{a.right:,} of {a.canaries:,} ({low:.1%} to {high:.1%} at 99 %)"],
        ["rounds run", f"{a.rounds} of {a.participations} of one client"],
        *_randomness(a),
        ["seconds", f"{a.seconds:.1f}"],
        ["verdict", "VIOLATED" if a.verdict == "violated" else "consistent with the claim"],
    ]
    return rows


def _randomness(a: Audit) -> list[list[str]]:
    r, rows = a.randomness, []
    if r.largest_correlation is not None and r.limit is not None:
        text = f"{r.largest_correlation:.3f}, at most {r.limit:.3f} allowed"
        rows.append([f"largest correlation, {r.pairs:,} pairs", text])
    if r.variance_ratio is not None and r.variance_interval is not None:
        low, high = r.variance_interval
        rows.append(["noise variance over the promised", f"{r.variance_ratio:.4f}"])
        rows.append(["  what chance allows", f"{low:.4f} to {high:.4f}"])
    outcome = "passed" if r.passed else "FAILED"
    return [*rows, ["randomness", outcome if r.tested else "nothing to compare"]]


def _bound(value: float) -> str:
    # Rounded down: it is a lower bound.
    return f"{int(value * 100) / 100:.2f}"


def _reason(a: Audit) -> str:
    reasons = []
    if a.lower_bound > a.claimed:
        reasons.append(f"ε is at least {_bound(a.lower_bound)} at 99 % confidence")
    if not a.randomness.passed:
        reasons.append("the noise is not independent, or not of the promised size")
    return " and ".join(reasons)
