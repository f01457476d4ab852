"""A round on the server: its public constants, what arrived, and one reply as it was read."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from reticent.core.errors import NetworkError
from reticent.core.norms import l2_norm
from reticent.core.personal import Split
from reticent.core.plan import Federation, Optimizer
from reticent.core.protocol import Refusal
from reticent.core.update import Layout, Vector
from reticent.privacy.randomness import Randomness, SystemRandomness
from reticent.privacy.schedule import Schedule

from .client_level import Noised
from .fleet import Virtual
from .optimizer import Accumulator, Floats

_FARTHEST = 10.0


@dataclass(frozen=True)
class RoundPlan:
    """Public constants of every round of a run.

    Attributes:
        run: Identity of the run.
        schedule: The mechanism; None when privacy is off.
        denominator: Expected number of examples in one client's batch.
        layout: Layout of what travels.
        constants: Encoded public constants, sent once to each client.
        constants_digest: Their SHA-256.
        randomness: Where the server's own noise comes from (unit ``client``); dithering of the
            broadcast and the cohorts are public and seeded by the plan.
        split: Which of the model's coordinates travel; None for all of them.
        terms: How many terms as long as a gradient a local step can have.
    """

    run: str
    schedule: Schedule | None
    denominator: float
    layout: Layout
    constants: bytes
    constants_digest: str
    randomness: Randomness = field(default_factory=SystemRandomness)
    split: Split | None = None
    terms: int = 1

    def shared(self, weights: Vector) -> Vector:
        """Return the part of a model that travels."""
        return weights if self.split is None else self.split.shared(weights)

    def spread(self, gradient: Floats) -> Floats:
        """Return a gradient of what travels as one of the whole model: zero for what does not."""
        return gradient if self.split is None else self.split.spread(gradient)

    @property
    def bound(self) -> float:
        """Largest L2 norm of an update before encoding; with unit ``client`` all are bounded.

        Without privacy it depends on the model (:func:`farthest`), and is infinite here.

        So far above what an honest client can send (100 times the expected batch, all gradients
        aligned, plus four times the noise, in each term of a step) that applying it does not depend
        on honest data. What arrives was decoded, so it may be longer by the codec's public factor
        (:meth:`reticent.compression.codec.Codec.expansion`), and the norm of an accepted update is
        at most that factor times this. One bad client of n thereby moves a round by at most an n-th
        of the product: a codec that keeps a thousandth of the coordinates gives it a thousand times
        the room, and no more.
        """
        if self.schedule is None or self.schedule.unit == "client":
            return math.inf
        s = self.schedule
        noise = s.share_multiplier * s.clip / self.denominator * math.sqrt(self.layout.size)
        return self.terms * s.steps * (100 * s.clip + 4 * noise)


def farthest(model: Vector, optimizer: Optimizer) -> float:
    """Return the largest L2 norm of an update before encoding where nothing bounds gradients.

    As with :attr:`RoundPlan.bound`, the codec's public factor comes on top.

    Alone, and as a plain step of the server, it moves the model by :data:`_FARTHEST` times its
    norm, where a model near zero counts as if every coordinate were one. A client whose training
    went farther has diverged. What one bad client does to a round of n is thereby at most an n-th
    of that: it may ruin the round, not put the model where float32 ends. No update is changed.
    """
    size = max(l2_norm(model), math.sqrt(model.size))
    return _FARTHEST * size / optimizer.learning_rate


@dataclass
class Tally:
    """What arrived in one round.

    Attributes:
        sum: The sum of the accepted updates.
        accepted: The nodes they came from.
        failed: Nodes of which no reply was used; disjoint from ``accepted``.
        spent: Those of them whose budget does not allow the round.
        dropped: Replies that were not used, by reason.
        devices: Who was asked, by identity, also before the round failed and was run again.
        asked: Messages sent, repetitions included.
        bytes_up: Encoded bytes of the accepted updates; with unit ``client`` not noised.
        bytes_down: Bytes of the broadcast, to all.
        first_bytes_down: Bytes of the public constants, to all.
        inside: With an adaptive bound, how many updates said that they were within it; like the
            sum not to be shown, only its noised fraction is.
        noised: With unit ``client``, what the round releases.
        virtual: What the round costs on a simulated fleet; None without one.
        vectors: The accepted updates by node, where the plan's rule needs them all
            (:mod:`.robust`); None where a sum is enough, and memory then does not grow with them.
    """

    sum: Accumulator
    accepted: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    spent: set[int] = field(default_factory=set)
    dropped: Counter[str] = field(default_factory=Counter)
    devices: tuple[int, ...] = ()
    asked: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    first_bytes_down: int = 0
    inside: int = 0
    noised: Noised | None = None
    virtual: Virtual | None = None
    vectors: dict[int, Vector | Floats] | None = None

    @staticmethod
    def begin(size: int, keep: bool = False) -> Tally:
        """Return an empty tally of updates of length ``size``, which are kept on demand."""
        return Tally(Accumulator(size), vectors={} if keep else None)

    def add(self, node: int, reading: Reading) -> None:
        """Count an update, and the bits it came with, as accepted from ``node``."""
        self.sum.add(reading.vector)
        if self.vectors is not None:
            self.vectors[node] = reading.vector
        self.accepted.add(node)
        self.failed.discard(node)
        self.spent.discard(node)
        self.bytes_up += reading.size
        self.inside += reading.inside

    def drop(self, node: int, reason: str) -> None:
        """Count a reply of ``node`` that was not used."""
        self.dropped[reason] += 1
        self.failed.add(node)
        if reason == Refusal.BUDGET.text:
            self.spent.add(node)

    def merge(self, part: Tally) -> None:
        """Add what arrived elsewhere, from other nodes: the same tally as if it had arrived here.

        Only what :meth:`add` and :meth:`drop` count is taken over.
        """
        self.sum.merge(part.sum)
        if self.vectors is not None:
            self.vectors.update(part.vectors or {})
        self.accepted |= part.accepted
        self.failed = (self.failed | part.failed) - self.accepted
        self.spent = (self.spent | part.spent) - self.accepted
        self.dropped += part.dropped
        self.bytes_up += part.bytes_up
        self.inside += part.inside


def figures(round: int, tally: Tally) -> dict[str, Any]:
    """Return what is recorded of a round's traffic."""
    return {
        "round": round,
        "replies": tally.sum.count,
        "asked": tally.asked,
        "dropped": dict(tally.dropped),
        "bytes_up": tally.bytes_up,
        "bytes_down": tally.bytes_down,
        "bytes_constants": tally.first_bytes_down,
    }


class BudgetsSpent(NetworkError):
    """The budgets of so many clients refuse a round that the others are too few for it.

    A round that others could still hold fails with a :class:`NetworkError`: it may be tried again.

    Attributes:
        round: The round that could not be held.
        tally: What arrived in it.
    """

    def __init__(self, message: str, round: int, tally: Tally) -> None:
        """Describe the end of the training."""
        super().__init__(message)
        self.round, self.tally = round, tally


def too_few(
    number: int, federation: Federation, tally: Tally, silent: str, able: int
) -> NetworkError:
    """Return the error of a round without a quorum, asked as often as the plan allows.

    With buffered aggregation that is once: the buffer of a release is filled once.

    Args:
        number: The round.
        federation: The plan's.
        tally: What arrived.
        silent: Names who was asked last and did not reply, if anybody.
        able: How many could still be asked whose budget has not refused, now or before.
    """
    once = federation.buffered is not None
    asked = "each asked once" if once else f"asked {federation.retries + 1} times"
    reasons = ", ".join(f"{count} x {why}" for why, count in tally.dropped.most_common())
    silence = f", at last without a reply of {silent}" if silent else ""
    kept = f"rounds 1 to {number - 1} are kept" if number > 1 else "no round was committed yet"
    text = (
        f"round {number}: {tally.sum.count} of {federation.clients_per_round} clients gave a "
        f"valid reply, {federation.quorum} are needed, {asked} "
        f"({reasons or 'no reply at all'}){silence}; {kept}"
    )
    enough = tally.sum.count + len(tally.spent) >= federation.quorum
    if enough and able < federation.quorum:
        return BudgetsSpent(text, number, tally)
    return NetworkError(text)


@dataclass(frozen=True)
class Reading:
    """One reply: the decoded update (bounded, with unit ``client``), its encoded size, its bit."""

    vector: Vector | Floats
    size: int
    inside: bool
