"""``reticent device budget``: what a device has spent, for its owner."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reticent.core.errors import LedgerError

from .output import emit, epsilon_text, table

if TYPE_CHECKING:
    from reticent.privacy.ledger import Budget, Overview

DAY = 86400


@click.group()
def device() -> None:
    """Look after the client on an edge device."""


@device.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="STATE_DIR")
@click.option("--epsilon", type=float, help="Compare with this budget instead of the owner's.")
@click.option("--delta", type=float, help="Its delta.")
@click.option("--window-days", type=float, help="Its window; without, the budget is for life.")
@click.option("--json", "as_json", is_flag=True, help="JSON for machines.")
def budget(
    folder: Path,
    epsilon: float | None,
    delta: float | None,
    window_days: float | None,
    as_json: bool,
) -> None:
    """Verify the ledger in STATE_DIR, or a device's folder; show what was spent and is left.

    It is compared with every countersigned head that the device has met, too.
    The budget is the one that the device last ran with, unless --epsilon is given.
    """
    from reticent.client.identity import require_met
    from reticent.privacy.ledger import Ledger

    if (folder / "device.toml").is_file():
        folder = folder / "state"
    if not (folder / "ledger.db").is_file():
        raise LedgerError(f"{folder}: holds no ledger: must be a device's state-dir")
    limit = _budget(folder, epsilon, delta, window_days)
    with Ledger.open(folder) as ledger:
        require_met(ledger, folder)
        names = ledger.devices() or ["device"]
        if len(names) > 1:
            raise LedgerError(
                f"{folder}: holds the ledger of {len(names)} simulated devices: must be one "
                "device's; `reticent report` shows a simulation's spending"
            )
        seen = ledger.overview(names[0], limit)
    if as_json:
        emit(_portable(asdict(seen)))
        return
    click.echo(table(["what", "value"], _rows(seen)))


def _budget(
    folder: Path, epsilon: float | None, delta: float | None, window_days: float | None
) -> Budget:
    from reticent.client.budget import remembered_budget
    from reticent.privacy.ledger import Budget

    own = remembered_budget(folder)
    if epsilon is None and own is not None:
        if delta is not None or window_days is not None:
            raise click.UsageError("--delta and --window-days need --epsilon")
        return own
    if epsilon is None:
        raise click.UsageError("the device has not run yet: give --epsilon (and --delta)")
    given = delta if delta is not None else (own.delta if own else 1e-5)
    return Budget(epsilon, given, None if window_days is None else window_days * DAY)


def _rows(seen: Overview) -> list[list[str]]:
    limit = seen.budget
    window = "for life" if limit.window is None else f"in any {limit.window / DAY:g} days"
    rows = [
        ["what one neighbour is", f"one {seen.unit}, {seen.relation}"],
        ["budget", f"ε {_epsilon(limit.epsilon)} at δ {limit.delta:g}, {window}"],
        ["spent of it", f"ε {_epsilon(seen.spent)}"],
        ["left", f"ε {_epsilon(seen.remaining, down=True)}"],
        ["spent since the ledger began", f"ε {_epsilon(seen.lifetime)}"],
        ["rounds charged", f"{seen.charges:,} in {seen.runs:,} runs"],
        ["updates released", f"{seen.releases:,}"],
        ["rounds refused for the budget", f"{seen.refusals:,}"],
    ]
    if seen.unit is None:
        del rows[0]
    if seen.renews is not None and seen.now is not None:
        rows.append(["the oldest charge leaves in", f"{(seen.renews - seen.now) / DAY:.2f} days"])
    rows.append(["ledger", f"verified, {seen.head.sequence:,} entries"])
    rows.append(["head", seen.head.mac])
    return rows


def _epsilon(value: float, down: bool = False) -> str:
    if math.isinf(value):
        return "∞"
    return f"{math.floor(value * 100) / 100:,.2f}" if down else epsilon_text(value)


def _portable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _portable(inner) for key, inner in value.items()}
    return "infinity" if isinstance(value, float) and math.isinf(value) else value
