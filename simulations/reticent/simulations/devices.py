"""Simulated devices: one ledger file for all of them, seeded randomness, the plan's budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from flwr.app import Context

from reticent.client.environment import Ahead, Environment
from reticent.client.order import Due
from reticent.core.plan import Plan
from reticent.privacy.ledger import Budget, Charge, Grants, Ledger
from reticent.privacy.randomness import SeededRandomness

ACCELERATORS: dict[str, str | None] = {"cpu": None, "cuda": "cuda"}
"""By ``engine.device``: the torch device that gradients are computed on, as a whole cohort's, if
they are. Tests and benchmarks put "cpu" there: the same code, without a graphics processor."""


@dataclass(frozen=True)
class Devices:
    """Describes every simulated device; small enough to hand to each worker process.

    Attributes:
        seed: Of the run.
        ledger: Folder of the one ledger.
        budget: Each device's hard stop.
        accelerator: See :class:`~reticent.client.environment.Environment`.
    """

    seed: int
    ledger: Path
    budget: Budget
    accelerator: str | None = None

    def environment(
        self, client: int, ledger: Ledger | Grants, ahead: Ahead | None = None
    ) -> Environment:
        """Return the environment of the device that holds client ``client``'s data."""
        return Environment(
            client=client,
            device=device_name(client),
            ledger=ledger,
            budget=self.budget,
            randomness=SeededRandomness(self.seed),
            keeps_releases=False,
            accelerator=self.accelerator,
            ahead=ahead,
        )

    def of_context(self, context: Context) -> Environment:
        """Return the environment of the device that a Flower context names by ``partition-id``."""
        return self.environment(client_index(context), _opened(self.ledger))


def client_index(context: Context) -> int:
    """Return the index of the client that a Flower context stands for."""
    return int(context.node_config["partition-id"])


@lru_cache(maxsize=1)
def _opened(folder: Path) -> Ledger:
    return Ledger.open(folder)


def device_name(client: int) -> str:
    """Return the name under which a simulated device stands in the ledger."""
    return f"client-{client}"


def granted(ledger: Ledger | Grants, names: Sequence[str], due: Due, budget: Budget) -> list[str]:
    """Charge ``due`` to devices, and return those that could bear it.

    Raises:
        LedgerError: If the ledger cannot be used, or something else was charged in its place.
        PrivacyError: If it cannot be composed with what was charged to them before.
    """
    if not names:
        return []
    found = ledger.charge_many(names, due.run, due.round, due.event, budget)
    return [outcome.device for outcome in found if isinstance(outcome, Charge)]


def devices_for(plan: Plan, ledger: Path) -> Devices:
    """Return the devices of a simulated federation.

    The budget is the plan's ``privacy.budget``, else its epsilon, else unlimited.
    """
    privacy, accelerator = plan.private, ACCELERATORS[plan.engine.device]
    if privacy is None:
        return Devices(plan.seed, ledger, Budget(math.inf, 1e-5), accelerator)
    limit = privacy.budget or privacy.epsilon or math.inf
    return Devices(plan.seed, ledger, Budget(limit, privacy.delta), accelerator)
