"""A round of a simulation against its peers: tasks a second, start-up, memory, accuracy.

Run with ``python benchmarks/round.py [--quick] [--json] [--only NAME ...] [--pfl-python PATH]``.
Contenders (``round_peers.py``) take turns, each in a process of its own with one torch thread a
worker on the cores given. A round's time is the median over all rounds but the first of each turn;
memory is the largest resident sum of the process and its descendants. pfl-research is run by the
Python that ``--pfl-python`` names, in two processes, and left out without; ``requirements.txt``
beside this file makes its environment. Ours has one worker a core from the beginning: with ``auto``
so few rounds would be over before more than one pays. A turn of Flower as users write it has two
rounds; with cohorts of 1,000 and more, any turn of Flower has one, which counts: it takes minutes,
and what its workers need to start is a small part. ``--quick`` has one turn of 20 clients of 40.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from family import PeakMemory

HERE = Path(__file__).resolve().parent
PEERS = ("bare", "ours", "ours-ray", "flower-reused", "flower-as-written", "pfl", "pfl-central-dp")
CORES = len(os.sched_getaffinity(0))
LARGE = 1_000
"""Clients of a round from which one round of Flower takes minutes."""
SIZES = ((1_000, 100), (100_000, 1_000))
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Row:
    """One contender at one size; times are medians, ``failed`` says why there are none.

    ``accuracy`` is that after ``rounds``, which are fewer where each takes long.
    """

    model: str
    population: int
    cohort: int
    contender: str
    round_s: float = 0.0
    tasks_per_s: float = 0.0
    start_s: float = 0.0
    peak_mb: float = 0.0
    accuracy: float = 0.0
    rounds: int = 0
    failed: str = ""


@dataclass(frozen=True)
class Turn:
    """One run of one contender."""

    start: float
    rounds: list[float]
    accuracy: float
    peak_mb: float


def turn(contender: str, job: dict[str, object], python: str, limit: float) -> Turn | str:
    """Run a contender once; return why not if it fails or takes more than ``limit`` seconds."""
    command = [python, str(HERE / "round_peers.py"), contender, json.dumps(job)]
    if contender.startswith("pfl"):
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--no-python"]
        command = [python, *launcher, *command]
    paths = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    environment = os.environ | ONE_THREAD | {"PYTHONPATH": paths}
    with PeakMemory() as memory:
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=limit, check=False
            )
        except subprocess.TimeoutExpired:
            return f"not done in {limit:g} s"
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"start"')]
    if done.returncode or not lines:
        return (done.stderr.strip().splitlines() or ["no output"])[-1][:100]
    return Turn(peak_mb=memory.mb, **json.loads(lines[-1]))


def measure(args: argparse.Namespace, model: str, population: int, cohort: int) -> list[Row]:
    """Let the contenders take turns on one size."""
    job = {"model": model, "population": population, "cohort": cohort, "workers": CORES}
    names = [n for n in args.only or PEERS if args.pfl_python or not n.startswith("pfl")]
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    for _ in range(args.turns):
        for name in names:
            if name in failed:
                continue
            python = args.pfl_python if name.startswith("pfl") else sys.executable
            rounds = most_rounds(name, cohort, args.rounds)
            found = turn(name, {**job, "rounds": rounds}, python, args.limit)
            print(f"{model} {cohort} of {population} {name}: {found}", file=sys.stderr, flush=True)
            if isinstance(found, str):
                failed[name] = found
            else:
                turns[name].append(found)
    return [
        Row(model, population, cohort, name, failed=failed[name])
        if name in failed
        else summary(Row(model, population, cohort, name), turns[name])
        for name in names
    ]


def most_rounds(name: str, cohort: int, rounds: int) -> int:
    """Return how many of ``rounds`` a turn has, fewer where each takes long."""
    if name.startswith("flower") and cohort >= LARGE:
        return 1
    return min(rounds, 2) if name == "flower-as-written" else rounds


def summary(row: Row, turns: list[Turn]) -> Row:
    """Return ``row`` with the medians of its turns; a turn's only round counts."""
    seconds = statistics.median(s for t in turns for s in t.rounds[1:] or t.rounds)
    return Row(
        row.model,
        row.population,
        row.cohort,
        row.contender,
        round_s=seconds,
        tasks_per_s=row.cohort / seconds,
        start_s=statistics.median(t.start for t in turns),
        peak_mb=max(t.peak_mb for t in turns),
        accuracy=statistics.median(t.accuracy for t in turns),
        rounds=len(turns[0].rounds),
    )


def table(rows: list[Row]) -> str:
    """Return ``rows`` as aligned text."""
    lines = [
        f"{'model':<6}{'clients':>16}  {'contender':<18}{'round s':>9}{'tasks/s':>9}"
        f"{'start s':>9}{'peak MB':>9}{'accuracy':>9}{'after':>6}"
    ]
    for r in rows:
        left = f"{r.model:<6}{f'{r.cohort} of {r.population}':>16}  {r.contender:<18}"
        figures = (
            f"{r.round_s:>9.3f}{r.tasks_per_s:>9.1f}{r.start_s:>9.1f}{r.peak_mb:>9.0f}"
            f"{r.accuracy:>9.1%}{r.rounds:>6}"
        )
        lines.append(left + (f"  {r.failed}" if r.failed else figures))
    return "\n".join(lines)


def size_of(text: str) -> tuple[int, int]:
    """Return population and cohort of ``POPULATION:COHORT``."""
    population, _, cohort = text.partition(":")
    return int(population), int(cohort)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small turn of each contender")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--only", action="append", choices=PEERS, help="contenders to run")
    parser.add_argument("--models", nargs="+", default=["mlp", "cnn"], choices=("mlp", "cnn"))
    parser.add_argument(
        "--sizes", nargs="+", type=size_of, default=SIZES, metavar="POPULATION:COHORT"
    )
    parser.add_argument("--turns", type=int, default=5, help="runs of each contender")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of a run, at least 2")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds that a run may take")
    parser.add_argument("--pfl-python", help="Python of the environment that has pfl-research")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: must be at least 2, the first is not counted")
    if args.quick:
        args.turns, args.rounds = 1, 2
    sizes = ((40, 20),) if args.quick else args.sizes
    rows = [
        row
        for model in args.models
        for population, cohort in sizes
        for row in measure(args, model, population, cohort)
    ]
    print(json.dumps([asdict(row) for row in rows], indent=1) if args.json else table(rows))


if __name__ == "__main__":
    main()
