r"""The tables of docs/compression.md: techniques and combinations, beside the public-only student.

    python benchmarks/compression.py fashion --seeds 1 2 3 4 5 --promises off 8 3
    python benchmarks/compression.py har --only dense 4-bit "thin 0.3"
    python benchmarks/compression.py fashion --rows sizes --seeds 1 2 3
    python benchmarks/compression.py fashion --rows updates --promises off 8
    RETICENT_DATA=folder-of-the-four-files python benchmarks/compression.py fashion-full \
        --seeds 1 2 3 4 5 --promises off 8 3 --backends onnx xnnpack

Each row is one plan at every promise and seed; each run is one run directory, read if it is
finished and resumed if it was stopped. ``har`` and ``fashion-full`` need data. Parameters
and bytes are those of the first promise that adds noise, times those of its first seed; with
``--backends`` also as `reticent bench` measures them, each model in a process of its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from results import finished, mean_and_spread

from reticent.compression.backends import BACKEND_NAMES
from reticent.compression.backends.profiles import NO_LIMITS
from reticent.core.plan import Plan, load_plan, parse_plan
from reticent.core.run import Run
from reticent.server.bench import bench_run

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "tasks"
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
        "task.clients=100",
        "federation.clients_per_round=100",
        "federation.rounds=25",
        "federation.sampling_rate=0.05",
        "federation.server.learning_rate=0.014",
    ],
    "har": [],
    "text": [],
}
DENSE = ["student.prune.kind=none"]
THIN = [*DENSE, "student.thin.kind=taylor", "student.thin.share=0.3"]
Rows = dict[str, list[str]]
TECHNIQUES: Rows = {
    "dense": DENSE,
    "default (half pruned)": [],
    "not distilled": ["student.distill.kind=none"],
    "80 % pruned, rate-rewind": [
        "student.prune.sparsity=0.8",
        "student.prune.schedule=rate-rewind",
    ],
    "thin 0.3": THIN,
    "factorize 0.9": [*DENSE, "student.factorize.kind=svd"],
    "lora 4": [*DENSE, "student.adapt.kind=lora"],
    "4-bit": ["student.quantize.bits=4"],
    "3-bit": ["student.quantize.bits=3"],
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
    "thin 0.5, 4-bit, 4 σ": [
        *DENSE,
        "student.thin.kind=taylor",
        "student.thin.share=0.5",
        "student.quantize.bits=4",
        'updates.codec=["auto"]',
        "updates.step=4",
    ],
}
VARIANTS: Rows = {
    "feature": ["student.distill.kind=feature"],
    "response+feature": ["student.distill.kind=response+feature"],
    "relation": ["student.distill.kind=relation"],
    "online": ["student.distill.mode=online"],
    "self": ["student.distill.mode=self"],
    "reverse": ["student.distill.mode=reverse"],
    "3 teachers": ["teacher.count=3"],
    "200 labels, others the teacher's": ["task.public_labels=200"],
    "200 labels, no others": ["task.public_examples=200", "student.distill.kind=none"],
    "pruned by taylor": ["student.prune.kind=taylor"],
    "pruned at random": ["student.prune.kind=random"],
    "pruned gradually": ["student.prune.schedule=gradual"],
    "pruned, weight-rewind": ["student.prune.schedule=weight-rewind"],
    "thin 0.5 by taylor": [*DENSE, "student.thin.kind=taylor"],
    "thin 0.5 by l1": [*DENSE, "student.thin.kind=l1"],
    "thin 0.5 by shapley": [*DENSE, "student.thin.kind=shapley"],
    "thin 0.5 at random": [*DENSE, "student.thin.kind=random"],
    "static int8": ["student.quantize.kind=static"],
}

SIZES: Rows = {
    f"thin {share}, 4-bit": [
        *DENSE,
        "student.thin.kind=taylor",
        f"student.thin.share={share}",
        "student.quantize.bits=4",
    ]
    for share in (0.3, 0.5, 0.7, 0.85)
}
SIZES = {"4-bit dense": [*DENSE, "student.quantize.bits=4"], **SIZES}
# Every client adds all of the noise, so that any codec may follow it, and few public examples, so
# that there is something to gain.
LOCAL = [
    "task.public_examples=200",
    "privacy.trust=local",
    "federation.rounds=20",
    "federation.sampling_rate=0.5",
]


def _sent(codec: str, *more: str) -> list[str]:
    names = ", ".join(f'"{name}"' for name in codec.split())
    return [*LOCAL, f"updates.codec=[{names}]", *more]


UPDATES: Rows = {
    "float32": _sent("identity"),
    "dither4, step 0.5 σ": _sent("dither4 ans"),
    "dither, step 4 σ": _sent("auto", "updates.step=4"),
    "hadamard int2": _sent("hadamard int2 ans"),
    "eden2": _sent("eden2"),
    "drive (1 bit)": _sent("drive"),
    "sign, feedback": _sent("sign", "updates.error_feedback=true"),
    "topk 5 %": _sent("topk:0.05"),
    "topk 5 %, feedback": _sent("topk:0.05", "updates.error_feedback=true"),
    "lowrank 2": _sent("lowrank:2"),
    "lowrank 2, feedback": _sent("lowrank:2", "updates.error_feedback=true"),
}
DYNAMIC = "student.quantize.kind=dynamic"
SEQUENCES: Rows = {
    "lstm, dynamic": ["student.model=lstm", DYNAMIC],
    "gru, dynamic": ["student.model=gru", DYNAMIC],
    "attention, fp32": ["student.model=attention"],
}
GROUPS = {
    "sequences": SEQUENCES,
    "sizes": SIZES,
    "techniques": TECHNIQUES,
    "updates": UPDATES,
    "variants": VARIANTS,
}


FIXED = (
    *("student", "sent", "deployed", "file, B", "×", "up, B", "bits up", "µs", "×"),
    *("teacher", "public only"),
)
"""Heads of the columns that do not depend on the promise."""


def keys(task: str, row: list[str], promise: str, seed: int, workers: int) -> list[str]:
    """Return the overrides of one run."""
    privacy = "privacy=off" if promise == "off" else f"privacy.epsilon={promise}"
    common = [f"seed={seed}", f"engine.workers={workers}", "federation.eval_every=50"]
    return [*TASKS[task], *row, privacy, *common]


def main() -> None:
    """Run what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--rows", choices=sorted(GROUPS), default="techniques")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--promises", nargs="+", default=["8"], help="off, or epsilons")
    parser.add_argument("--only", nargs="*", help="rows to run, default all")
    parser.add_argument("--runs", type=Path, default=Path("runs/compression"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--backends", nargs="*", default=[], choices=BACKEND_NAMES)
    options = parser.parse_args()
    heads = [f"{b}, µs (×)" for b in options.backends]
    heads += [
        f"{p if p == 'off' else 'ε ' + p}, {m}" for p in options.promises for m in ("fp32", "int8")
    ]
    print(f"| {' | '.join([*FIXED, *heads])} |\n|---|{'---:|' * (len(FIXED) + len(heads) - 1)}")
    for name, row in GROUPS[options.rows].items():
        if options.only and name not in options.only:
            continue
        cells: list[str] = []
        runs: dict[str, list[dict]] = {}
        folders: dict[str, Path] = {}
        for promise in options.promises:
            plans = [
                plan_of(options.task, keys(options.task, row, promise, seed, options.workers))
                for seed in options.seeds
            ]
            folders[promise] = options.runs / plans[0].digest[:16]
            runs[promise] = [finished(p, options.runs / p.digest[:16]) for p in plans]
            cells += [spread(runs[promise], m) for m in ("fp32", "int8")]
        times = benched(folders[first_private(runs)], options.backends)
        print(f"| {' | '.join([*fixed(name, runs), *times, *cells])} |", flush=True)


def plan_of(task: str, overrides: list[str]) -> Plan:
    """Return the plan of one run."""
    example = EXAMPLES / f"{task}.toml"
    return load_plan(example, overrides) if example.is_file() else parse_plan("", overrides)


def spread(summaries: list[dict], measure: str) -> str:
    """Return mean and deviation of an accuracy, or a dash where there is no such model."""
    values = [s["accuracy"][measure] for s in summaries if measure in s["accuracy"]]
    return mean_and_spread(values) if values else "–"


def first_private(runs: dict[str, list[dict]]) -> str:
    """Return the first promise that adds noise, or off."""
    return next((p for p in runs if p != "off"), "off")


def benched(folder: Path, backends: list[str]) -> list[str]:
    """Return a run's time on each backend, and how many times the teacher's it is faster."""
    if not backends or "no_artifact" in Run(folder).read_summary():
        return ["–"] * len(backends)
    rows = bench_run(Run(folder), 300, NO_LIMITS)
    teacher = next(row["median_us"] for row in rows if row["model"] == "teacher")
    times = {row["backend"]: row["median_us"] for row in rows if row["model"] == "int8"}
    return [f"{times[b]:.0f} ({teacher / times[b]:.1f}×)" if b in times else "–" for b in backends]


def fixed(name: str, runs: dict[str, list[dict]]) -> list[str]:
    """Return the cells of a row that do not depend on the promise."""
    private = first_private(runs)
    summary = runs[private][0]
    model = "int8" if "int8" in summary["bytes"] else "fp32"
    size, time = summary["bytes"][model], summary["latency_us"][model]
    bits, kept = 8 * summary["bytes_up"], summary["parameters"]["kept"]
    return [
        name,
        f"{kept:,}",
        f"{summary['parameters']['deployed']:,}",
        f"{size:,}",
        f"{summary['bytes']['teacher'] / size:.0f}×",
        f"{summary['bytes_up']:,.0f}",
        f"{bits / kept:.2f}",
        f"{time:.0f}",
        f"{summary['latency_us']['teacher'] / time:.1f}×",
        spread(runs[private], "teacher"),
        spread(runs[private], f"public_only{'_int8' if model == 'int8' else ''}"),
    ]


if __name__ == "__main__":
    main()
