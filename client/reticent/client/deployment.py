"""The ClientApp of a real device, as a Flower app refers to it.

The device's owner sets, in the SuperNode's ``--node-config``:

``state-dir``
    Folder of the device's ledger. It must outlive the SuperNode.
``budget-epsilon``, ``budget-delta``
    The hard stop of the ledger.
``partition-id``
    Index of the device's data in the task (0 for a task that loads the device's own data).

The server sets, in the run configuration, ``plan``: the plan as TOML text. Randomness comes from
the operating system; no message can change that.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from flwr.app import Context

from reticent.core.errors import LedgerError, PlanError, ReticentError
from reticent.core.plan import parse_plan
from reticent.core.protocol import Refusal
from reticent.privacy.ledger import Budget, Ledger
from reticent.privacy.randomness import SystemRandomness

from .app import build_client_app
from .environment import Environment
from .round import Refused

_log = logging.getLogger("reticent.device")
_T = TypeVar("_T", int, float, str)


@lru_cache(maxsize=1)
def _ledger(folder: str) -> Ledger:
    return Ledger.open(Path(folder).expanduser())


def _environment(context: Context) -> Environment:
    """Return the device as its owner set it up.

    What is wrong with the settings is written to the device's own log; the server gets a code.
    """
    try:
        return _read(context)
    except ReticentError as error:
        _log.error("%s", error)
        if isinstance(error, LedgerError):
            raise Refused(Refusal.LEDGER) from error
        raise


def _read(context: Context) -> Environment:
    return Environment(
        client=_setting(context, "partition-id", int),
        device="device",
        ledger=_ledger(_setting(context, "state-dir", str)),
        budget=Budget(
            _setting(context, "budget-epsilon", float), _setting(context, "budget-delta", float)
        ),
        randomness=SystemRandomness(),
        keeps_releases=True,
    )


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


app = build_client_app(_environment, _plan)
