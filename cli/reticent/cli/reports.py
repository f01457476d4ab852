"""``reticent report``: write, verify and compare privacy-budget reports."""

from __future__ import annotations

from pathlib import Path

import click

from reticent.core.run import Run

from .output import table

FORMATS = ("html", "json", "md")


@click.command()
@click.argument("runs", type=click.Path(path_type=Path), metavar="RUN [OTHER]", nargs=-1)
@click.option(
    "--format",
    "kind",
    type=click.Choice(FORMATS),
    help="Print this format to standard output instead of writing files.",
)
@click.option("--verify", is_flag=True, help="Check the signed report of RUN against the run.")
@click.option(
    "--key",
    type=click.Path(path_type=Path),
    help="Public key (PEM) to verify with; default: the run's own.",
)
@click.option("--schema", is_flag=True, help="Print the JSON Schema of report.json.")
def report(
    runs: tuple[Path, ...], kind: str | None, verify: bool, key: Path | None, schema: bool
) -> None:
    """Write the privacy-budget report of RUN, signed with the run's key.

    The files are report.html, report.json, report.md and report.sig. With a second run, compare
    the two side by side and write nothing.
    """
    _require_sense(runs, kind, verify, key, schema)
    if schema:
        from reticent.privacy.report import schema_text

        click.echo(schema_text(), nl=False)
    elif verify:
        _verify(Run(runs[0]), key)
    elif len(runs) == 2:
        _compare(runs[0], runs[1], kind)
    else:
        _write(Run(runs[0]), kind)


def _require_sense(
    runs: tuple[Path, ...], kind: str | None, verify: bool, key: Path | None, schema: bool
) -> None:
    if schema and (runs or kind or verify or key):
        raise click.UsageError("--schema stands alone: it is the same for every run")
    if not schema and len(runs) not in (1, 2):
        raise click.UsageError(f"{len(runs)} runs are given: give one to report, or two to compare")
    if verify and (len(runs) != 1 or kind):
        raise click.UsageError("--verify takes one RUN and no --format")
    if key is not None and not verify:
        raise click.UsageError("--key is for --verify")


def _write(run: Run, kind: str | None) -> None:
    from reticent.privacy.report import SIGNATURE, render, write_reports

    if kind is not None:
        click.echo(render(run, kind), nl=False)
        return
    paths = write_reports(run)
    for path in paths:
        click.echo(str(path))
    if paths[-1].name != SIGNATURE:
        click.echo(f"not signed: {run.keys} holds no signing key", err=True)


def _verify(run: Run, given: Path | None) -> None:
    from reticent.core.signing import read_public_key
    from reticent.privacy.report import public_key_path, verify_report

    key = public_key_path(run, given)
    for line in verify_report(run, read_public_key(key)):
        click.echo(line)
    click.echo(f"verified with {key}")
    if given is None:
        click.echo(
            "that key lies beside the report: it shows that nothing was damaged, not who wrote it"
        )


def _compare(first: Path, second: Path, kind: str | None) -> None:
    from reticent.privacy.report import collect, compare, render_comparison

    comparison = compare(collect(Run(first)), collect(Run(second)))
    names = (str(first), str(second))
    if kind is not None:
        click.echo(render_comparison(comparison, names, kind), nl=False)
        return
    rows = [[row["what"], row["a"], row["b"], row["mark"]] for row in comparison["rows"]]
    click.echo(table(["", *names, ""], rows))
    for note in comparison["notes"]:
        click.echo(f"\n{note}")
