"""``reticent server``: keys, certificates and devices of a real federation's server."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .output import emit, table

if TYPE_CHECKING:
    from reticent.core.errors import ProvisionError
    from reticent.server.flower import Node
    from reticent.server.home import Home

directory_option = click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path),
    default=Path("."),
    envvar="RETICENT_SERVER",
    help="The server's directory; the current one, or $RETICENT_SERVER, when absent.",
)
_policy_option = click.option(
    "--policy", type=click.Path(path_type=Path), help="TOML file to propose to the devices' owners."
)
_UNTIL = "until it is told: by the next enroll, renew or revoke, or when it starts"
_names_argument = click.argument("names", nargs=-1, required=True, metavar="NAME...")


@click.group()
def server() -> None:
    """Set up and run the server of a real federation."""


@server.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--host",
    "hosts",
    default="127.0.0.1",
    metavar="NAME[,IP...]",
    help="How devices reach the server; the first is what they are told.",
)
@click.option("--port", type=click.IntRange(1, 65535), default=8000, help="The SuperLink's port.")
def init(folder: Path, hosts: str, port: int) -> None:
    """Make a server in FOLDER: authority, certificate, keys, SuperLink and systemd unit.

    Private keys are readable by their owner alone. Nothing is overwritten.
    """
    from reticent.server.certificates import utc_now
    from reticent.server.home import create_home

    home = create_home(folder, [host.strip() for host in hosts.split(",")], port, utc_now())
    click.echo(f"server in {home.folder}, for devices at {home.address}")
    for name in ("ca.crt", "server.crt"):
        click.echo(f"  {name:<12} until {home.certificate_ends(name):%Y-%m-%d}")
    click.echo(f"  public key   {home.keys / 'signing_key.pub.pem'}")
    click.echo(f"  systemd unit {home.unit}")
    click.echo(f"next: reticent server enroll --dir {home.folder} NAME...")


@server.command()
@_names_argument
@directory_option
@_policy_option
def enroll(names: tuple[str, ...], folder: Path, policy: Path | None) -> None:
    """Make a bundle for each NAME and let the SuperLink admit it.

    A bundle holds the device's private key: bring it to the device, compare the checksum there, and
    delete it here. If the SuperLink does not run, it is told when it starts.
    """
    from reticent.server.certificates import utc_now
    from reticent.server.enrolment import enroll as make_bundles

    home = _home(folder)
    _show_bundles(make_bundles(home, list(names), _policy(policy), utc_now()))
    _tell_superlink(home, f"it does not admit {', '.join(names)} {_UNTIL}")


@server.command()
@click.argument("name", metavar="NAME")
@directory_option
@_policy_option
def renew(name: str, folder: Path, policy: Path | None) -> None:
    """Give the device NAME a new key, in a new bundle.

    The old key is admitted until the device is seen with the new one, or the old one expires.
    """
    from reticent.server.certificates import utc_now
    from reticent.server.enrolment import renew as make_bundle

    home = _home(folder)
    _show_bundles([make_bundle(home, name, _policy(policy), utc_now())])
    _tell_superlink(home, f"it does not admit the new key of {name} {_UNTIL}")


@server.command()
@_names_argument
@directory_option
def revoke(names: tuple[str, ...], folder: Path) -> None:
    """Refuse each NAME from now on, for good.

    A run that goes on asks them for nothing more. May be repeated, so that a SuperLink that could
    not be told is told.
    """
    from reticent.server.certificates import utc_now
    from reticent.server.enrolment import revoke as record

    home = _home(folder)
    record(home, list(names), utc_now())
    for name in names:
        click.echo(f"{name}: revoked")
    until = "until you repeat this command or start it again; runs ask no more"
    _tell_superlink(home, f"it still admits {', '.join(names)} {until}")


@server.command()
@directory_option
def rotate(folder: Path) -> None:
    """Renew the server's certificate, from the same authority: devices need nothing new."""
    from reticent.server.certificates import utc_now
    from reticent.server.flower import answers
    from reticent.server.home import rotate_certificate

    home = _home(folder)
    click.echo(f"server.crt until {rotate_certificate(home, utc_now()):%Y-%m-%d}")
    if answers(home):
        click.echo("restart the SuperLink to use it")


@server.command("list")
@directory_option
@click.option("--json", "as_json", is_flag=True, help="JSON for machines.")
def list_devices(folder: Path, as_json: bool) -> None:
    """Show the enrolled devices, also while the SuperLink cannot be asked."""
    from reticent.server.certificates import utc_now
    from reticent.server.status import devices_status

    home = _home(folder)
    nodes, damage = superlink_nodes(home)
    devices = devices_status(home, nodes, utc_now())
    if as_json:
        emit(devices)
    else:
        click.echo(device_table(devices))
    if damage is not None:
        raise damage


def device_table(devices: Iterable[dict[str, Any]]) -> str:
    """Return devices as a table."""
    rows = [
        [d["name"], str(d["index"]), d["state"], d["last_seen"] or "-", d["key_expires"][:10]]
        for d in devices
    ]
    return table(["device", "index", "state", "last seen", "key until"], rows)


def superlink_nodes(home: Home) -> tuple[list[Node] | None, ProvisionError | None]:
    """Return what the SuperLink lists; None if it does not run, or for want of a certificate.

    Then what is wrong with that is the second value.
    """
    from reticent.core.errors import ProvisionError
    from reticent.server.flower import Flower, answers

    try:
        return (Flower(home).nodes() if answers(home) else None), None
    except ProvisionError as error:
        return None, error


def _home(folder: Path) -> Home:
    from reticent.server.home import open_home

    return open_home(folder)


def _policy(path: Path | None) -> str:
    from reticent.client.policy import parse_policy, read_text
    from reticent.server.enrolment import POLICY

    if path is None:
        return POLICY
    text = read_text(path)
    parse_policy(text, f"--policy {path}")
    return text


def _show_bundles(paths: list[Path]) -> None:
    from reticent.core.bundle import read_bundle

    for path in paths:
        bundle = read_bundle(path)
        click.echo(f"{bundle.name}: {path}  (key until {bundle.expires[:10]})")
        click.echo(f"  checksum {bundle.checksum}")


def _tell_superlink(home: Home, untold: str) -> None:
    """Tell a SuperLink that runs what was recorded.

    Raises:
        ReticentError: Why it could not be told, with what that means, in the words of ``untold``.
    """
    from reticent.core.errors import ReticentError
    from reticent.server.certificates import utc_now
    from reticent.server.enrolment import synchronize
    from reticent.server.flower import Flower, answers

    try:
        if answers(home):
            synchronize(home, Flower(home), utc_now(), click.echo)
        else:
            click.echo("the SuperLink does not run: it is told when it starts")
    except ReticentError as error:
        raise type(error)(
            f"{error}\nrecorded, but a SuperLink that runs was NOT told: {untold}"
        ) from error
