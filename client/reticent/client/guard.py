"""The owner's policy, held against every order before anything is charged."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from reticent.core.bundle import is_signed_plan
from reticent.core.errors import PlanError, PolicyError, PrivacyError, ReticentError
from reticent.core.plan import Plan
from reticent.core.protocol import Order, Refusal
from reticent.privacy.events import Composed
from reticent.privacy.ledger import Budget, Ledger

from .budget import DEVICE
from .diary import BEGUN, ENDED, RELEASED, Diary
from .order import Due, Refused, charges, plan_of, require_round
from .policy import Policy
from .rate import Rate
from .resources import LIBRARIES, Memory, disk_free
from .rules import against_now, against_plan, against_room
from .sensors import Sensors
from .turn import turn

MOST_FAILURES = 3
"""Rounds of one plan in a row that may fail or die before the device takes no more of them."""

FORGIVEN_AFTER = 86400.0
"""Seconds after which it tries such a plan again."""


@dataclass(frozen=True)
class Guard:
    """Admits an order, or refuses it with a fixed code.

    Guarantee: an order that the policy does not allow is refused before the ledger is charged,
    before an example is touched and before a task's module is imported, whatever else the message
    holds. What is compared is public, or is about the device and not about its data: the code that
    the server gets tells it that the owner's conditions do not hold at this moment, and nothing
    about which. The reason stays in the diary.

    Attributes:
        policy: The owner's.
        signers: Keys that may sign plans.
        signature: What came with the plan, in hexadecimal.
        ledger: The device's ledger.
        diary: Tells the owner what happened; also counts rounds that never ended.
        sensors: Where the device's state comes from.
        memory: Where free memory is looked up.
        now: Returns the local time.
    """

    policy: Policy
    signers: Sequence[Ed25519PublicKey]
    signature: str
    ledger: Ledger
    diary: Diary
    sensors: Sensors = field(default_factory=Sensors)
    memory: Memory = field(default_factory=Memory)
    now: Callable[[], datetime] = datetime.now

    @contextmanager
    def following(self, order: Order, plan_text: str) -> Iterator[None]:
        """Admit an order, and write down that its round begins and how it ends.

        Orders are followed one after another (:mod:`.turn`): the ledger's own budget is held
        against each charge as it is made, and the policy's other limits here, before it.

        An exception that nobody foresaw, or a process that is killed, leaves a begun round without
        an end, which counts as a failure.

        Raises:
            Refused: As :meth:`admit`, or if another order takes too long.
        """
        with turn(self.diary.folder):
            self.admit(order, plan_text)
            self.diary.add(BEGUN, plan=order.plan, round=order.round)
            try:
                yield
            except (Refused, ReticentError):  # for a reason that says nothing of the plan's code
                self.diary.add(ENDED, plan=order.plan, round=order.round)
                raise
            self.diary.add(RELEASED, plan=order.plan, round=order.round)

    def admit(self, order: Order, plan_text: str) -> None:
        """Let an order through.

        Raises:
            Refused: With the code; its cause says why, for the owner alone.
        """
        try:
            plan = plan_of(plan_text)
        except PlanError as error:
            raise Refused(Refusal.WRONG_PLAN) from error
        if order.plan != plan.digest:
            raise Refused(Refusal.WRONG_PLAN)
        if not any(is_signed_plan(key, self.signature, plan.digest) for key in self.signers):
            raise _refused(Refusal.UNSIGNED, [Refusal.UNSIGNED.text])
        require_round(order, plan)
        _require(Refusal.POLICY, against_plan(self.policy, plan, order))
        self._require_spending(order, plan)
        _require(Refusal.NOT_NOW, self.against_now())
        self._require_that_it_ends(plan.digest)
        self._require_rate()

    def against_now(self) -> list[str]:
        """Return why the device would not take part at this moment, whatever the order."""
        libraries = 0 if "torch" in sys.modules else LIBRARIES
        said = against_now(self.policy.when, self.sensors.read(), self.now())
        return said + self._against_room(libraries)

    def require_room(self, needed: int) -> None:
        """Refuse a round that needs more memory than there is; ``needed`` is in bytes.

        Raises:
            Refused: If so.
        """
        _require(Refusal.NOT_NOW, self._against_room(needed))

    def _against_room(self, needed: int) -> list[str]:
        disk = disk_free(self.ledger.folder)
        return against_room(self.policy, self.memory.free(), disk, needed)

    def _require_spending(self, order: Order, plan: Plan) -> None:
        """Check what the ledger's own budget does not know of."""
        most = self.policy.limits.largest_participations
        if most is not None and self.ledger.rounds(DEVICE, order.run, order.round) >= most:
            raise _refused(Refusal.POLICY, [f"limits.largest_participations={most} is reached"])
        budget = self.policy.budget
        if budget.lifetime_epsilon is None:
            return
        life = Budget(budget.lifetime_epsilon, budget.delta)
        try:
            due = charges(plan, order.noise_multiplier, order.run, order.round)
        except (PlanError, PrivacyError) as error:
            raise Refused(Refusal.BAD_ORDER) from error
        try:
            fits = self._affords([one for one in due if not self._is_charged(one)], order, life)
        except PrivacyError as error:
            raise Refused(Refusal.LEDGER) from error
        if not fits:
            said = f"budget.lifetime_epsilon={budget.lifetime_epsilon:g} does not allow the round"
            raise _refused(Refusal.BUDGET, [said])

    def _is_charged(self, due: Due) -> bool:
        return self.ledger.is_charged(DEVICE, due.run, due.round)

    def _affords(self, due: Sequence[Due], order: Order, life: Budget) -> bool:
        """Return whether all that is still to be charged before the round fits together."""
        if not due:
            return True
        events = tuple(one.event for one in due)
        event = events[0] if len(events) == 1 else Composed(events)
        return self.ledger.affords(DEVICE, order.run, order.round, event, life)

    def _require_rate(self) -> None:
        most = self.policy.limits.largest_orders_per_hour
        if most is not None and not Rate(self.diary.folder, self.diary.clock).take(most):
            said = f"limits.largest_orders_per_hour={most} is reached"
            raise _refused(Refusal.NOT_NOW, [said])

    def _require_that_it_ends(self, plan: str) -> None:
        count, last = self.diary.failures(plan)
        # A clock that was far ahead and then set right must not hold the plan up for years; the
        # next begin is then written with the right time, so that failing again counts.
        recent = abs(self.diary.clock() - last) < FORGIVEN_AFTER
        if count >= MOST_FAILURES and recent:
            said = f"rounds of this plan failed {count} times in a row: tried again after a day"
            raise _refused(Refusal.NOT_NOW, [said])


def _require(refusal: Refusal, reasons: list[str]) -> None:
    if reasons:
        raise _refused(refusal, reasons)


def _refused(refusal: Refusal, reasons: list[str]) -> Refused:
    error = Refused(refusal)
    error.__cause__ = PolicyError("; ".join(reasons))
    return error
