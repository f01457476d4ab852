"""Drawing cohorts from a million clients: milliseconds a round, and peak memory.

    python benchmarks/population.py [--clients 1000000] [--cohort 100] [--rounds 20]

Prints a Markdown table. ``list`` is the plain way, everybody listed, sorted and permuted in each
round. Ways take turns within each round; the first round of a way stands by itself, since passes
make their permutation there. Memory is measured apart from time.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections.abc import Callable
from statistics import median

import numpy as np

from reticent.core.plan import Plan, parse_plan
from reticent.core.seeds import numpy_generator
from reticent.privacy.randomness import SeededRandomness
from reticent.server.sampling import Sampler, cohort_in_time
from reticent.simulations.fleet import fleet_for, granting

Draw = Callable[[int], int]
WAYS = {
    "passes": [],
    "fixed": ["federation.sampling=fixed"],
    "fixed, 2 of any 50 rounds": [
        "federation.sampling=fixed",
        "federation.limit=2",
        "federation.window=50",
    ],
    "poisson": ["federation.sampling=poisson"],
    "passes, a fleet awake by the hour": ["fleet.availability.kind=diurnal"],
    "fixed, a fleet awake by the hour": [
        "federation.sampling=fixed",
        "fleet.availability.kind=diurnal",
    ],
}


def drawing(plan: Plan) -> Draw:
    """Return what draws a cohort and, on a fleet, runs its round on the virtual clock."""
    sampler, nodes = Sampler(plan, SeededRandomness(0), "run"), range(2, plan.task.clients + 2)
    fleet = fleet_for(plan, 20_000, (4_000, 9_000), granting) if plan.fleet else None

    def draw(number: int) -> int:
        chosen, now = cohort_in_time(sampler, number, nodes, {}, fleet, 60.0 * number)
        if fleet is not None:
            fleet.ask(number, 0, chosen, now, plan.federation.clients_per_round)
        return len(chosen)

    return draw


def listing(plan: Plan) -> Draw:
    size = plan.federation.clients_per_round

    def draw(number: int) -> int:
        nodes = sorted(range(2, plan.task.clients + 2))
        order = np.roll(numpy_generator(0, "cohort", number).permutation(len(nodes)), -size)
        return len(sorted(nodes[i] for i in order[:size]))

    return draw


def milliseconds(draw: Draw, number: int) -> float:
    began = time.perf_counter()
    draw(number)
    return 1000 * (time.perf_counter() - began)


def peak_megabytes(draw: Draw) -> float:
    tracemalloc.start()
    try:
        draw(1)
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=1_000_000)
    parser.add_argument("--cohort", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    base = [
        f"task.clients={options.clients}",
        f"federation.clients_per_round={options.cohort}",
        "privacy.trust=local",
    ]
    plans = {name: parse_plan("", [*base, *more]) for name, more in WAYS.items()}
    makers = {"list": lambda: listing(parse_plan("", base))} | {
        name: lambda plan=plan: drawing(plan) for name, plan in plans.items()
    }
    draws = {name: make() for name, make in makers.items()}
    times = [
        {name: milliseconds(draw, number) for name, draw in draws.items()}
        for number in range(1, options.rounds + 1)
    ]
    print("| way | first round, ms | other rounds, ms | peak memory, MB |\n|---|---:|---:|---:|")
    for name in draws:
        others = median(row[name] for row in times[1:])
        peak = peak_megabytes(makers[name]())
        print(f"| {name} | {times[0][name]:.1f} | {others:.2f} | {peak:.1f} |")


if __name__ == "__main__":
    main()
