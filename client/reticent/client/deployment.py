"""The ClientApp of a real device, as a Flower app refers to it.

The device's owner sets, in the SuperNode's ``--node-config``:

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

The server sets, in the run configuration, ``plan``: the plan as TOML text. Randomness comes from
the operating system; no message can change that.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from flwr.app import Context

from reticent.core.errors import LedgerError, PlanError, ReticentError
from reticent.core.plan import parse_plan
from reticent.core.protocol import Refusal
from reticent.core.signing import read_public_key
from reticent.privacy.ledger import Budget, Ledger
from reticent.privacy.randomness import SystemRandomness

from .app import build_client_app
from .budget import DEVICE, remember_budget
from .environment import Environment
from .identity import open_identity
from .round import Refused

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
    folder = Path(_setting(context, "state-dir", str)).expanduser()
    budget = _budget(context)
    ledger = _ledger(folder)
    if budget.window is not None:
        ledger.tick()
    remember_budget(folder, budget)
    return Environment(
        client=_setting(context, "partition-id", int),
        device=DEVICE,
        ledger=ledger,
        budget=budget,
        randomness=SystemRandomness(),
        keeps_releases=True,
        identity=open_identity(folder, _servers(context)),
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
    return parse_plan(str(context.run_config.get("plan", "")), where="run-config plan").canonical()


def _tell_owner(error: Exception) -> None:
    """Write to the device's own log why a round was not run; the server gets a code."""
    reason = error.__cause__ or error
    known = isinstance(reason, ReticentError | Refused)
    _log.error("round not run: %s", reason, exc_info=None if known else reason)


app = build_client_app(_environment, _plan, _tell_owner)
