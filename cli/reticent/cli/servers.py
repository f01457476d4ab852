"""``reticent server init``: a real server's keys."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def server() -> None:
    """Set up the server of a real federation."""


@server.command()
@click.argument("folder", type=click.Path(path_type=Path))
def init(folder: Path) -> None:
    """Make the server's state in FOLDER: its signing key and its record of ledger heads.

    Devices that pin the public key refuse to go on with a ledger that was put back or copied.
    """
    from reticent.server.countersign import create_state

    public = create_state(folder)
    click.echo(f"server state in {folder}")
    click.echo(f'public key for devices: {public}  (node-config: server-key="/path/to/a/copy")')
