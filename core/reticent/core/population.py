"""Which choices about a population fit together: sampling, a fleet, buffered aggregation."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plan import Plan


def check_population(plan: Plan) -> None:
    """Refuse combinations that break a guarantee or cannot work.

    Raises:
        ValueError: Naming the key path, the value, what is allowed and why.
    """
    _check_sampling(plan)
    _check_secret(plan)
    _check_fleet(plan)
    if plan.federation.buffered is not None:
        _check_buffered(plan)


def _check_sampling(plan: Plan) -> None:
    f, p = plan.federation, plan.privacy
    if f.sampling == "poisson" and p != "off" and p.unit == "example" and p.trust == "aggregator":
        raise ValueError(
            'federation.sampling="poisson": must be "passes" or "fixed" when privacy.unit is '
            '"example" and privacy.trust is "aggregator": a noise share is sized for a number of '
            "replies, which a Poisson cohort does not have"
        )
    if f.sampling == "poisson" and f.local.scaffold and p != "off" and p.unit == "client":
        raise ValueError(
            "federation.local.scaffold=true: must be false when federation.sampling is "
            '"poisson" and privacy.unit is "client": the server\'s control variate moves with the '
            "number of replies, which the noise does not cover and which differs from "
            'clients_per_round in nearly every round; use federation.sampling="passes" or "fixed", '
            "or federation.local.proximal"
        )
    if f.limit is not None and (most := _fewest_in_turn(plan)) < f.clients_per_round:
        raise ValueError(
            f"federation.clients_per_round={f.clients_per_round}: must be at most {most}, the "
            f"clients that federation.limit={f.limit} in window={f.window} leaves for a round"
        )


def _fewest_in_turn(plan: Plan) -> int:
    """Return how many clients may be asked in the round in which the fewest have their turn.

    Turns are dealt evenly: of ``window`` classes some have one client more, and a round asks
    ``limit`` classes that follow one another. Of a Poisson cohort only the mean counts.
    """
    f, clients = plan.federation, plan.task.clients
    limit = f.limit or f.window
    if f.sampling == "poisson":
        return clients * limit // f.window
    each, larger = divmod(clients, f.window)
    return each * limit + max(0, limit - (f.window - larger))


def _check_secret(plan: Plan) -> None:
    p, f, fleet = plan.privacy, plan.federation, plan.fleet
    if p == "off" or not p.secret_cohort:
        return
    if p.unit != "client":
        raise ValueError(
            f'privacy.secret_cohort=true: must be false when privacy.unit is "{p.unit}": given '
            "that a client takes part all its other examples do, so sampling clients is not "
            "Poisson sampling of examples and earns nothing"
        )
    if f.sampling != "poisson":
        raise ValueError(
            f'privacy.secret_cohort=true: federation.sampling must be "poisson", not '
            f'"{f.sampling}": amplification is counted for independent coins only'
        )
    if fleet is not None and fleet.availability.kind != "always":
        raise ValueError(
            f'privacy.secret_cohort=true: fleet.availability.kind="{fleet.availability.kind}" must '
            'be "always": who takes part is then decided by who is available, which is no secret '
            "coin of the server's, and amplification by sampling cannot be claimed"
        )


def _check_fleet(plan: Plan) -> None:
    fleet, f = plan.fleet, plan.federation
    if fleet is None:
        return
    if plan.engine.kind == "flower-ray":
        raise ValueError(
            'engine.kind="flower-ray": must be "inprocess" or "ray" with a fleet: Flower gives '
            "nodes ids of its own, anew in each run, and a device is known by its id"
        )
    if f.sampling == "poisson" and fleet.over_selection != 1:
        raise ValueError(
            f"fleet.over_selection={fleet.over_selection:g}: must be 1 when federation.sampling "
            'is "poisson": which updates are used would then depend on who else was drawn'
        )
    if plan.asked_per_round > plan.task.clients:
        raise ValueError(
            f"fleet.over_selection={fleet.over_selection:g}: {plan.asked_per_round} clients would "
            f"be asked in a round: must be at most task.clients={plan.task.clients}"
        )


def _check_buffered(plan: Plan) -> None:
    p, buffered = plan.privacy, plan.federation.buffered
    if buffered is None:
        return
    if plan.fleet is None:
        raise ValueError(
            "federation.buffered: needs a [fleet] section: the order in which updates arrive is "
            "that of its virtual clock"
        )
    if (buffered.concurrency or 1) > plan.task.clients:
        raise ValueError(
            f"federation.buffered.concurrency={buffered.concurrency}: must be at most "
            f"task.clients={plan.task.clients}"
        )
    if plan.updates.delta or plan.updates.error_feedback:
        raise ValueError(
            "updates.delta and updates.error_feedback: must be left out with federation.buffered, "
            "where clients train on different models"
        )
    if plan.federation.local.scaffold:
        raise ValueError(
            "federation.local.scaffold=true: must be false with federation.buffered: a device that "
            "was given an earlier model would be sent a control variate that is newer than it, and "
            "weights for stale updates would take it from the mean of the devices' variates; leave "
            "out federation.buffered, or use federation.local.proximal"
        )
    shares = p != "off" and p.unit == "example" and p.trust == "aggregator"
    if shares and buffered.weight != "uniform":
        raise ValueError(
            f'federation.buffered.weight="{buffered.weight}": must be "uniform" when privacy.trust '
            'is "aggregator": stale noise shares would be scaled down together with their '
            "gradients, and the noise that is left would not be enough for a fresh gradient"
        )
    if p != "off" and p.clip_quantile is not None:
        raise ValueError(
            f"privacy.clip_quantile={p.clip_quantile}: must be left out with federation.buffered: "
            "the bits of stale updates are about bounds of earlier rounds"
        )
