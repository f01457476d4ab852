"""What a plan promises, as numbers: the mechanism's public constants and its events."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from reticent.core.plan import Plan, Privacy

from .accounting import epsilon
from .calibrate import noise_multiplier_for
from .client_level import COUNT_NOISE, ClipRule, client_event, sum_multiplier
from .earlier import earlier_event, noise_after
from .events import Composed, Event, NonPrivate, PoissonGaussian


@dataclass(frozen=True)
class Schedule:
    """Public constants of the mechanism that a plan runs.

    Under ``local`` trust each client adds N(0, (noise_multiplier * clip)^2) to every step's clipped
    sum. Under ``aggregator`` trust each of at least ``shares`` clients adds a share of variance
    (noise_multiplier * clip)^2 / shares, so that the round's sum carries at least the full noise.

    Guarantee (unit ``example``): against everyone who sees the models, ``round_event`` bounds what
    one round reveals about one example of one client, under ``relation``; against the server, which
    sees each client's own update, only ``server_event`` holds. Sampling of clients is *not*
    counted: conditioned on a client taking part its other examples do, so the joint draw is not a
    Poisson draw of examples, and the server sees who took part.

    Guarantee (unit ``client``): against everyone who sees the models, ``round_event`` bounds what
    one round reveals about all that one client contributes to it
    (:mod:`reticent.privacy.client_level`). The server adds the noise, and sees bounded updates in
    the clear: ``server_event`` is non-private. Sampling is not counted here either, so
    ``sampling_rate`` and ``steps`` are 1, whatever the rate and steps of local training.

    Only where the plan says that who takes part is secret (``privacy.secret_cohort``: unit
    ``client``, each client in a round by its own coin of :func:`cohort_rate`) is that rate the
    ``sampling_rate``: one round is then a Poisson-sampled Gaussian over *clients*, against readers
    of the models, who do not learn the cohort. It is counted for every round in which the client
    might be drawn, drawn or not. Against the server nothing is claimed, as before.

    Where the models begin at weights that learned from the same private data (``earlier``), these
    are a release of their own, the same to everybody, and :meth:`over` counts it once.

    Attributes:
        sampling_rate: Rate at which one unit joins a step of the mechanism.
        steps: Steps of the mechanism in a round.
        participations: Most rounds of one client.
        clip: L2 bound of one unit's contribution; with ``clip_quantile`` that of the first round.
        noise_multiplier: Noise over ``clip``; with ``clip_quantile`` that of sum and count
            together.
        shares: Clients that the noise of a round is divided over.
        delta: The delta at which epsilon is stated.
        trust: ``local`` or ``aggregator``.
        unit: ``example`` or ``client``.
        relation: How the neighbour differs.
        clip_quantile: The quantile of norms that an adaptive bound follows; None if it is fixed.
        count_noise: Standard deviation of the noise of the adaptive bound's count; None without.
        earlier: What the weights that the models begin with cost, as declared; None if nothing.
    """

    sampling_rate: float
    steps: int
    participations: int
    clip: float
    noise_multiplier: float
    shares: int
    delta: float
    trust: str
    unit: str = "example"
    relation: str = "add-or-remove-one"
    clip_quantile: float | None = None
    count_noise: float | None = None
    earlier: PoissonGaussian | None = None

    @property
    def secret(self) -> bool:
        """Whether sampling of clients is counted, because nobody learns who takes part."""
        return self.unit == "client" and self.sampling_rate < 1

    @property
    def share_multiplier(self) -> float:
        """Noise multiplier of what one client adds by itself: 0 when the server adds the noise."""
        return 0.0 if self.unit == "client" else self.noise_multiplier / math.sqrt(self.shares)

    @property
    def sum_multiplier(self) -> float:
        """Noise multiplier of a round's sum, without what an adaptive bound's count has."""
        return sum_multiplier(self.noise_multiplier, self.count_noise)

    @property
    def clip_rule(self) -> ClipRule:
        """How the bound of clients' updates moves."""
        return ClipRule(self.clip, self.clip_quantile)

    def round_event(self) -> Event:
        """Event of one round against readers of the models."""
        if self.unit == "client":
            return client_event(
                self.noise_multiplier, self.relation, self.count_noise, self.sampling_rate
            )
        return self._example(self.noise_multiplier)

    def server_event(self) -> Event:
        """Event of one round against the server."""
        return NonPrivate() if self.unit == "client" else self._example(self.share_multiplier)

    def counted(self, asked: int) -> int:
        """Return how many rounds count of a client that was asked in ``asked`` of them.

        Where sampling is counted, every round counts in which a client might have been drawn.
        """
        return self.participations if self.secret else asked

    def over(self, event: Event, rounds: int) -> Event:
        """Return ``event`` repeated over ``rounds`` rounds, after what was ``earlier``."""
        whole = event.times(rounds)
        return whole if self.earlier is None else Composed((self.earlier, whole))

    def _example(self, noise_multiplier: float) -> PoissonGaussian:
        return PoissonGaussian(self.sampling_rate, noise_multiplier, self.steps, self.relation)


def participations(plan: Plan, rounds: int | None = None) -> int:
    """Most rounds that one client takes part in, or may be drawn for, in the run or so far.

    In passes the server deals clients from shuffled passes of ``clients // asked`` rounds each, so
    within a pass nobody is asked twice; with buffered aggregation clients are dealt from the same
    passes, one by one, and ``fleet.over_selection`` is the allowance for those that are lost.
    Otherwise a client may come in every round, or in ``limit`` of any ``window`` rounds.
    """
    federation = plan.federation
    rounds = federation.rounds if rounds is None else rounds
    if federation.sampling == "passes":
        return -(-_dealt(plan, rounds) // (plan.task.clients // plan.asked_per_round))
    if federation.limit is None:
        return rounds
    whole, rest = divmod(rounds, federation.window)
    return whole * federation.limit + min(federation.limit, rest)


def _dealt(plan: Plan, rounds: int) -> int:
    """Return how many cohorts the passes deal: one a round, and what is in flight at the end."""
    federation = plan.federation
    if federation.buffered is None:
        return rounds
    size = federation.clients_per_round
    beyond = (federation.buffered.concurrency or size) - size
    return rounds + -(-max(0, beyond) // size)


def cohort_rate(plan: Plan) -> float:
    """Return the rate of each client's coin in a round in which it may be drawn (``poisson``)."""
    federation = plan.federation
    eligible = plan.task.clients * (federation.limit or 1) / federation.window
    return min(1.0, federation.clients_per_round / eligible)


def draws_in_secret(plan: Plan) -> bool:
    """Return whether a plan's schedule is :attr:`Schedule.secret`, without calibrating it.

    Whoever learns how many were drawn learns of each client's coin: nothing that follows from the
    size of a cohort may then be shown to those against whom the sampling is counted.
    """
    return plan.private is not None and plan.private.secret_cohort and cohort_rate(plan) < 1


def schedule_for(plan: Plan) -> Schedule | None:
    """Return the plan's schedule, with sigma calibrated when epsilon is given; None when off.

    Raises:
        PrivacyError: If no noise multiplier in range meets the target.
        PlanError: If an adaptive bound's count alone would reveal more than the target allows.
    """
    privacy = plan.private
    if privacy is None:
        return None
    sigma = privacy.noise_multiplier or _calibrated(plan, privacy)
    schedule = schedule_with(plan, sigma)
    if schedule is None or schedule.count_noise is None:
        return schedule
    sum_multiplier(sigma, schedule.count_noise)  # refused here, before anything is trained
    return _within(schedule, privacy.epsilon or math.inf)


def _within(schedule: Schedule, target: float) -> Schedule:
    """Return the schedule with as much more noise as the grids of sum and count together cost.

    Their epsilon is that of one Gaussian up to rounding by the accountant, always upwards, which a
    device that stops exactly at the target would notice in its last round.
    """
    whole = schedule.over(schedule.round_event(), schedule.participations)
    if epsilon([whole], schedule.delta) <= target:
        return schedule
    return _within(replace(schedule, noise_multiplier=1.0001 * schedule.noise_multiplier), target)


def schedule_with(plan: Plan, noise_multiplier: float) -> Schedule | None:
    """Return the plan's schedule at a given noise multiplier, such as an order's; None when off."""
    privacy = plan.private
    if privacy is None:
        return None
    rate, steps = _sampling(plan)
    adaptive = privacy.clip_quantile is not None
    shared = privacy.trust == "aggregator" and privacy.unit == "example"
    return Schedule(
        sampling_rate=rate,
        steps=steps,
        participations=participations(plan),
        clip=privacy.clip,
        noise_multiplier=noise_multiplier,
        shares=plan.federation.quorum if shared else 1,
        delta=privacy.delta,
        trust=privacy.trust,
        unit=privacy.unit,
        relation=privacy.relation,
        clip_quantile=privacy.clip_quantile,
        count_noise=COUNT_NOISE * plan.federation.clients_per_round if adaptive else None,
        earlier=earlier_event(plan),
    )


def _sampling(plan: Plan) -> tuple[float, int]:
    """Return rate and steps of the mechanism: a round is one sum of clients' updates."""
    if plan.private is not None and plan.private.unit == "client":
        return cohort_rate(plan) if plan.private.secret_cohort else 1.0, 1
    return plan.federation.sampling_rate, plan.federation.steps_per_round


def _calibrated(plan: Plan, privacy: Privacy) -> float:
    if privacy.epsilon is None:  # excluded by the plan's own check
        raise ValueError("privacy has neither epsilon nor noise_multiplier")
    rate, steps = _sampling(plan)
    if (before := earlier_event(plan)) is not None:
        step = PoissonGaussian(rate, 1.0, steps, privacy.relation, privacy.unit)
        return noise_after(before, step, participations(plan), privacy)
    return noise_multiplier_for(
        privacy.epsilon,
        privacy.delta,
        rate,
        steps * participations(plan),
        relation=privacy.relation,
    )
