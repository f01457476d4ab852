"""The server's half of client-level privacy: bound what was decoded, add the noise, move the bound.

Guarantee. Whatever a client sends and whatever the codec makes of it, one client moves a round's
mean by at most ``clip / clients`` in L2 norm (twice that when it is replaced by another), and the
count of an adaptive bound by at most one half (one); both are released with noise to that scale
(:mod:`reticent.privacy.client_level`). The denominator is the public number of clients of a round,
never the number of replies: a mean over the replies would move by more than ``clip / clients`` when
few reply, and by an amount that depends on who stayed silent. For the same reason the noise is full
however few replied.

Noise is drawn once for each round, when its replies are complete and just before it is committed. A
round that is not committed is never shown to anyone outside the server: if it is run again, also
with other replies and (in a simulation, where noise is a function of run and round) with the same
noise, its first sum was not released, and nothing can be learnt from the difference.
"""

from __future__ import annotations

from dataclasses import dataclass

from reticent.core.plan import Plan
from reticent.privacy.client_level import ClipRule, Floats, noised_fraction, noised_sum
from reticent.privacy.randomness import Randomness
from reticent.privacy.schedule import Schedule


@dataclass(frozen=True)
class Noised:
    """What a round releases.

    Attributes:
        mean: The noised mean update, float64 ``(size,)``.
        clip: The bound that was in force.
        next_clip: The bound of the next round.
        fraction: Noised fraction of updates within the bound; None when the bound is fixed.
    """

    mean: Floats
    clip: float
    next_clip: float
    fraction: float | None


@dataclass(frozen=True)
class ClientLevel:
    """Public constants of client-level privacy on the server, and the source of its noise.

    Attributes:
        rule: How the bound moves.
        multiplier: Noise multiplier of the sum.
        clients: Clients of a round: the public denominator.
        count_noise: Standard deviation of the count's noise; None when the bound is fixed.
        randomness: Where the noise comes from.
        run: Identity of the run, which names the streams together with the round.
    """

    rule: ClipRule
    multiplier: float
    clients: int
    count_noise: float | None
    randomness: Randomness
    run: str

    def release(self, total: Floats, replies: int, inside: int, clip: float, number: int) -> Noised:
        """Return the noised mean of round ``number`` and the next bound.

        Args:
            total: Sum of updates that a :class:`.folding.Folder` bounded, float64 ``(size,)``.
            replies: How many were added.
            inside: How many said that they were within the bound.
            clip: The bound in force.
            number: The round, from 1.
        """
        stream = self.randomness.stream("server", "sum", self.run, number)
        mean = noised_sum(total, clip, self.multiplier, stream) / self.clients
        if self.count_noise is None:
            return Noised(mean, clip, clip, None)
        stream = self.randomness.stream("server", "count", self.run, number)
        fraction = noised_fraction(inside, replies, self.clients, self.count_noise, stream)
        return Noised(mean, clip, self.rule.next(clip, fraction), fraction)


def client_level_for(
    plan: Plan, schedule: Schedule | None, run: str, randomness: Randomness
) -> ClientLevel | None:
    """Return the server's mechanism; None when the unit is not ``client``."""
    if schedule is None or schedule.unit != "client":
        return None
    return ClientLevel(
        rule=schedule.clip_rule,
        multiplier=schedule.sum_multiplier,
        clients=plan.federation.clients_per_round,
        count_noise=schedule.count_noise,
        randomness=randomness,
        run=run,
    )
