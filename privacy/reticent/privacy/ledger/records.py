"""What a ledger is asked and what it answers: frozen records, and the refusal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from reticent.core.errors import PrivacyError

from ..accounting import require_delta
from ..events import Event


@dataclass(frozen=True)
class Budget:
    """The hard stop of one device: ``epsilon`` (may be infinite) at ``delta``, for life or renewed.

    Without a ``window`` the promise is for life: everything the device ever takes part in is
    (epsilon, delta)-private together. With one it renews, and the promise is weaker, and this: what
    is charged in any stretch of ``window`` seconds of device time is (epsilon, delta)-private
    together, whatever came before. Two such stretches compose: someone who watches for two windows
    learns up to (2 epsilon, 2 delta), and so on without end. What was spent over a lifetime goes on
    growing and is still counted and reported (:meth:`Ledger.spent`).

    The window rolls: a charge fits if it and everything charged in the last ``window`` seconds fit
    together, so what is charged late in one day still counts early in the next. Device time
    (:mod:`reticent.privacy.clock`) cannot be moved ahead by setting the clock.

    Attributes:
        epsilon: > 0, in nats, may be infinite.
        delta: In (0, 1).
        window: Seconds of device time, >= 1; None for life.

    Raises:
        PrivacyError: If a value is out of its range.
    """

    epsilon: float
    delta: float
    window: float | None = None

    def __post_init__(self) -> None:
        """Check the three numbers."""
        require_delta(self.delta)
        if not self.epsilon > 0:
            raise PrivacyError(f"budget.epsilon={self.epsilon!r}: must be > 0 (or infinite)")
        if self.window is not None and not 1 <= self.window < math.inf:
            raise PrivacyError(
                f"budget.window={self.window!r}: must be >= 1 second and finite, or None for life"
            )

    def describe(self) -> str:
        """Return the budget in a few words."""
        text = f"epsilon={self.epsilon:g} at delta={self.delta:g}"
        return text if self.window is None else f"{text} in any {self.window:g} s"


@dataclass(frozen=True)
class Charge:
    """One planned round, recorded. ``repeated`` tells that it had been recorded before."""

    device: str
    run: str
    round: int
    event: Event
    sequence: int
    repeated: bool = False


@dataclass(frozen=True)
class Head:
    """The end of the chain: the last entry's number (0 when empty) and its MAC as hex."""

    sequence: int
    mac: str


@dataclass(frozen=True)
class Spent:
    """Devices with the same history: their names, what happened to each, and its epsilon."""

    devices: tuple[str, ...]
    events: tuple[Event, ...]
    epsilon: float


@dataclass(frozen=True)
class Overview:
    """What one device spent and may still spend, for its owner.

    Attributes:
        device: Its name in the ledger.
        budget: The budget that the figures below are about.
        unit: What the epsilons are about, of :data:`~..events.UNITS`; None if none was charged.
        relation: How its neighbour differs, of :data:`~..events.RELATIONS`; None likewise.
        lifetime: ``pld`` epsilon of everything ever charged.
        spent: The same of what counts against ``budget`` now: its window, or the lifetime.
        remaining: What is left of ``budget.epsilon``, >= 0. Epsilons do not add up: a round may
            cost less than its epsilon alone.
        charges: Rounds charged.
        releases: Updates stored to be sent; never more than ``charges``.
        refusals: Rounds refused for the budget, each counted once if it was asked several times in
            a row.
        runs: Distinct runs that were charged.
        first: Device time of the first charge in seconds, or None.
        last: Device time of the last charge in seconds, or None.
        now: Present device time in seconds; None for a budget without a window.
        renews: Device time at which the oldest charge in the window stops counting; None if there
            is none, or no window.
        head: The end of the ledger's chain.
    """

    device: str
    budget: Budget
    unit: str | None
    relation: str | None
    lifetime: float
    spent: float
    remaining: float
    charges: int
    releases: int
    refusals: int
    runs: int
    first: int | None
    last: int | None
    now: int | None
    renews: int | None
    head: Head


class BudgetExceeded(PrivacyError):
    """A charge would exceed a device's budget; nothing was charged for it.

    Attributes:
        device: The device's name.
        spent: Its epsilon that counted against the budget before the refused charge.
        budget: The budget.
        event: What was refused.
        now: Device time of the refusal in seconds, if the budget has a window.
        renews: Earliest device time at which the same charge would fit; None if never.
    """

    def __init__(
        self,
        device: str,
        spent: float,
        budget: Budget,
        event: Event,
        now: int | None = None,
        renews: int | None = None,
    ) -> None:
        """Describe the refusal."""
        super().__init__(
            f"device {device}: a round of {event.describe()} would exceed its "
            f"budget of {budget.describe()}, of which {spent:.4g} is spent; "
            + _until(budget, now, renews)
        )
        self.device, self.spent, self.budget, self.event = device, spent, budget, event
        self.now, self.renews = now, renews

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel between processes: exceptions are otherwise rebuilt from their message."""
        fields = (self.device, self.spent, self.budget, self.event, self.now, self.renews)
        return type(self), fields


def _until(budget: Budget, now: int | None, renews: int | None) -> str:
    if budget.window is None:
        return "the device takes no further part under this budget"
    if now is None or renews is None:
        return "it would not fit even after the whole window has passed"
    return f"it fits again at device time {renews} s, in {renews - now} s (device time is {now} s)"
