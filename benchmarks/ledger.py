"""What the ledger costs a simulated run, against the training of the same run.

Run with ``python benchmarks/ledger.py [--json] [--populations N…] [--rounds R]``. The baseline is
the training of one client's round (the default plan's student on real examples), measured in the
same process before and after each row, times the cohort (100, and 1 % of the population where that
is more); encoding, messages and aggregation are left out of it, so the true share is lower.

Each round is charged as the simulation does it: in windows of 256 clients with one transaction
each, after which every client finds its own charge. ``each round`` is that alone. Once a run comes
what its report asks for: a walk along the whole chain, and epsilon of every device. Every other row
starts from a ledger in which every device of the population had been charged before, as a run that
is resumed does, and opens it with a walk of its own; a new run opens without one. ``once`` is the
share of all that in the run's training, and ``share`` the sum. A walk takes time in proportion to
everything ever charged: the training of those earlier rounds is left out of the baseline.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

# Libraries read these when they are imported.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import numpy as np
import torch

from reticent.core.plan import parse_plan
from reticent.privacy.events import PoissonGaussian
from reticent.privacy.ledger import Budget, Ledger
from reticent.simulations.explain import explain_plan

WINDOW = 256  # clients charged together by a simulation's worker
DELTA = 1e-5
EVENT = PoissonGaussian(0.1, 1.0, 1)
BUDGET = Budget(8.0, DELTA)


@dataclass(frozen=True)
class Row:
    """Milliseconds of one round and seconds of what happens once a run; shares are of training."""

    population: int
    cohort: int
    charged_before: bool
    rounds: int
    training_ms: float
    charge_ms: float
    repeat_ms: float
    resume_s: float
    verify_s: float
    epsilon_s: float
    each_round: float
    once: float
    share: float
    megabytes: float


def client_seconds() -> float:
    """Return the median time of one client's training in one round of the default plan."""
    plan = parse_plan("", where="the default plan")
    return explain_plan(plan)["work"]["step_seconds"] * plan.federation.steps_per_round


def timed(call: Callable[[], object]) -> float:
    """Return the seconds that ``call`` takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def charge_all(ledger: Ledger, names: list[str], run: str, number: int) -> None:
    """Charge ``names`` window by window."""
    for start in range(0, len(names), WINDOW):
        ledger.charge_many(names[start : start + WINDOW], run, number, EVENT, BUDGET)


def play(ledger: Ledger, population: int, cohort: int, rounds: int) -> tuple[float, float]:
    """Charge ``rounds`` seeded cohorts; return the seconds of charging and of finding charges."""
    generator = np.random.default_rng(population + cohort)
    charge = repeat = 0.0
    for number in range(rounds):
        chosen = generator.choice(population, size=cohort, replace=False)
        names = [f"client-{i}" for i in chosen]
        charge += timed(lambda n=names, r=number: charge_all(ledger, n, "run", r))
        repeat += timed(
            lambda n=names, r=number: [
                ledger.charge(device, "run", r, EVENT, BUDGET) for device in n
            ]
        )
    return charge, repeat


def measure(population: int, cohort: int, before: bool, rounds: int) -> Row:
    """Play a run on a ledger of its own, from its opening to its report."""
    client = client_seconds()
    with tempfile.TemporaryDirectory() as name:
        folder, resume = Path(name), 0.0
        if before:
            with Ledger.open(folder) as ledger:
                charge_all(ledger, [f"client-{i}" for i in range(population)], "earlier", 0)
            resume = timed(lambda: Ledger.open(folder).close())
        with Ledger.open(folder, verify=False) as ledger:
            charge, repeat = play(ledger, population, cohort, rounds)
        with Ledger.open(folder, verify=False) as ledger:
            verify = timed(ledger.verify)
            epsilon = timed(lambda: ledger.summary(DELTA))
        megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    training = rounds * cohort * (client + client_seconds()) / 2
    once = resume + verify + epsilon
    return Row(
        population,
        cohort,
        before,
        rounds,
        *(1e3 * seconds / rounds for seconds in (training, charge, repeat)),
        resume_s=resume,
        verify_s=verify,
        epsilon_s=epsilon,
        each_round=(charge + repeat) / training,
        once=once / training,
        share=(charge + repeat + once) / training,
        megabytes=megabytes,
    )


def table(rows: list[Row]) -> str:
    """Return ``rows`` as aligned text."""
    lines = [
        f"{'clients':>8}{'cohort':>8}{'before':>8}{'rounds':>8}{'training ms':>13}{'charge ms':>11}"
        f"{'repeat ms':>11}{'resume s':>10}{'verify s':>10}{'epsilon s':>11}{'each round':>12}"
        f"{'once':>8}{'share':>8}{'MB':>8}"
    ]
    lines += [
        f"{r.population:>8,}{r.cohort:>8,}{'yes' if r.charged_before else 'no':>8}{r.rounds:>8}"
        f"{r.training_ms:>13.1f}{r.charge_ms:>11.2f}{r.repeat_ms:>11.2f}{r.resume_s:>10.2f}"
        f"{r.verify_s:>10.2f}{r.epsilon_s:>11.2f}{r.each_round:>12.2%}{r.once:>8.2%}"
        f"{r.share:>8.2%}{r.megabytes:>8.1f}"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--populations", type=int, nargs="+", default=[100, 10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=60, help="rounds of a run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        measure(population, cohort, before, args.rounds)
        for population in args.populations
        for cohort in sorted({min(100, population), max(min(100, population), population // 100)})
        for before in (False, True)
    ]
    print(json.dumps([asdict(row) for row in rows], indent=1) if args.json else table(rows))


if __name__ == "__main__":
    main()
