"""Making a plan's fleet, for a run or to price the plan before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from reticent.client.order import charges
from reticent.core.errors import NetworkError, PlanError
from reticent.core.plan import Plan
from reticent.privacy.ledger import Ledger
from reticent.privacy.randomness import SeededRandomness
from reticent.privacy.schedule import participations
from reticent.server.fleet import Outcome, Release, Virtual, once_back
from reticent.server.sampling import Sampler, asked_first, cohort_in_time

from ..devices import Devices, device_name, granted
from ..grid import node_of
from .availability import Always, Diurnal, Presence
from .buffered import Deals
from .clock import Work
from .devices import Description
from .fleet import Charge, SimulatedFleet
from .traces import read_trace

_COPIES = 5 + 64
"""Numbers a parameter while a device trains: weights, gradient, noise in float64, update, and the
gradients of the 64 examples that are clipped at a time."""


def training_memory(plan: Plan, parameters: int) -> float:
    """Return the bytes that training takes on a device, activations and data left out."""
    runtime = plan.fleet.runtime_memory if plan.fleet is not None else 0.0
    return runtime + 4.0 * _COPIES * parameters


def fleet_for(
    plan: Plan, parameters: int, sizes: tuple[int, int], charging: Charge, constants: int = 0
) -> SimulatedFleet:
    """Return the fleet of a plan.

    Args:
        plan: A plan with a fleet.
        parameters: Parameters that are trained.
        sizes: Bytes of an update, and of the model that is sent to a device.
        charging: Charges devices.
        constants: Bytes that are sent besides to a device that is asked for the first time.

    Raises:
        DataError: If the file of availability cannot be used.
        PlanError: If the plan has no fleet.
    """
    fleet, federation = plan.fleet, plan.federation
    if fleet is None:
        raise PlanError("fleet: is absent")
    up, down = sizes
    work = Work(down, up, federation.steps_per_round, federation.timeout, constants)
    description = Description(fleet, plan.seed, training_memory(plan, parameters))
    return SimulatedFleet(description, _presence(plan), work, charging, _deals(plan))


def check_fleet(plan: Plan, parameters: int) -> None:
    """Refuse a fleet that could not run the plan, before anything is trained.

    Raises:
        DataError: If the file of availability cannot be used.
        PlanError: If no class of devices has the memory that training takes.
    """
    if plan.fleet is None:
        return
    _presence(plan)
    needed = training_memory(plan, parameters)
    most = max(group.figures.memory for group in plan.fleet.groups)
    if most < needed:
        raise PlanError(
            f"fleet.classes: the largest memory is {most:.4g} bytes, and training this student "
            f"takes {needed:.4g}, {plan.fleet.runtime_memory:.4g} of them fleet.runtime_memory"
        )


def charging_to(plan: Plan, devices: Devices, ledger: Ledger) -> Charge:
    """Return what charges devices that begin to train, as their ClientApp would.

    Who cannot afford it is refused there, counted by the ledger and not among those returned.
    """

    def charge(
        run: str, number: int, noise_multiplier: float, clients: Sequence[int]
    ) -> Sequence[int]:
        named = {device_name(client): client for client in clients}
        names: Sequence[str] = list(named)
        for due in charges(plan, noise_multiplier, run, number):
            names = granted(ledger, names, due, devices.budget)
        return [named[name] for name in names]

    return charge


def priced(plan: Plan, fleet: SimulatedFleet) -> dict[str, Any]:
    """Return what the rounds of a plan take on its fleet, without training.

    A round that fails ends the count; ``failed`` then says why.
    """
    tally, failed = _Price(), None
    try:
        for part in _parts(plan, fleet):
            tally.add(part)
    except NetworkError as error:
        failed = str(error)
    return {
        "rounds": tally.rounds,
        "seconds": tally.virtual.ends,
        "energy": tally.virtual.energy,
        "bytes_up": tally.virtual.bytes_up,
        "bytes_down": tally.virtual.bytes_down,
        "charged_unused": tally.virtual.unused,
        "dropped": dict(tally.dropped),
        "memory": fleet.description.memory,
        "step_seconds": _reference_step(plan),
        "failed": failed,
    }


def _reference_step(plan: Plan) -> float | None:
    """Return the seconds of a step that prices rest on; None if every class measured its own."""
    if plan.fleet is None or all(g.steps_per_second is not None for g in plan.fleet.groups):
        return None
    return plan.fleet.step_seconds


def require_filled(plan: Plan, fleet: SimulatedFleet) -> None:
    """Refuse a buffered plan whose fleet cannot fill every buffer, before anything is trained.

    Raises:
        PlanError: If one is not, naming the round.
    """
    found = priced(plan, fleet)
    if plan.fleet is None or found["failed"] is None:
        return
    lost = ", ".join(f"{count} x {why}" for why, count in found["dropped"].items())
    raise PlanError(
        f"fleet.over_selection={plan.fleet.over_selection:g}: must leave room for devices that are "
        f"lost: {found['failed']}, because each of {plan.task.clients} clients may be asked in "
        f"{participations(plan)} rounds and nobody who may be is there within two weeks of "
        f"virtual time ({lost or 'nobody was lost'} in the rounds before); it, task.clients or "
        "fleet.availability must be larger, or federation.rounds or clients_per_round smaller"
    )


@dataclass
class _Price:
    rounds: int = 0
    virtual: Virtual = field(default_factory=Virtual)
    dropped: Counter[str] = field(default_factory=Counter)

    def add(self, part: Outcome | Release) -> None:
        self.virtual.add(part)
        self.virtual.unused += len(part.unused if isinstance(part, Release) else part.charged)
        self.dropped.update(part.dropped)
        self.rounds += 1


def _parts(plan: Plan, fleet: SimulatedFleet) -> Iterator[Outcome | Release]:
    nodes = range(node_of(0), node_of(plan.task.clients))
    if plan.federation.buffered is None:
        yield from _synchronous(plan, fleet, nodes)
        return
    parts = islice(fleet.releases(nodes), plan.federation.rounds)
    for number in range(1, plan.federation.rounds + 1):
        part = next(parts, None)
        if part is None:
            raise NetworkError(f"round {number}: the buffer cannot be filled")
        yield part


def _synchronous(plan: Plan, fleet: SimulatedFleet, nodes: range) -> Iterator[Outcome]:
    sampler = Sampler(plan, SeededRandomness(plan.seed), plan.digest[:16])
    asked, now = Counter[int](), 0.0
    for number in range(1, plan.federation.rounds + 1):
        cohort, now = cohort_in_time(sampler, number, nodes, asked, fleet, now)
        found = _asked(plan, fleet, number, cohort, now, {n for n in cohort if not asked[n]})
        now = found.ends
        asked.update(cohort)
        yield found


def _asked(
    plan: Plan,
    fleet: SimulatedFleet,
    number: int,
    cohort: list[int],
    now: float,
    first: set[int],
) -> Outcome:
    """Return what a round comes to, asked again as often as the plan says.

    Those in ``first`` were asked in no round before.

    Raises:
        NetworkError: If there are too few replies after that.
    """
    federation, whole = plan.federation, None
    wanted = len(cohort) if federation.sampling == "poisson" else federation.wanted
    left = cohort = asked_first(plan, number, cohort)
    for attempt in range(federation.retries + 1):
        replied = () if whole is None else whole.replied
        if attempt:
            now = once_back(fleet, federation, left, len(replied), now)
        part = fleet.ask(number, attempt, left, now, wanted - len(replied), first)
        whole, now = part if whole is None else _joined(whole, part), part.ends
        if len(whole.replied) >= federation.quorum:
            return whole
        left = [node for node in cohort if node not in whole.replied]
    raise NetworkError(
        f"round {number}: {len(whole.replied) if whole else 0} clients give a reply in time, "
        f"{federation.quorum} are needed"
    )


def _joined(first: Outcome, then: Outcome) -> Outcome:
    return Outcome(
        replied=first.replied + then.replied,
        charged=tuple({*first.charged, *then.charged} - {*first.replied, *then.replied}),
        dropped=first.dropped + then.dropped,
        ends=then.ends,
        energy=first.energy + then.energy,
        bytes_up=first.bytes_up + then.bytes_up,
        bytes_down=first.bytes_down + then.bytes_down,
    )


def _presence(plan: Plan) -> Presence:
    section = plan.fleet.availability if plan.fleet is not None else None
    if section is None or section.kind == "always":
        return Always()
    if section.kind == "diurnal" or section.path is None:
        return Diurnal(section, plan.seed)
    return read_trace(Path(section.path), plan.task.clients, section.period)


def _deals(plan: Plan) -> Deals:
    federation = plan.federation
    size, buffered = federation.clients_per_round, federation.buffered
    sampler = Sampler(plan, SeededRandomness(plan.seed), "")
    return Deals(
        size=size,
        concurrency=(buffered.concurrency if buffered else None) or size,
        max_staleness=buffered.max_staleness if buffered else 0,
        most=participations(plan),
        rounds=federation.rounds,
        stream=lambda nodes: sampler.stream(nodes, size),
    )
