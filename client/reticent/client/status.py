"""Everything an owner may want to know about a device at one look."""

from __future__ import annotations

import math
from dataclasses import asdict
from datetime import datetime
from typing import Any

from reticent.core.errors import ArtifactError, ReticentError, StorageError
from reticent.privacy.ledger import Budget, Ledger, Overview

from .agent import read_report
from .budget import DEVICE, budget_of
from .diary import RELEASED, Diary
from .disk import mapped
from .folder import Device, is_held
from .identity import require_met
from .models import Models
from .resources import LIBRARIES, Memory, disk_free
from .rules import against_now, against_room
from .sensors import Sensors

_WARN_DAYS = 30
_ENDLESS = Budget(math.inf, 1e-5)
"""To count the rounds of a ledger where no budget can be read."""


def device_status(
    device: Device,
    now: datetime,
    sensors: Sensors | None = None,
    memory: Memory | None = None,
) -> dict[str, Any]:
    """Return the state of a device, ready for JSON; what cannot be told says why in words.

    Rounds are counted by the ledger, which forgets none; the diary holds the last of them.

    Args:
        device: The device.
        now: The local time, with its zone.
        sensors: Where the device's state comes from.
        memory: Where free memory is looked up.
    """
    told, problems = _diary(device)
    seen, free = (sensors or Sensors()).read(), (memory or Memory()).free()
    disk = disk_free(device.state)
    limit, overview, rounds = None, None, None
    try:
        policy = device.owners_policy()
        limit, against = budget_of(policy), against_now(policy.when, seen, now)
        against += against_room(policy, free, disk, LIBRARIES)
    except ReticentError as error:
        against = [str(error)]
    against += problems
    try:
        overview = _overview(device, limit or _ENDLESS)
        rounds = 0 if overview is None else overview.releases
    except ReticentError as error:
        limit, against = None, [*against, str(error)]
    return {
        "name": device.name,
        "server": device.address,
        "key_expires": device.expires,
        "key_warning": _expiry(device, now),
        "agent": _agent(device),
        **told,
        "rounds_released": rounds,
        "model": _model(device),
        "sensors": {**asdict(seen), "free_memory": free, "free_disk": disk},
        "accepts_now": not against,
        "against": against,
        "budget": None if limit is None else _budget(limit, overview),
    }


def _diary(device: Device) -> tuple[dict[str, Any], list[str]]:
    """Return what the diary says, and why nothing can be written into it if it cannot be read."""
    diary = Diary(device.state)
    try:
        with mapped(diary.path):
            released = [line for line in diary.lines() if line.what == RELEASED]
            last = asdict(released[-1]) if released else None  # the diary keeps the last one
            return {"last_round": last, "refusals": diary.refusals()}, []
    except StorageError as error:
        return {"last_round": None, "refusals": {}}, [str(error)]


def _agent(device: Device) -> dict[str, Any]:
    report = read_report(device)
    if not is_held(device):
        told = {} if report is None else asdict(report)
        return {**told, "state": "stopped", "connection": "none", "pid": 0, "supernode": 0}
    return {"state": "starting"} if report is None else asdict(report)


def _model(device: Device) -> dict[str, Any]:
    try:
        state = Models(device.models).state()
    except ArtifactError as error:
        return {"installed": [], "problem": str(error)}
    return {"installed": [asdict(slot) for slot in state.slots], "highest": state.highest}


def _overview(device: Device, limit: Budget) -> Overview | None:
    """Return what the device's ledger says; None before its first round."""
    if not (device.state / "ledger.db").is_file():
        return None
    with Ledger.open(device.state) as ledger:
        require_met(ledger, device.state)
        return ledger.overview(DEVICE, limit)


def _budget(limit: Budget, found: Overview | None) -> dict[str, Any]:
    chosen = {"epsilon": _number(limit.epsilon), "delta": limit.delta, "window": limit.window}
    if found is None:
        return {**chosen, "spent": 0.0, "left": _number(limit.epsilon), "rounds": 0}
    spent, left = _number(found.spent), _number(found.remaining)
    return {**chosen, "spent": spent, "left": left, "rounds": found.charges}


def _expiry(device: Device, now: datetime) -> str:
    days = (datetime.fromisoformat(device.expires) - now).days
    if days >= _WARN_DAYS:
        return ""
    told = "expired" if days < 0 else f"expires in {days} days"
    return f"the node key {told}: ask the operator for a new bundle (`reticent server renew`)"


def _number(value: float) -> float | str:
    return "infinity" if math.isinf(value) else value
