"""``reticent device policy``: what the device's owner allows."""

from __future__ import annotations

import tomllib
from pathlib import Path

import click

from .device_agent import device, directory_option, opened
from .output import emit


@device.group()
def policy() -> None:
    """Show, check and change what the device takes part in."""


@policy.command()
@directory_option
@click.option("--json", "as_json", is_flag=True, help="JSON for machines, with every default.")
def show(folder: Path, as_json: bool) -> None:
    """Show the accepted policy."""
    from reticent.client.policy import read_text

    found = opened(folder)
    accepted = found.owners_policy()
    if as_json:
        emit(accepted.model_dump(mode="json"))
    else:
        click.echo(read_text(found.policy).rstrip())


@policy.command()
@click.argument("file", type=click.Path(path_type=Path))
def check(file: Path) -> None:
    """Check a policy FILE without using it."""
    from reticent.client.policy import load_policy

    limit = load_policy(file).budget
    click.echo(f"{file}: a policy, with a budget of epsilon {limit.epsilon:g} at {limit.delta:g}")


@policy.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@directory_option
def accept(file: Path | None, folder: Path) -> None:
    """Accept FILE, or the operator's proposal, as the owner's policy; it holds from now on."""
    from reticent.client.folder import accept_policy
    from reticent.client.policy import read_text

    found = opened(folder)
    source = file or found.proposal
    limit = accept_policy(found, read_text(source), str(source)).budget
    click.echo(f"{found.policy}: budget epsilon {limit.epsilon:g} at delta {limit.delta:g}")


@policy.command("set")
@click.argument("changes", nargs=-1, required=True, metavar="SECTION.KEY=VALUE...")
@directory_option
def set_keys(changes: tuple[str, ...], folder: Path) -> None:
    """Change keys of the accepted policy; an empty VALUE takes a key out. Comments are lost."""
    import tomli_w

    from reticent.client.folder import accept_policy
    from reticent.client.policy import changed, policy_from, read_text

    found = opened(folder)
    found.owners_policy()
    data = tomllib.loads(read_text(found.policy))
    for change in changes:
        data = changed(data, change)
    policy_from(data)
    accept_policy(found, tomli_w.dumps(data), str(found.policy))
    click.echo("; ".join(changes))
