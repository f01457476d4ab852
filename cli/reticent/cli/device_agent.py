"""``reticent device init``, ``renew``, ``run`` and ``status``: the client on an edge device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .devices import device
from .output import emit, epsilon_text, human_bytes, table

if TYPE_CHECKING:
    from reticent.client.folder import Device

directory_option = click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path),
    default=Path("device"),
    envvar="RETICENT_DEVICE",
    help="The device's folder; ./device, or $RETICENT_DEVICE, when absent.",
)
_bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))


@device.command()
@_bundle_argument
@directory_option
@click.option("--accept", is_flag=True, help="Accept the policy that the operator proposes.")
def init(bundle: Path, folder: Path, accept: bool) -> None:
    """Make the device's folder from its BUNDLE.

    Compare the checksum with the one that `server enroll` printed. The operator's policy is a
    proposal: nothing runs until the device's owner has accepted it, or another one.
    """
    from reticent.client.folder import accept_policy, create_device
    from reticent.client.policy import parse_policy, read_text
    from reticent.core.bundle import read_bundle

    found = read_bundle(bundle)
    click.echo(f"bundle of {found.name} for {found.address}, key until {found.expires[:10]}")
    click.echo(f"  checksum {found.checksum}")
    if accept:
        parse_policy(found.policy, f"{bundle}: policy")
    made = create_device(folder, found)
    click.echo(f"device in {made.folder}")
    click.echo(f"  systemd unit {made.unit}")
    if accept:
        accept_policy(made, read_text(made.proposal), str(made.proposal))
        click.echo(f"  policy       {made.policy} (as proposed)")
        click.echo(f"next: reticent device run --dir {made.folder}")
    else:
        click.echo(f"read {made.proposal}, and edit a copy of it if you want another; then")
        click.echo(f"  reticent device policy accept --dir {made.folder} [FILE]")


@device.command()
@_bundle_argument
@directory_option
def renew(bundle: Path, folder: Path) -> None:
    """Take a new BUNDLE of the same device, with a new key; ledger and policy stay.

    Stop the agent first: until it is started again it is connected by the old key.
    """
    from reticent.client.folder import open_device, renew_device
    from reticent.core.bundle import read_bundle

    found = read_bundle(bundle)
    click.echo(f"bundle of {found.name} for {found.address}, key until {found.expires[:10]}")
    click.echo(f"  checksum {found.checksum}")
    renew_device(open_device(folder), found)
    click.echo("start the agent to use it")


@device.command()
@directory_option
def run(folder: Path) -> None:
    """Keep the device connected to its server, until it is told to stop.

    The SuperNode's output goes to agent.log in the folder. Ends with status 0 after SIGTERM or
    Ctrl-C.
    """
    from reticent.client.agent import Agent
    from reticent.client.folder import open_device

    Agent(open_device(folder), click.echo).run()
    click.echo("stopped")


@device.command()
@directory_option
@click.option("--json", "as_json", is_flag=True, help="JSON for machines.")
def status(folder: Path, as_json: bool) -> None:
    """Show the agent, the connection, what was done and refused, and whether a round is welcome."""
    from datetime import datetime

    from reticent.client.folder import open_device
    from reticent.client.status import device_status

    found = device_status(open_device(folder), datetime.now().astimezone())
    if as_json:
        emit(found)
        return
    if found["key_warning"]:
        click.echo(f"warning: {found['key_warning']}")
    click.echo(table(["what", "value"], _rows(found)))
    if found["refusals"]:
        counts = [[reason, str(count)] for reason, count in found["refusals"].items()]
        click.echo("\n" + table(["refused", "times"], counts))


@device.command()
@directory_option
def rollback(folder: Path) -> None:
    """Use the model before the current one again; the current one is removed.

    The server cannot bring back the version that was removed, nor an older one.
    """
    from reticent.client.disk import mapped
    from reticent.client.models import Models

    models = Models(opened(folder).models)
    with mapped(models.folder), models.alone():
        state = models.roll_back()
    click.echo(f"model {state.version} is the current one")


def opened(folder: Path) -> Device:
    """Open a device's folder."""
    from reticent.client.folder import open_device

    return open_device(folder)


def _rows(found: dict[str, Any]) -> list[list[str]]:
    agent, last, rounds = found["agent"], found["last_round"], found["rounds_released"]
    rows = [
        ["device", f"{found['name']}, of {found['server']}"],
        ["agent", _agent(agent)],
        ["connection", str(agent.get("connection", "none"))],
        ["rounds released", "unknown" if rounds is None else f"{rounds}"],
        ["last round", "none" if last is None else f"{last['round']}, {_time(last['at'])}"],
        ["model", _model(found["model"])],
        *_sensor_rows(found["sensors"]),
        ["a round now", "accepted" if found["accepts_now"] else "refused"],
        *[["", f"because {reason}"] for reason in found["against"]],
    ]
    budget = found["budget"]
    if budget is not None:
        rows.append(["budget", f"ε {_epsilon(budget['epsilon'])} at δ {budget['delta']:g}"])
        rows.append(["spent of it", f"ε {_epsilon(budget['spent'])}, {budget['rounds']} rounds"])
    return rows


def _agent(agent: dict[str, Any]) -> str:
    if agent["state"] == "stopped":
        return "stopped"
    return f"{agent['state']}, process {agent.get('pid', '?')}, {agent.get('restarts', 0)} restarts"


def _model(model: dict[str, Any]) -> str:
    if "problem" in model:
        return model["problem"]
    if not model["installed"]:
        return "none"
    current, *before = (f"{m['version']} of plan {m['plan'][:12]}" for m in model["installed"])
    return current + (f", and {before[0]} to go back to" if before else "")


def _sensor_rows(seen: dict[str, Any]) -> list[list[str]]:
    shown = {
        "charging": _yes(seen["charging"]),
        "battery": _unknown(seen["battery"], "{:.0%}"),
        "metered": _yes(seen["metered"]),
        "hottest": _unknown(seen["celsius"], "{:.0f} °C"),
        "busy": _unknown(seen["pressure"], "{:.0%}"),
        "free memory": "unknown"
        if seen["free_memory"] is None
        else human_bytes(seen["free_memory"]),
        "free disk": human_bytes(seen["free_disk"]),
    }
    return [[name, value] for name, value in shown.items()]


def _yes(value: bool | None) -> str:
    return "unknown" if value is None else "yes" if value else "no"


def _unknown(value: float | None, form: str) -> str:
    return "unknown" if value is None else form.format(value)


def _epsilon(value: float | str) -> str:
    return epsilon_text(value)


def _time(at: float) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M:%S")
