"""The tables of docs/compression.md: techniques and combinations, beside the public-only student.

    python benchmarks/compression.py fashion --seeds 1 2 3 4 5 --promises off 8 3
    python benchmarks/compression.py har --only dense 4-bit thin

Each row is one plan at every promise and seed; each run is one run directory, read if it is
finished and resumed if it was stopped. ``har`` and ``fashion-full`` need RETICENT_DATA.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from results import finished, mean_and_spread

from reticent.core.plan import load_plan, parse_plan

HAR = Path(__file__).resolve().parent.parent / "examples" / "tasks" / "har.toml"
TASKS = {
    "digits": [
        "task.name=digits",
        "task.clients=20",
        "task.public_examples=200",
        "federation.clients_per_round=20",
        "federation.rounds=30",
    ],
    "fashion": ["task.name=fashion"],
    "fashion-full": [
        "task.name=fashion-full",
        "task.clients=1000",
        "federation.clients_per_round=1000",
        "federation.rounds=100",
        "federation.server.learning_rate=0.008",
    ],
    "har": [],
}
DENSE = ["student.prune.kind=none"]
THIN = [*DENSE, "student.thin.kind=taylor", "student.thin.share=0.3"]
SVD = [*DENSE, "student.factorize.kind=svd", "student.factorize.rule=energy"]
ROWS: dict[str, list[str]] = {
    "dense": DENSE,
    "default (half pruned)": [],
    "not distilled": ["student.distill.kind=none"],
    "response+feature": ["student.distill.kind=response+feature"],
    "80 % pruned, rate-rewind": [
        "student.prune.sparsity=0.8",
        "student.prune.schedule=rate-rewind",
    ],
    "thin 0.3": THIN,
    "factorize 0.9": [*SVD, "student.factorize.keep=0.9"],
    "lora 4": [*DENSE, "student.adapt.kind=lora"],
    "4-bit": ["student.quantize.bits=4"],
    "2-bit": ["student.quantize.bits=2"],
    "1-bit": [*DENSE, "student.quantize.bits=1"],
    "updates 4 σ": ['updates.codec=["auto"]', "updates.step=4"],
    "thin, pruned, 4-bit, 4 σ": [
        "student.thin.kind=taylor",
        "student.thin.share=0.3",
        "student.prune.sparsity=0.3",
        "student.quantize.bits=4",
        'updates.codec=["auto"]',
        "updates.step=4",
    ],
}


def keys(task: str, row: list[str], promise: str, seed: int, workers: int) -> list[str]:
    """Return the overrides of one run."""
    privacy = "privacy=off" if promise == "off" else f"privacy.epsilon={promise}"
    common = [f"seed={seed}", f"engine.workers={workers}", "federation.eval_every=50"]
    return [*TASKS[task], *row, privacy, *common]


def main() -> None:
    """Run what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--promises", nargs="+", default=["8"], help="off, or epsilons")
    parser.add_argument("--only", nargs="*", help="rows to run, default all")
    parser.add_argument("--runs", type=Path, default=Path("runs/compression"))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    heads = [
        f"{p if p == 'off' else 'ε ' + p}, {m}" for p in options.promises for m in ("fp32", "int8")
    ]
    print(
        "| student | sent | deployed | file, B | × teacher | up, B | µs | × | public only |", end=""
    )
    print(f" {' | '.join(heads)} |\n|---|{'---:|' * (8 + len(heads))}")
    for name, row in ROWS.items():
        if options.only and name not in options.only:
            continue
        cells: list[str] = []
        first: dict | None = None
        public: list[float] = []
        for promise in options.promises:
            summaries = []
            for seed in options.seeds:
                given = keys(options.task, row, promise, seed, options.workers)
                plan = load_plan(HAR, given) if options.task == "har" else parse_plan("", given)
                summaries.append(finished(plan, options.runs / plan.digest[:16]))
            first = first or summaries[0]
            public = public or [s["accuracy"]["public_only_int8"] for s in summaries]
            cells += [
                mean_and_spread([s["accuracy"][m] for s in summaries]) for m in ("fp32", "int8")
            ]
        if first is None:
            continue
        sizes, times = first["bytes"], first["latency_us"]
        fixed = [
            name,
            f"{first['parameters']['kept']:,}",
            f"{first['parameters']['deployed']:,}",
            f"{sizes['int8']:,}",
            f"{sizes['teacher'] / sizes['int8']:.0f}×",
            f"{statistics.mean([first['bytes_up']]):,.0f}",
            f"{times['int8']:.0f}",
            f"{times['teacher'] / times['int8']:.1f}×",
            mean_and_spread(public),
        ]
        print(f"| {' | '.join([*fixed, *cells])} |", flush=True)


if __name__ == "__main__":
    main()
