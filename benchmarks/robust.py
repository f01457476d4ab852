"""The table of docs/strategies.md: robust rules against 4 bad clients of 20.

    python benchmarks/robust.py --seeds 1

Bad clients train like the others (in this process, at the server's reader) and send something else:

sign-flip   the negative of their update
scaled      the negative of ten times their update
noiseless   all the same vector, without noise: back towards the first model, half as long as their
            update is. Under local noise it is nearer to every honest update than those are to each
            other, which is what Krum looks for.

Accuracy is that of the last model on the test images; "lost" where a model was driven so far
that no client could train on it any more.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
from flwr.app import Message

from reticent.core.errors import NetworkError
from reticent.core.plan import parse_plan
from reticent.core.update import Vector
from reticent.server.folding import Folder
from reticent.server.preparation import Prepared
from reticent.server.rounds import Reading
from reticent.server.strategy import PrivateAveraging
from reticent.simulations.grid import client_of
from reticent.simulations.simulate import simulate

COMMON = [
    "task.name=digits",
    "task.clients=20",
    "task.public_examples=30",
    "teacher.epochs=1",
    "student.epochs=5",
    "student.distill.kind=none",
    "student.prune.kind=none",
    "student.quantize.kind=none",
    "federation.clients_per_round=20",
    "federation.rounds=10",
    "federation.steps_per_round=3",
    "federation.sampling_rate=0.5",
    "federation.learning_rate=0.1",
    "federation.eval_every=10",
    "federation.average=0.0",
    "federation.server.kind=sgd",
    "federation.server.learning_rate=0.1",
    'updates.codec=["dither8","ans"]',
    "engine.workers=1",
]
PROMISES = {
    "off": ["privacy=off"],
    "local": ["privacy.trust=local", "privacy.noise_multiplier=0.6", "privacy.clip=1.0"],
}
RULES = {
    "mean": [],
    "trimmed-mean": ["federation.robust.kind=trimmed-mean", "federation.robust.attackers=4"],
    "median": ["federation.robust.kind=median"],
    "multi-krum": ["federation.robust.kind=multi-krum", "federation.robust.attackers=4"],
}
BAD = 4
Attack = Callable[[Vector, Vector], Vector]


def noiseless(update: Vector, moved: Vector) -> Vector:
    """Return a step back along ``moved``, half as long as ``update``."""
    length = float(np.linalg.norm(moved))
    scale = 0.5 * float(np.linalg.norm(update)) / length if length else 0.0
    return (scale * moved).astype(np.float32)


ATTACKS: dict[str, Attack | None] = {
    "none": None,
    "sign-flip": lambda update, moved: -update,
    "scaled": lambda update, moved: -10 * update,
    "noiseless": noiseless,
}


@contextmanager
def attacked(attack: Attack | None) -> Iterator[None]:
    """Let the first clients send what ``attack`` makes of their update and the model's way."""
    if attack is None:
        yield
        return
    models: list[Vector] = []
    read, configure = Folder.read, PrivateAveraging.configure_train

    def reading(folder: Folder, reply: Message) -> Reading:
        found = read(folder, reply)
        if client_of(reply.metadata.src_node_id) >= BAD:
            return found
        sent = attack(np.asarray(found.vector, dtype=np.float32), models[-1] - models[0])
        return replace(found, vector=sent)

    def configured(strategy: PrivateAveraging, *rest: object) -> object:
        models.append(strategy.state.weights)
        return configure(strategy, *rest)  # type: ignore[arg-type]

    with (
        patch.object(Folder, "read", reading),
        patch.object(PrivateAveraging, "configure_train", configured),
    ):
        yield


def accuracy(promise: str, rule: str, attack: str, seed: int, prepared: Prepared) -> float:
    """Return the final accuracy of one run, in percent; NaN when its model was lost."""
    plan = parse_plan("", [*COMMON, *PROMISES[promise], *RULES[rule], f"seed={seed}"])
    with tempfile.TemporaryDirectory() as folder, attacked(ATTACKS[attack]):
        try:
            run = simulate(plan, Path(folder) / "run", prepared=prepared)
        except NetworkError:
            return math.nan
        return 100 * run.read_metrics()[-1]["accuracy"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--promises", nargs="+", choices=[*PROMISES], default=[*PROMISES])
    args = parser.parse_args()
    prepared = Prepared()
    print("| | " + " | ".join(f"{p}: {a}" for p in args.promises for a in ATTACKS) + " |")
    print("|---|" + "---:|" * (len(args.promises) * len(ATTACKS)))
    for rule in RULES:
        cells = [
            statistics.mean(accuracy(p, rule, a, s, prepared) for s in args.seeds)
            for p in args.promises
            for a in ATTACKS
        ]
        shown = ["lost" if math.isnan(c) else f"{c:.1f}" for c in cells]
        print(f"| {rule} | " + " | ".join(shown) + " |", flush=True)


if __name__ == "__main__":
    main()
