"""``reticent data add`` and ``reticent data list``: data sets that users bring, and all others."""

from __future__ import annotations

from pathlib import Path

import click

from reticent.core.tasks.catalogue import entries
from reticent.core.tasks.har import add_har

from .output import emit, table


@click.group()
def data() -> None:
    """Add data sets of your own copy, and list what is there."""


@data.command()
@click.argument("name", type=click.Choice(["har"]), metavar="NAME")
@click.argument("path", type=click.Path(path_type=Path), metavar="PATH")
def add(name: str, path: Path) -> None:
    """Check your copy of NAME (har) at PATH and convert it into the data folder."""
    where, known = add_har(path)
    origin = "the file that the documented figures are of" if known else "a conversion of your own"
    click.echo(f"added {name} ({origin}): {where}")


@data.command("list")
@click.option("--json", "as_json", is_flag=True, help="JSON for machines.")
def list_data(as_json: bool) -> None:
    """Show every data set: whether it is there, and where or how to get it."""
    found = entries()
    if as_json:
        emit([entry._asdict() for entry in found])
        return
    click.echo(table(["data set", "there"], [[e.name, "yes" if e.ready else "no"] for e in found]))
    for entry in found:
        click.echo(f"{entry.name}: {entry.where}")
