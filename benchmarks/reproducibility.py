"""The reproducibility matrix: one plan and seed, and the final model of every way to run it.

Run with ``python benchmarks/reproducibility.py [--quick] [--json] [--set k=v ...]``. Exits with
status 1 unless all hashes are equal. Engines that need Ray are left out where it is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from dataclasses import asdict, dataclass

from small_runs import SMALL, model_of


@dataclass(frozen=True)
class Row:
    """One way to run the plan: engine, workers, what was done to it, and the model's SHA-256."""

    engine: str
    workers: int
    history: str
    model: str
    seconds: float


def ways(quick: bool) -> list[tuple[str, int, str]]:
    """Return engines, workers and histories to try."""
    engines = ["inprocess", "ray"] if importlib.util.find_spec("ray") else ["inprocess"]
    counts = (1, 2) if quick else (1, 2, 4)
    rows = [(engine, count, "once") for engine in engines for count in counts]
    for engine in engines:
        rows += [(engine, 2, "again"), (engine, 2, "stopped and resumed")]
    return rows


def measure(overrides: list[str], quick: bool) -> list[Row]:
    """Run the plan in every way."""
    rows: list[Row] = []
    for engine, workers, history in ways(quick):
        chosen = [*SMALL, *overrides, f"engine.kind={engine}", f"engine.workers={workers}"]
        began = time.perf_counter()
        model = model_of(chosen, stop=2 if history.startswith("stopped") else None)
        rows.append(Row(engine, workers, history, model, time.perf_counter() - began))
        print(f"{engine} {workers} {history}: {model[:16]}", file=sys.stderr, flush=True)
    return rows


def table(rows: list[Row]) -> str:
    """Return ``rows`` as aligned text."""
    lines = [f"{'engine':<11}{'workers':>8}  {'run':<20}{'model':<18}{'seconds':>8}"]
    lines += [
        f"{r.engine:<11}{r.workers:>8}  {r.history:<20}{r.model[:16]:<18}{r.seconds:>8.1f}"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1 and 2 workers only")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--set", action="append", default=[], metavar="K=V", help="plan overrides")
    args = parser.parse_args()
    rows = measure(args.set, args.quick)
    print(json.dumps([asdict(row) for row in rows], indent=1) if args.json else table(rows))
    models = {row.model for row in rows}
    if len(models) > 1:
        sys.exit(f"{len(models)} different models: results depend on how a plan is run")


if __name__ == "__main__":
    main()
