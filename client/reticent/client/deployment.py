"""The ClientApp of a real device, as a Flower app refers to it.

The agent (:mod:`.agent`) sets one key in the SuperNode's ``--node-config``:

``device-dir``
    The device's folder (:mod:`.folder`). Everything comes from it, and the owner's policy in it is
    held against every order (:mod:`.guard`).

Without an agent, and without a policy beyond the budget, an owner sets instead:

``state-dir``
    Folder of the device's ledger. It must outlive the SuperNode.
``budget-epsilon``, ``budget-delta``
    The hard stop of the ledger.
``partition-id``
    Index of the device's data in the task (0 for a task that loads the device's own data).
``budget-window-days`` (optional)
    The budget then holds for any stretch of so many days of device time, and renews as charges
    leave the window; without it the budget is for life.
``server-key`` (optional)
    PEM file with the server's public key. The device then refuses to go on with a ledger that
    lacks what that server has countersigned (:mod:`reticent.privacy.anchor`).
``node-key`` (optional)
    The SuperNode's private key. A server that enrolled the device takes no update without it
    (:mod:`reticent.privacy.bond`).

The server sets, in the run configuration, ``plan``: the plan as TOML text, and ``plan-signature``.
Randomness comes from the operating system; no message can change that.
"""

from __future__ import annotations

import logging
import traceback
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from flwr.app import Context, Message

from reticent.core.errors import (
    DataError,
    LedgerError,
    PayloadError,
    PlanError,
    PolicyError,
    ReticentError,
)
from reticent.core.plan import parse_plan
from reticent.core.printable import printable
from reticent.core.protocol import Refusal
from reticent.core.signing import read_public_key
from reticent.privacy.ledger import Budget, Ledger
from reticent.privacy.randomness import SystemRandomness

from .app import acknowledge, build_client_app, gate
from .budget import DEVICE, budget_of, remember_budget
from .delivery import Part, Recipient
from .diary import FAILED, REFUSED, Diary
from .environment import Environment
from .folder import open_device, read_node_key
from .guard import Guard
from .identity import open_identity
from .order import Refused
from .records import unpack

_log = logging.getLogger("reticent.device")
_T = TypeVar("_T", int, float, str)


@lru_cache(maxsize=1)
def _ledger(folder: Path) -> Ledger:
    return Ledger.open(folder)


def _environment(context: Context) -> Environment:
    """Return the device as its owner set it up."""
    try:
        return _read(context)
    except LedgerError as error:
        raise Refused(Refusal.LEDGER) from error


def _read(context: Context) -> Environment:
    if "device-dir" in context.node_config:
        return _guarded(context)
    folder = Path(_setting(context, "state-dir", str)).expanduser()
    index = _setting(context, "partition-id", int)
    return _device(folder, index, _budget(context), _servers(context), _node_key(context))


def _guarded(context: Context) -> Environment:
    """Return the device of a folder, under its owner's policy as it is at this moment."""
    device = open_device(Path(_setting(context, "device-dir", str)))
    policy = device.owners_policy()
    servers, node_key = [device.key("countersign")], read_node_key(device.node_key)
    own = _device(device.state, device.index, budget_of(policy), servers, node_key)
    signature = str(context.run_config.get("plan-signature", ""))
    guard = Guard(policy, device.signers(policy), signature, own.own_ledger, Diary(device.state))
    return replace(own, guard=guard)


def _recipient(context: Context) -> Recipient:
    """Return who takes models for the device: only one with an agent does."""
    if "device-dir" not in context.node_config:
        raise Refused(Refusal.POLICY) from PolicyError("a model is offered: there is no agent")
    device = open_device(Path(_setting(context, "device-dir", str)))
    signature = str(context.run_config.get("plan-signature", ""))
    return Recipient(device, lambda: _plan(context), signature)


def _part(message: Message) -> Part:
    """Return what a message brings of a model.

    Raises:
        Refused: If it makes no sense.
    """
    content = message.content
    try:
        chunk = unpack(content, "chunk") if "chunk" in content else b""
        offset = content.config_records["part"]["offset"]
        if type(offset) is not int:
            raise PayloadError(f"part.offset={offset!r}: must be int")
        return Part(unpack(content, "offer"), chunk, offset)
    except (PayloadError, KeyError) as error:
        raise Refused(Refusal.BAD_ORDER) from error


def _device(
    folder: Path,
    index: int,
    budget: Budget,
    servers: list[Ed25519PublicKey],
    node_key: ec.EllipticCurvePrivateKey | None,
) -> Environment:
    ledger = _ledger(folder)
    if budget.window is not None:
        ledger.tick()
    remember_budget(folder, budget)
    return Environment(
        client=index,
        device=DEVICE,
        ledger=ledger,
        budget=budget,
        randomness=SystemRandomness(),
        keeps_releases=True,
        identity=open_identity(folder, servers, node_key),
    )


def _budget(context: Context) -> Budget:
    epsilon = _setting(context, "budget-epsilon", float)
    delta = _setting(context, "budget-delta", float)
    if "budget-window-days" not in context.node_config:
        return Budget(epsilon, delta)
    return Budget(epsilon, delta, _setting(context, "budget-window-days", float) * 86400)


def _servers(context: Context) -> list[Ed25519PublicKey]:
    if "server-key" not in context.node_config:
        return []
    return [read_public_key(Path(_setting(context, "server-key", str)).expanduser())]


def _node_key(context: Context) -> ec.EllipticCurvePrivateKey | None:
    if "node-key" not in context.node_config:
        return None
    return read_node_key(Path(_setting(context, "node-key", str)).expanduser())


def _setting(context: Context, key: str, kind: type[_T]) -> _T:
    """Return a setting of the owner's.

    Raises:
        PlanError: If it is absent or of another type; nothing has a default, because a budget that
            nobody chose is no budget.
    """
    if key not in context.node_config:
        raise PlanError(f"node-config: {key} is absent: the device's owner must set it")
    given = context.node_config[key]
    allowed = (int, float) if kind is float else (kind,)
    if isinstance(given, bool) or not isinstance(given, allowed):
        raise PlanError(f"node-config: {key}={given!r}: must be {kind.__name__}")
    return kind(given)


def _plan(context: Context) -> str:
    """Return the plan that the server runs, as JSON.

    Raises:
        PlanError: If it is none.
        Refused: If it counts on secret coins: a device is asked or not, and sees no coin.
    """
    plan = parse_plan(str(context.run_config.get("plan", "")), where="run-config plan")
    if plan.private is not None and plan.private.secret_cohort:
        said = "privacy.secret_cohort=true: must be false on real devices"
        raise Refused(Refusal.POLICY) from PolicyError(said)
    return plan.canonical()


def _tell_owner(error: Exception, message: Message, context: Context) -> None:
    """Write to the device's own log why something was not done; the server gets a code.

    The text of an error that nobody foresaw may hold data, and logs travel: where it happened is
    enough. Text that came with a message is shown so that it can do nothing to a terminal.
    """
    foreseen = isinstance(error, Refused | ReticentError)
    reason = printable(str(_shown(error))) if foreseen else f"unexpected {type(error).__name__}"
    where = "" if foreseen else " at\n" + "".join(traceback.format_tb(error.__traceback__))
    what = "model not taken" if message.metadata.message_type == "query" else "round not run"
    _log.error("%s: %s%s", what, reason, where)
    if "device-dir" in context.node_config:
        _write_down(error, reason, foreseen, message, context)


def _shown(error: Exception) -> BaseException:
    """Return what says most: a refusal is a code, and its cause why, if that is an error of ours.

    Any other error's own text is made for people, and its cause may be anything: a value of the
    data that a parser stumbled over.
    """
    cause = error.__cause__
    return cause if isinstance(error, Refused) and isinstance(cause, ReticentError) else error


def _write_down(
    error: Exception, reason: str, foreseen: bool, message: Message, context: Context
) -> None:
    code = _code(error)
    order = message.content.config_records.get("order") if message.has_content() else None
    given = dict(order) if order is not None else {}
    plan, number = given.get("plan"), given.get("round")
    state = Path(str(context.node_config["device-dir"])) / "state"
    with suppress(OSError):  # a full disk: the server still gets the code
        Diary(state).add(
            REFUSED if foreseen else FAILED,
            reason,
            plan if isinstance(plan, str) else "",
            number if isinstance(number, int) else 0,
            int(code),
        )


def _code(error: Exception) -> Refusal:
    if isinstance(error, Refused):
        return error.refusal
    return Refusal.NO_DATA if isinstance(error, DataError) else Refusal.FAILED


app = build_client_app(_environment, _plan, _tell_owner)


@app.query(mods=[gate])
def query(message: Message, context: Context) -> Message:
    """Take a part of the model that the server offers, and say how much of it has arrived."""
    try:
        return acknowledge(message, _recipient(context).receive(_part(message)))
    except Exception as error:
        _tell_owner(error, message, context)
        raise
