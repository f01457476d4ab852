"""The tables of docs/results.md: the whole path on real data, at several promises and seeds.

    python benchmarks/results.py fashion --seeds 1 2 3 --runs runs/results
    python benchmarks/results.py fashion-full --seeds 1 --runs runs/results --only aggregator-8

Each configuration is one run directory, named after its plan too; runs that are finished are read,
not repeated, and runs that were stopped are resumed. Hyperparameters were chosen by central DP-SGD
on a part of the official training file that was held out for it; no image of the official test file
took part.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from reticent.cli.output import epsilon_text
from reticent.core.plan import Plan, parse_plan
from reticent.core.run import Run
from reticent.server.preparation import Prepared
from reticent.simulations.simulate import simulate

EPSILONS = (8, 4, 2)

COMMON = {
    "fashion": ["task.name=fashion", "task.clients=100", "federation.clients_per_round=100"],
    "fashion-full": [
        "task.name=fashion-full",
        "task.clients=1000",
        "federation.clients_per_round=1000",
    ],
}
AGGREGATOR = {
    "fashion": [],
    "fashion-full": [
        "federation.rounds=100",
        "federation.sampling_rate=0.1",
        "federation.server.learning_rate=0.008",
    ],
}
# Under local trust every client adds the full noise: few full-batch rounds make the best of it.
LOCAL = {
    task: [
        "federation.rounds=10",
        "federation.sampling_rate=1.0",
        "federation.server.learning_rate=0.002",
    ]
    for task in COMMON
}


# Without pruning, and with half as many rounds again: the best accuracy at this promise.
DENSE = {
    "fashion": ["student.prune.kind=none"],
    "fashion-full": ["student.prune.kind=none", "federation.rounds=150"],
}


# Noise for a whole client's update is far larger than for an example's gradient: it takes many
# clients, who here draw their images from the pool and so overlap.
CLIENTS = [
    "task.clients=1000",
    "task.partition.examples_per_client=50",
    'privacy.unit="client"',
    "privacy.epsilon=8",
    "federation.rounds=40",
    "federation.clients_per_round=200",
    "federation.steps_per_round=5",
    "federation.sampling_rate=0.2",
    "federation.learning_rate=0.1",
]


def configurations(task: str) -> dict[str, list[str]]:
    """Return the overrides of each named configuration of a task."""
    found = {"off": [*AGGREGATOR[task], "privacy=off"]}
    for epsilon in EPSILONS:
        found[f"aggregator-{epsilon}"] = [*AGGREGATOR[task], f"privacy.epsilon={epsilon}"]
    for epsilon in EPSILONS:
        found[f"local-{epsilon}"] = [
            *LOCAL[task],
            'privacy.trust="local"',
            f"privacy.epsilon={epsilon}",
        ]
    found["aggregator-8-dense"] = [*found["aggregator-8"], *DENSE[task]]
    # The same promise with fp32 on the wire both ways: what encoding costs in accuracy.
    found["aggregator-8-fp32-wire"] = [
        *found["aggregator-8"],
        'updates.codec=["identity"]',
        'updates.broadcast=["identity"]',
    ]
    if task == "fashion":
        found["client-8"] = CLIENTS
        found["client-8-adaptive"] = [*CLIENTS, "privacy.clip_quantile=0.5"]
    return found


PREPARED = Prepared()
"""The promises of one seed begin with the same models."""


def finished(plan: Plan, folder: Path) -> dict:
    """Run, resume or read one configuration and return its summary."""
    run = Run(folder)
    if not run.summary.is_file():
        began = time.monotonic()
        simulate(plan, folder, resume=(folder / "plan.toml").is_file(), prepared=PREPARED)
        print(f"{folder}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    summary = run.read_summary()
    metrics = run.read_metrics()
    up = sum(m["bytes_up"] for m in metrics) / sum(m["replies"] for m in metrics)
    down = sum(m["bytes_down"] for m in metrics) / sum(m["replies"] for m in metrics)
    return {**summary, "bytes_up": up, "bytes_down": down}


def mean_and_spread(values: list[float]) -> str:
    """Return mean ± standard deviation in per cent, or the one value."""
    mean = 100 * statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {100 * statistics.stdev(values):.1f}"


def table(results: dict[str, list[dict]]) -> str:
    """Return the Markdown table of one task."""
    lines = [
        "| configuration | ε readers | ε server | fp32 | int8 (qnnpack) | bytes up | bytes down |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, runs in results.items():
        accuracy = {k: [r["accuracy"][k] for r in runs] for k in ("fp32", "int8")}
        epsilons = [runs[0]["privacy"][k] for k in ("epsilon", "server_epsilon")]
        shown = [epsilon_text(e) for e in epsilons]
        up, down = (statistics.mean(r[k] for r in runs) for k in ("bytes_up", "bytes_down"))
        lines.append(
            f"| {name} | {shown[0]} | {shown[1]} | {mean_and_spread(accuracy['fp32'])} | "
            f"{mean_and_spread(accuracy['int8'])} | {up:,.0f} | {down:,.0f} |"
        )
    public = next(iter(results.values()))
    for row in ("teacher", "public_only", "public_only_int8", "public_only_pruned"):
        values = [r["accuracy"][row] for r in public]
        lines.append(f"| {row} | 0 | 0 | {mean_and_spread(values)} | | | |")
    return "\n".join(lines)


def main() -> None:
    """Run what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("task", choices=sorted(COMMON))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--runs", type=Path, default=Path("runs/results"))
    parser.add_argument("--only", nargs="*", help="configurations to run, default all")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--set", dest="extra", nargs="*", default=[])
    parser.add_argument("--json", type=Path, help="also write the summaries here")
    options = parser.parse_args()
    known = configurations(options.task)
    if unknown := sorted(set(options.only or ()) - set(known)):
        parser.error(f"--only {' '.join(unknown)}: must be among {', '.join(known)}")
    results: dict[str, list[dict]] = {}
    for name, overrides in known.items():
        if options.only and name not in options.only:
            continue
        for seed in options.seeds:
            keys = [
                *COMMON[options.task],
                *overrides,
                f"seed={seed}",
                f"engine.workers={options.workers}",
                "federation.eval_every=20",
                *options.extra,
            ]
            plan = parse_plan("", keys)
            folder = options.runs / f"{options.task}-{name}-seed{seed}-{plan.digest[:8]}"
            results.setdefault(name, []).append(finished(plan, folder))
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
