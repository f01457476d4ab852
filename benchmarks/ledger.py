"""What the ledger costs a simulated round, against the training of the same round.

Run with ``python benchmarks/ledger.py [--json] [--populations N…] [--rounds R]``. The baseline is
the training of one client's round (the default plan's student on real examples), measured in the
same process before and after each row, times the cohort (100, and 1 % of the population where that
is more); encoding, messages and aggregation are left out of it, so the true share is lower. A round
is charged as the simulation does it: in windows of 256 clients with one transaction each, after
which every client finds its own charge. What happens once a run is divided by its rounds: opening
with a walk along the whole chain, another walk for the report, and epsilon of every device;
``share`` is with it and ``each round`` without. Every other row starts from a ledger in which every
device of the population had been charged before, as when a long run is resumed.
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
    """Milliseconds of one round, unless said otherwise; ``share`` is of ``training_ms``."""

    population: int
    cohort: int
    charged_before: bool
    rounds: int
    training_ms: float
    charge_ms: float
    repeat_ms: float
    verify_ms: float
    epsilon_ms: float
    each_round: float
    share: float
    summary_s: float
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


def measure(population: int, cohort: int, before: bool, rounds: int) -> Row:
    """Play ``rounds`` rounds with seeded cohorts on a ledger of its own."""
    generator = np.random.default_rng(population + cohort)
    charge = repeat = 0.0
    client = client_seconds()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Ledger.open(folder) as ledger:
            if before:
                charge_all(ledger, [f"client-{i}" for i in range(population)], "earlier", 0)
            for number in range(rounds):
                chosen = generator.choice(population, size=cohort, replace=False)
                names = [f"client-{i}" for i in chosen]
                charge += timed(lambda n=names, r=number: charge_all(ledger, n, "run", r))
                repeat += timed(
                    lambda n=names, r=number: [
                        ledger.charge(device, "run", r, EVENT, BUDGET) for device in n
                    ]
                )
            summary = timed(lambda: ledger.summary(DELTA))
        walks = timed(lambda: Ledger.open(folder).close())
        with Ledger.open(folder, verify=False) as ledger:
            walks += timed(ledger.verify)
        megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    parts = [1e3 * seconds / rounds for seconds in (charge, repeat, walks, summary)]
    training = 1e3 * cohort * (client + client_seconds()) / 2
    return Row(
        population,
        cohort,
        before,
        rounds,
        training,
        *parts,
        each_round=sum(parts[:2]) / training,
        share=sum(parts) / training,
        summary_s=summary,
        megabytes=megabytes,
    )


def table(rows: list[Row]) -> str:
    """Return ``rows`` as aligned text."""
    lines = [
        f"{'clients':>8}{'cohort':>8}{'before':>8}{'rounds':>8}{'training ms':>13}{'charge ms':>11}"
        f"{'repeat ms':>11}{'verify ms':>11}{'epsilon ms':>12}{'each round':>12}{'share':>8}"
        f"{'MB':>8}"
    ]
    lines += [
        f"{r.population:>8,}{r.cohort:>8,}{'yes' if r.charged_before else 'no':>8}{r.rounds:>8}"
        f"{r.training_ms:>13.1f}{r.charge_ms:>11.2f}{r.repeat_ms:>11.2f}{r.verify_ms:>11.2f}"
        f"{r.epsilon_ms:>12.2f}{r.each_round:>12.2%}{r.share:>8.2%}{r.megabytes:>8.1f}"
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
