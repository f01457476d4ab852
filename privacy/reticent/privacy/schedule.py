"""What a plan promises, as numbers: the mechanism's public constants and its events."""

from __future__ import annotations

import math
from dataclasses import dataclass

from reticent.core.plan import Plan, Privacy

from .calibrate import noise_multiplier_for
from .events import PoissonGaussian


@dataclass(frozen=True)
class Schedule:
    """Public constants of the mechanism that a plan runs.

    Under ``local`` trust each client adds N(0, (noise_multiplier * clip)^2) to every step's clipped
    sum. Under ``aggregator`` trust each of at least ``shares`` clients adds a share of variance
    (noise_multiplier * clip)^2 / shares, so that the round's sum carries at least the full noise.

    Guarantee (example level, add-or-remove-one): against everyone who sees the models,
    ``round_event`` bounds what one round reveals about one example of one client; against the
    server, which sees each client's own update, only ``server_event`` holds. Sampling of clients
    is *not* counted: conditioned on a client taking part its other examples do, so the joint draw
    is not a Poisson draw of examples, and the server sees who took part.
    """

    sampling_rate: float
    steps: int
    participations: int
    clip: float
    noise_multiplier: float
    shares: int
    delta: float
    trust: str

    @property
    def share_multiplier(self) -> float:
        """Noise multiplier of what one client adds by itself."""
        return self.noise_multiplier / math.sqrt(self.shares)

    def round_event(self) -> PoissonGaussian:
        """Event of one round against readers of the models."""
        return PoissonGaussian(self.sampling_rate, self.noise_multiplier, self.steps)

    def server_event(self) -> PoissonGaussian:
        """Event of one round against the server."""
        return PoissonGaussian(self.sampling_rate, self.share_multiplier, self.steps)

    def over(self, event: PoissonGaussian, rounds: int) -> PoissonGaussian:
        """Return ``event`` repeated over ``rounds`` rounds."""
        return event.times(rounds)


def participations(plan: Plan) -> int:
    """Most rounds that one client takes part in.

    The server deals clients from shuffled passes of ``clients // clients_per_round`` rounds each,
    so within a pass nobody is asked twice.
    """
    per_pass = plan.task.clients // plan.federation.clients_per_round
    return -(-plan.federation.rounds // per_pass)


def schedule_for(plan: Plan) -> Schedule | None:
    """Return the plan's schedule, with sigma calibrated when epsilon is given; None when off.

    Raises:
        PrivacyError: If no noise multiplier in range meets the target.
    """
    privacy = plan.private
    if privacy is None:
        return None
    federation, rounds = plan.federation, participations(plan)
    return Schedule(
        sampling_rate=federation.sampling_rate,
        steps=federation.steps_per_round,
        participations=rounds,
        clip=privacy.clip,
        noise_multiplier=_sigma(
            privacy, federation.sampling_rate, federation.steps_per_round * rounds
        ),
        shares=federation.quorum if privacy.trust == "aggregator" else 1,
        delta=privacy.delta,
        trust=privacy.trust,
    )


def _sigma(privacy: Privacy, sampling_rate: float, steps: int) -> float:
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    if privacy.epsilon is None:  # excluded by the plan's own check
        raise ValueError("privacy has neither epsilon nor noise_multiplier")
    return noise_multiplier_for(privacy.epsilon, privacy.delta, sampling_rate, steps)
