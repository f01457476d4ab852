"""``reticent report``."""

from __future__ import annotations

from pathlib import Path

import click

from reticent.core.run import Run

FORMATS = ("html", "json", "md")


@click.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@click.option(
    "--format",
    "kind",
    type=click.Choice(FORMATS),
    help="Print this format to standard output instead of writing all three files.",
)
def report(run: Path, kind: str | None) -> None:
    """Write the privacy-budget report of RUN: report.html, report.json and report.md."""
    from reticent.privacy.report import render, write_reports

    folder = Run(run)
    if kind is not None:
        click.echo(render(folder, kind))
        return
    for path in write_reports(folder):
        click.echo(str(path))
