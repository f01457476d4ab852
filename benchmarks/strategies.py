"""The table of docs/strategies.md: strategies on clients that hold two kinds of digits each.

    python benchmarks/strategies.py --seeds 1 2 3
    python benchmarks/strategies.py --promises client --only FedAvg SCAFFOLD --seeds 1

Step sizes are those of ``RATES``: FedAvg's makes the new model the mean of the clients', the others
are the best of three on seed 0 without privacy (``--scan``); they stay as they are with privacy.
``federation.average`` stays at its default, so what is tested is the moving average of the models.
``own`` is accuracy on test images of the kinds that a client holds, with the layers that this
client keeps, averaged over clients. It is read from the simulated devices' folders and is a
diagnostic: in a federation it would be a release.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from reticent.client.kept import Kept
from reticent.client.training import student_model
from reticent.core.errors import NetworkError
from reticent.core.personal import split_of
from reticent.core.plan import Plan, parse_plan
from reticent.core.run import Run
from reticent.core.tasks import Examples, Task, load_task
from reticent.core.update import Layout, Vector
from reticent.server.journal import Journal
from reticent.server.preparation import Prepared
from reticent.simulations.devices import device_name
from reticent.simulations.simulate import simulate

COMMON = [
    "task.name=digits",
    "task.public_examples=30",
    "task.partition.kind=shards",
    "task.partition.labels_per_client=2",
    "teacher.epochs=1",
    "student.epochs=5",
    "student.distill.kind=none",
    "student.prune.kind=none",
    "student.quantize.kind=none",
    "federation.rounds=20",
    "federation.steps_per_round=5",
    "federation.sampling_rate=0.3",
    "federation.learning_rate=0.1",
    "federation.eval_every=20",
    'updates.codec=["dither8","ans"]',
    "engine.workers=1",
]
PROMISES = {
    "off": ["privacy=off", "task.clients=20", "federation.clients_per_round=10"],
    # Whole clients need many clients: these draw their images from the pool and so overlap.
    "client": [
        "privacy.unit=client",
        "privacy.epsilon=8",
        "privacy.clip=3.0",
        "task.clients=200",
        "task.partition.examples_per_client=60",
        "federation.clients_per_round=50",
        "federation.rounds=10",
    ],
}
RATES = {"sgd": 0.1, "sgd x 3": 0.3, "momentum": 0.1, "adam": 0.01, "yogi": 0.01, "adagrad": 0.1}
SCAN = {
    "sgd": (0.03, 0.1, 0.3),
    "momentum": (0.01, 0.03, 0.1),
    "adam": (0.003, 0.01, 0.03),
    "yogi": (0.003, 0.01, 0.03),
    "adagrad": (0.01, 0.03, 0.1),
}


def server(rule: str) -> list[str]:
    """Return the overrides of a server rule at its step size."""
    kind = rule if rule in ("adam", "yogi", "adagrad") else "sgd"
    momentum = 0.0 if rule.startswith("sgd") else 0.9
    return [
        f"federation.server.kind={kind}",
        f"federation.server.momentum={momentum}",
        f"federation.server.learning_rate={RATES[rule]}",
    ]


ROWS = {
    "FedAvg": server("sgd"),
    "FedAvg, server step × 3": server("sgd x 3"),
    "FedProx, μ = 0.1": [*server("sgd"), "federation.local.proximal=0.1"],
    "FedProx, μ = 1": [*server("sgd"), "federation.local.proximal=1.0"],
    "SCAFFOLD": [*server("sgd"), "federation.local.scaffold=true"],
    "SCAFFOLD, float32": [
        *server("sgd"),
        "federation.local.scaffold=true",
        'updates.codec=["identity"]',
        'updates.broadcast=["identity"]',
    ],
    "FedAvgM": server("momentum"),
    "FedAdam": server("adam"),
    "FedYogi": server("yogi"),
    "FedAdagrad": server("adagrad"),
    "FedPer, last layer": [*server("sgd"), 'federation.local.personal=["7"]'],
}
PREPARED = Prepared()


def finished(plan: Plan, folder: Path) -> Run:
    """Run a plan, or go on with it, or return the run that is finished."""
    run = Run(folder)
    if not run.summary.is_file():
        began = time.monotonic()
        simulate(plan, folder, resume=(folder / "plan.toml").is_file(), prepared=PREPARED)
        print(f"{folder}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return run


def own_accuracy(run: Run, clients: int = 20) -> float:
    """Return the mean accuracy of the first clients' own models on their own kinds of images."""
    plan = run.plan()
    task = load_task(plan.task, plan.seed)
    model, whole = student_model(task, plan), _deployed(run)
    split = split_of(Layout.of(model), plan.federation.local.personal)
    shared, public = split.shared(whole), split.personal(whole)
    found: list[float] = []
    for client in range(clients):
        kept = Kept(run.ledger / "personal", device_name(client), plan.digest[:16])
        split.trained.write(model, split.whole(shared, kept.before(2**31, public)))
        found.append(_accuracy(model, _of_kinds(task, client)))
    return statistics.fmean(found)


def _deployed(run: Run) -> Vector:
    journal = Journal(run)
    try:
        state = journal.latest()
    finally:
        journal.close()
    if state is None:
        raise ValueError(f"{run.folder}: has no rounds")
    return state.average


def _of_kinds(task: Task, client: int) -> Examples:
    test, kinds = task.test(), np.unique(task.client(client).labels.numpy())
    chosen = torch.from_numpy(np.isin(test.labels.numpy(), kinds))
    return Examples(test.inputs[chosen], test.labels[chosen])


def _accuracy(model: torch.nn.Module, examples: Examples) -> float:
    with torch.no_grad():
        guesses = model.eval()(examples.inputs).argmax(dim=1)
    return int((guesses == examples.labels).sum()) / len(guesses)


def cells(promise: str, row: list[str], seeds: list[int], runs: Path) -> list[str]:
    """Return accuracy, own accuracy and bytes each way of one row, over seeds."""
    common = [*COMMON, *PROMISES[promise], *row]
    plans = [parse_plan("", [*common, f"seed={seed}"]) for seed in seeds]
    done = [finished(plan, runs / plan.digest[:16]) for plan in plans]
    last = done[0].read_metrics()[-1]
    each = [f"{last[way] / last['replies']:,.0f}" for way in ("bytes_up", "bytes_down")]
    common_model = [run.read_summary()["accuracy"]["fp32"] for run in done]
    return [_spread(common_model), _spread([own_accuracy(run) for run in done]), *each]


def _spread(values: list[float]) -> str:
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{deviation}"


def scan(runs: Path) -> None:
    """Print the accuracy of every step size of ``SCAN`` on seed 0, without privacy."""
    for rule, rates in SCAN.items():
        for rate in rates:
            row = [*server(rule)[:2], f"federation.server.learning_rate={rate}"]
            print(f"{rule} {rate}: {cells('off', row, [0], runs)[0]}", flush=True)


def main() -> None:
    """Run what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--promises", choices=sorted(PROMISES), nargs="+", default=["off"])
    parser.add_argument("--only", nargs="*", help="rows to run, default all")
    parser.add_argument("--runs", type=Path, default=Path("runs/strategies"))
    parser.add_argument("--scan", action="store_true", help="compare step sizes instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.scan:
        scan(options.runs)
        return
    for promise in options.promises:
        print(f"\n| {promise} | common model | own | bytes up | bytes down |\n|---|{'---:|' * 4}")
        for name, row in ROWS.items():
            if not options.only or name in options.only:
                try:
                    found = cells(promise, row, options.seeds, options.runs)
                except NetworkError as error:  # updates that are not finite cannot be encoded
                    found = [f"none: {error}", "", "", ""]
                print(f"| {' | '.join([name, *found])} |", flush=True)


if __name__ == "__main__":
    main()
