"""What a server and its last run are doing, from files and, if it runs, from the SuperLink."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from types import NoneType
from typing import Any

from reticent.core.errors import NetworkError, ProvisionError, ReticentError, RunError
from reticent.core.run import Run
from reticent.privacy.report.collect import size_rule

from .attempt import FAILED, FINISHED, read_attempt
from .certificates import WARNING_DAYS, expiry_warning
from .flower import Node
from .home import Home
from .registry import Device, read_registry

_RENEWALS = {
    "ca.crt": "make a new server and enroll the devices again",
    "server.crt": "renew it with `reticent server rotate`",
}
_KINDS = {
    "dropped": (dict,),
    **dict.fromkeys(("replies", "asked", "bytes_up", "bytes_down", "bytes_constants"), (int,)),
    "accuracy": (float, int, NoneType),
    "epsilon": (float, int, NoneType),
}
_NAMES = {"ca.crt": "the certificate authority", "server.crt": "the server's certificate"}


def warnings(
    home: Home, now: datetime, certificates: Iterable[str] = tuple(_RENEWALS)
) -> list[str]:
    """Return what expired or soon does: certificates, and keys of devices that are welcome.

    Raises:
        ProvisionError: If one of the certificates cannot be read.
    """
    found = [
        expiry_warning(_NAMES[name], home.certificate_ends(name), now, _RENEWALS[name])
        for name in certificates
    ]
    for name, device in read_registry(home.devices).devices.items():
        if device.revoked is None:
            ends = datetime.fromisoformat(device.key.expires)
            how = f"`reticent server renew {name}`"
            found.append(expiry_warning(f"the key of {name}", ends, now, how))
    return [warning for warning in found if warning is not None]


def server_status(home: Home, nodes: list[Node] | None, now: datetime) -> dict[str, Any]:
    """Return the server's state as JSON values.

    Of a certificate that cannot be read there is only ``file``, and ``problem``, which says why;
    without that of the authority nobody can tell whether a SuperLink runs.

    Args:
        home: The server.
        nodes: What the SuperLink lists; None if it does not run, or cannot be asked.
        now: The time.
    """
    certificates = [_certificate(home, name, now) for name in _RENEWALS]
    sound = [known["file"] for known in certificates if "problem" not in known]
    down = "down" if "ca.crt" in sound else "unknown"
    return {
        "address": home.address,
        "superlink": down if nodes is None else "up",
        "certificates": certificates,
        "devices": devices_status(home, nodes, now),
        "warnings": warnings(home, now, sound),
        "warning_days": WARNING_DAYS,
    }


def devices_status(home: Home, nodes: list[Node] | None, now: datetime) -> list[dict[str, Any]]:
    """Return every enrolled device, by name."""
    known = {node.id: node for node in nodes or []}
    devices = sorted(read_registry(home.devices).devices.items())
    return [_device(name, device, known, nodes is None, now) for name, device in devices]


def run_status(run: Run) -> dict[str, Any]:
    """Return a run's progress; only what it has released: its metrics, and how it ended.

    Under aggregator trust the bytes of updates are as coarse as in the report: they follow from
    single updates, which the promise to readers does not cover.

    Raises:
        RunError: If there is no run, or it is damaged.
    """
    plan = run.plan()
    metrics = _metrics(run)
    dropped = Counter[str]()
    for line in metrics:
        dropped.update(line["dropped"])
    claimed = [line["epsilon"] for line in metrics if line["epsilon"] is not None]
    shown = size_rule("off" if plan.private is None else plan.private.trust)
    return {
        "folder": str(run.folder),
        "plan": plan.digest,
        **_activity(run),
        "round": len(metrics),
        "rounds": plan.federation.rounds,
        "replies": sum(line["replies"] for line in metrics),
        "asked": sum(line["asked"] for line in metrics),
        "dropped": dict(dropped),
        "bytes_up": shown(sum(line["bytes_up"] for line in metrics)),
        "bytes_down": sum(line["bytes_down"] + line["bytes_constants"] for line in metrics),
        "accuracy": next((m["accuracy"] for m in reversed(metrics) if m["accuracy"]), None),
        "epsilon": claimed[-1] if claimed else None,
    }


def _metrics(run: Run) -> list[dict[str, Any]]:
    """Return the run's metrics, each line with what is added up here."""
    metrics = run.read_metrics()
    for number, line in enumerate(metrics, 1):
        for key, kinds in _KINDS.items():
            if key not in line:
                raise RunError(f"{run.metrics}: line {number}: damaged: {key} is absent")
            values = line[key].values() if type(line[key]) is dict else ()
            if type(line[key]) not in kinds or any(type(count) is not int for count in values):
                raise RunError(f"{run.metrics}: line {number}: damaged: {key}={line[key]!r}")
    return metrics


def last_run(home: Home) -> Run | None:
    """Return the run that this server served last; None if there was none."""
    try:
        return Run(Path(home.last_run.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise NetworkError(f"{home.last_run}: cannot be read: {error}") from error


def last_run_status(home: Home) -> dict[str, Any] | None:
    """Return the progress of the run that was served last; None if there was none.

    If it cannot be told, which says nothing about the server, there is only ``folder``, and
    ``problem``, which says why.
    """
    where = home.last_run
    try:
        run = last_run(home)
        if run is None:
            return None
        where = run.folder
        return run_status(run)
    except ReticentError as error:
        return {"folder": str(where), "problem": str(error)}


def ended_early(run: Run) -> str:
    """Return why a run's summary is not of all rounds; empty if it is, or if there is none.

    Raises:
        RunError: If the summary is damaged.
    """
    summary = run.read_summary() if run.summary.is_file() else {}
    if "stopped" not in summary:
        return ""
    number = summary.get("rounds")
    return f"devices' privacy budgets ended the training after round {number}, whose model is kept"


def _activity(run: Run) -> dict[str, Any]:
    attempt, early = read_attempt(run), ended_early(run)
    if attempt is not None and attempt.alive():  # also one that takes up a run that ended early
        seen = {"online": attempt.online, "missing": attempt.missing}
        return {"state": "running", **seen, "reason": ""}
    state, reason = "stopped", "its ServerApp is gone; continue with `reticent server run --resume`"
    if run.summary.is_file() and not early:
        state, reason = FINISHED, ""
    elif attempt is not None and attempt.state == FAILED:
        state, reason = FAILED, attempt.reason
    elif early:
        reason = f"{early}; `reticent server run --resume` takes it up again"
    elif attempt is None:
        state, reason = "not begun", ""
    return {"state": state, "online": None, "missing": "", "reason": reason}


def _certificate(home: Home, name: str, now: datetime) -> dict[str, Any]:
    try:
        ends = home.certificate_ends(name)
    except ProvisionError as error:
        return {"file": name, "problem": str(error)}
    return {"file": name, "expires": ends.isoformat(), "days": (ends - now).days}


def _device(
    name: str, device: Device, known: dict[int, Node], down: bool, now: datetime
) -> dict[str, Any]:
    nodes = [known[key.node] for key in device.keys if key.node in known]
    seen = [node.changed for node in nodes if node.changed is not None]
    return {
        "name": name,
        "index": device.index,
        "state": _state(device, nodes, down, now),
        "last_seen": max(seen, default=None),
        "key_expires": device.key.expires,
        "node": None if device.key.node is None else str(device.key.node),
        "revoked": device.revoked,
    }


def _state(device: Device, nodes: list[Node], down: bool, now: datetime) -> str:
    if device.revoked is not None:
        return "revoked"
    if device.key.expired(now):
        return "expired"
    if down:
        return "unknown"
    if any(node.status == "online" for node in nodes):
        return "online"
    if device.key.node is None:
        return "not registered"
    return "offline" if any(node.changed for node in nodes) else "never seen"
