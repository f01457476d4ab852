"""A round on the server: its public constants, what arrived, and one reply as it was read."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from reticent.core.update import Layout, Vector
from reticent.privacy.randomness import Randomness, SystemRandomness
from reticent.privacy.schedule import Schedule

from .client_level import Noised
from .fleet import Virtual
from .optimizer import Accumulator


@dataclass(frozen=True)
class RoundPlan:
    """Public constants of every round of a run.

    Attributes:
        run: Identity of the run.
        schedule: The mechanism; None when privacy is off.
        denominator: Expected number of examples in one client's batch.
        layout: Layout of the student.
        constants: Encoded public constants, sent once to each client.
        constants_digest: Their SHA-256.
        randomness: Where the server's own noise comes from (unit ``client``); dithering of the
            broadcast and the cohorts are public and seeded by the plan.
    """

    run: str
    schedule: Schedule | None
    denominator: float
    layout: Layout
    constants: bytes
    constants_digest: str
    randomness: Randomness = field(default_factory=SystemRandomness)

    @property
    def bound(self) -> float:
        """Largest L2 norm of an update that is accepted; with unit ``client`` all are bounded.

        So far above what an honest client can send (100 times the expected batch, all gradients
        aligned, plus four times the noise) that applying it does not depend on honest data.
        """
        if self.schedule is None or self.schedule.unit == "client":
            return math.inf
        s = self.schedule
        noise = s.share_multiplier * s.clip / self.denominator * math.sqrt(self.layout.size)
        return s.steps * (100 * s.clip + 4 * noise)


@dataclass
class Tally:
    """What arrived in one round.

    Attributes:
        sum: The sum of the accepted updates.
        accepted: The nodes they came from.
        dropped: Replies that were not used, by reason.
        nodes: The nodes that were asked.
        asked: Messages sent, repetitions included.
        bytes_up: Encoded bytes of the accepted updates; with unit ``client`` not noised.
        bytes_down: Bytes of the broadcast, to all.
        first_bytes_down: Bytes of the public constants, to all.
        inside: With an adaptive bound, how many updates said that they were within it; like the
            sum not to be shown, only its noised fraction is.
        noised: With unit ``client``, what the round releases.
        virtual: What the round costs on a simulated fleet; None without one.
    """

    sum: Accumulator
    accepted: set[int] = field(default_factory=set)
    dropped: Counter[str] = field(default_factory=Counter)
    nodes: tuple[int, ...] = ()
    asked: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    first_bytes_down: int = 0
    inside: int = 0
    noised: Noised | None = None
    virtual: Virtual | None = None


@dataclass(frozen=True)
class Reading:
    """One reply: the decoded update, its encoded size, and the bit of an adaptive bound."""

    vector: Vector
    size: int
    inside: bool
