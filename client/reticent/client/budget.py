"""The owner's budget as the device last ran with it, kept beside the ledger."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from reticent.core.errors import LedgerError
from reticent.core.run import write_atomic
from reticent.privacy.ledger import Budget
from reticent.privacy.ledger.files import alone

from .policy import Policy

DEVICE = "device"
"""The one name in a real device's ledger; who it is towards servers is its key."""


def budget_of(policy: Policy) -> Budget:
    """Return the budget of an owner's policy."""
    chosen = policy.budget
    return Budget(chosen.epsilon, chosen.delta, chosen.window)


def remember_budget(folder: Path, budget: Budget) -> None:
    """Write ``budget.json`` beside the ledger if it differs; nothing is ever decided from it.

    Raises:
        LedgerError: If it cannot be written.
    """
    path = folder / "budget.json"
    data = json.dumps(asdict(budget), indent=1).encode()
    try:
        _write_if_new(path, data)
    except OSError as error:
        raise LedgerError(f"{path}: cannot be written: {error.strerror}") from error


def _write_if_new(path: Path, data: bytes) -> None:
    with alone(path.parent):  # each message is a process of its own
        if not path.exists() or path.read_bytes() != data:
            write_atomic(path, data)


def remembered_budget(folder: Path) -> Budget | None:
    """Return the budget that the device last ran with; None when it never ran.

    Raises:
        LedgerError: If the file is damaged.
    """
    path = folder / "budget.json"
    try:
        return Budget(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise LedgerError(f"{path}: cannot be read: {error}") from error
