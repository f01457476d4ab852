"""What the tests of fleets share: plans, fleets, and plain loops to compare with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from reticent.core.plan import Plan, parse_plan
from reticent.server.fleet import DROPPED, LATE, LEFT, SMALL, SURPLUS, Outcome
from reticent.simulations.fleet import SimulatedFleet, fleet_for, granting
from reticent.simulations.grid import client_of

SIZES = (30_000, 90_000)
ROUGH = [
    "fleet.step_seconds=0.5",
    'fleet.classes=[{kind="phone",share=3.0,dropout=0.2},{kind="pi4",memory=1e8},'
    '{kind="own",slowdown=6.0,steps_per_second=0.5,memory=1e9,down=1.0,up=0.3,latency=0.2,'
    "dropout=0.1,compute_watts=3.0,radio_watts=1.0}]",
]


def plan_of(clients: int, size: int, *overrides: str) -> Plan:
    given = [
        f"task.clients={clients}",
        f"federation.clients_per_round={size}",
        "privacy.trust=local",
        "privacy.noise_multiplier=1.0",
        "fleet.spread=0.3",
    ]
    return parse_plan("", [*given, *overrides])


def fleet_of(plan: Plan) -> SimulatedFleet:
    return fleet_for(plan, 10_000, SIZES, granting)


def one_trip(fleet: SimulatedFleet, client: int, start: float, path: tuple[int, int]) -> Any:
    """One device at a time, in plain floats, from its traits and coins alone."""
    one, up, down = np.array([client]), *SIZES
    description, plan = fleet.description, fleet.description.fleet
    t = {k: v[0].item() for k, v in vars(description.traits(one)).items()}
    pace = description.factors(one, plan.jitter, "jitter", *path)[0].item()
    arrived = start + t["latency"] + down / t["down"]
    begin = arrived + plan.startup * t["slowdown"] * pace
    trained = begin + fleet.work.steps * plan.step_seconds * t["step_slowdown"] * pace
    finish = trained + t["latency"] + up / t["up"]
    lost, why = float("inf"), ""
    if description.coins(one, "drop", *path)[0] < t["dropout"]:
        lost = start + (finish - start) * description.coins(one, "when", *path)[0].item()
        why = DROPPED
    time = start
    end = finish if t["fits"] else arrived
    if not fleet.presence.there(one, start)[0]:
        lost, why = start, LEFT
    while (time := fleet.next_change(time)) < end:
        if not fleet.presence.there(one, time)[0]:
            if time <= lost:
                lost, why = time, LEFT
            break
    if lost >= end:
        lost, why = float("inf"), ""
    return {**t, "arrived": arrived, "begin": begin, "trained": trained, "finish": finish} | {
        "lost": lost,
        "why": why,
    }


def by_events(
    fleet: SimulatedFleet, number: int, nodes: Sequence[int], start: float, want: int
) -> Outcome:
    """A synchronous round, event by event: who answers when, until the server closes it."""
    trips = {n: one_trip(fleet, client_of(n), start, (number, 0)) for n in nodes}
    latest = start + fleet.work.deadline
    events: list[tuple[float, int, str, int]] = []
    for place, (node, t) in enumerate(trips.items()):
        if t["lost"] < float("inf"):
            events.append((t["lost"], place, "lost", node))
        elif not t["fits"]:
            events.append((t["arrived"], place, "declines", node))
        else:
            events.append((t["finish"], place, "answers", node))
    used: list[int] = []
    silent, close = set(nodes), latest
    for time, _, what, node in sorted(events):
        if time > latest:
            break
        if what == "lost":
            continue  # the server does not learn of it
        silent.discard(node)
        if what == "answers":
            used.append(node)
        if len(used) == want or not silent:
            close = time
            break
    dropped, charged = Counter[str](), list[int]()
    energy, up, down = 0.0, 0, 0
    for node, t in trips.items():
        parts = spent(t, start, latest)
        energy, down, up = energy + parts[0], down + parts[1], up + parts[2]
        if node in used:
            continue
        if t["fits"] and t["arrived"] <= latest and t["begin"] < t["lost"]:
            charged.append(node)
        if t["lost"] < close:
            dropped[t["why"]] += 1
        elif not t["fits"] and t["arrived"] <= close:
            dropped[SMALL] += 1
        else:
            dropped[LATE if close == latest else SURPLUS] += 1
    return Outcome(tuple(sorted(used)), tuple(charged), dropped, close, energy, up, down)


def spent(t: dict[str, Any], start: float, latest: float) -> tuple[float, int, int]:
    """Joules, bytes down and bytes up of a device that was asked at `start`, closed round or not.

    Its order is void at `latest`, and nothing that it sends is taken from then on.
    """
    got, up = min(t["arrived"], t["lost"], latest), 0
    energy = (got - start) * t["radio_watts"]
    down = int(SIZES[1] * part(got, start + t["latency"], t["arrived"]))
    if t["fits"] and got == t["arrived"]:
        stop = min(t["finish"], t["lost"], latest)
        energy += (min(t["trained"], t["lost"]) - got) * t["compute_watts"]
        energy += max(0.0, stop - t["trained"]) * t["radio_watts"]
        up = int(SIZES[0] * part(stop, t["trained"] + t["latency"], t["finish"]))
    return energy, down, up


def part(stop: float, begin: float, end: float) -> float:
    return min(1.0, max(0.0, (stop - begin) / (end - begin)))
