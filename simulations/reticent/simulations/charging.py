"""Charging a cohort where the ledger is, before its work is handed to workers."""

from __future__ import annotations

from collections.abc import Sequence

from flwr.app import Message

from reticent.client.order import Due, charges
from reticent.core.errors import LedgerError, PayloadError, PlanError, PrivacyError
from reticent.core.plan import Plan
from reticent.core.protocol import Order
from reticent.privacy.ledger import Budget, BudgetExceeded, Charge, Grants, Ledger

from .devices import device_name
from .grid import client_of

Outcome = Charge | BudgetExceeded


class Clerk:
    """Charges whole windows of clients with one fsync each, and says what came of it."""

    def __init__(self, ledger: Ledger, budget: Budget, plan: Plan) -> None:
        """Charge rounds of ``plan`` to ``ledger``."""
        self._ledger, self._budget, self._plan = ledger, budget, plan

    def charge(self, messages: Sequence[Message]) -> Grants:
        """Charge the clients that ``messages`` of one round are for; durable on return.

        Whatever is not granted, because the order makes no sense, the budget is spent or the ledger
        cannot be used, is refused by the client's own check with the code for it.
        """
        folder = self._ledger.folder
        try:
            order = Order.from_config(dict(messages[0].content.config_records["order"]))
            due = charges(self._plan, order.noise_multiplier, order.run, order.round)
        except (PayloadError, PrivacyError, PlanError, KeyError):
            return Grants(folder)
        names = [device_name(client_of(m.metadata.dst_node_id)) for m in messages]
        grants: Grants | None = None
        for one in due:
            outcomes = self._outcomes(names, one)
            charged = {o.device: o.sequence for o in outcomes if isinstance(o, Charge)}
            refused = {o.device: o.spent for o in outcomes if isinstance(o, BudgetExceeded)}
            grants = Grants(folder, one.run, one.round, one.event, charged, refused, grants)
            names = list(charged)  # who was refused the first is not charged the second
        return grants or Grants(folder)

    def _outcomes(self, names: list[str], due: Due) -> list[Outcome]:
        try:
            return self._ledger.charge_many(names, due.run, due.round, due.event, self._budget)
        except PrivacyError:  # of one device, perhaps: the others can still be charged
            found = (self._one(name, due) for name in names)
            return [outcome for outcome in found if outcome is not None]

    def _one(self, name: str, due: Due) -> Outcome | None:
        try:
            return self._ledger.charge(name, due.run, due.round, due.event, self._budget)
        except BudgetExceeded as refusal:
            return refusal
        except (LedgerError, PrivacyError):
            return None
