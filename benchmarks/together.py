"""Clients with weights of their own: local steps in common passes against one client after another.

    python benchmarks/together.py [--json FILE] [--repeats R] [--only MODEL...] [--runs]

A row is one block of clients that take five local steps each: batches, passes, noise and the move
of the weights, with int8 weights in training. Common passes are those of ``OwnGradients`` for plain
chains, and of ``FunctionalGradients`` for the others. "Bounded" clips the gradient of every example
and adds noise to each step; "plain" is what clients do under privacy unit ``client``. Both ways
take turns in one process on one thread; times are medians of the CPU time of the process, a ratio
is of two medians of the same run. With ``--runs``, also whole simulations on
``digits`` and ``text`` (50 clients, 5 local steps): CPU time of the process for five rounds after
the first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# Libraries read these when they are imported.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from reticent.client import together
from reticent.client.steps import Client, NoisyStep
from reticent.client.together import Together
from reticent.client.training import LocalTrainer, student_model
from reticent.compression.fold import fold_batchnorm
from reticent.compression.stacked import stacked_rounding
from reticent.core import sequences
from reticent.core.models import student
from reticent.core.plan import Plan, parse_plan
from reticent.core.protocol import Constants
from reticent.core.tasks import Examples
from reticent.privacy.clipping import FunctionalGradients, OwnGradients, own_chain_of
from reticent.privacy.randomness import SeededRandomness
from reticent.simulations.simulate import simulate
from reticent.simulations.workers import BLOCK

STEPS, RATE = 5, 0.1
BATCHES = (1, 4, 8, 16, 32)
CHAINS = ("digits", "tiny", "tiny-gn", "cnn", "mlp")
OTHERS = ("residual", "attention", "gru", "lstm")
MODELS = (*CHAINS, *OTHERS)
PROMISES = {
    "bounded": ("privacy.noise_multiplier=1.0", "privacy.trust=local"),
    "plain": ("privacy.noise_multiplier=1.0", "privacy.unit=client"),
}
TEXT = ("task.name=text", "task.partition.examples_per_client=30")
RUNS = {
    "unit example, local trust": PROMISES["bounded"],
    "unit client": PROMISES["plain"],
    **{
        f"{kind} on text, {promise}": (*TEXT, f"student.model={kind}", *PROMISES[promise])
        for kind, promise in (("attention", "bounded"), ("attention", "plain"), ("gru", "bounded"))
    },
}


@dataclass(frozen=True)
class Row:
    """CPU milliseconds of one client's local step; ``apart`` is relative to the largest sum."""

    model: str
    parameters: int
    promise: str
    batch: int
    alone_ms: float
    together_ms: float
    ratio: float
    apart: float


class Shortcut(nn.Sequential):
    """A chain around which its input is added (He et al. 2016)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore
        """Return a tensor of the shape of ``x``."""
        return x + super().forward(x)


class Drawn:
    """A task of noise whose clients hold as many images, or sequences of codes, each."""

    name, clients = "drawn", BLOCK

    def __init__(self, kind: str, held: int) -> None:
        side = 8 if kind == "digits" else 28
        self.codes = kind in sequences.STUDENTS
        self.input_shape: tuple[int, ...] = (40,) if self.codes else (1, side, side)
        self.classes = 36 if self.codes else 10
        self.kind, self.nominal_examples = kind, held

    def client(self, index: int) -> Examples:
        """Return the data of one client."""
        draws = torch.Generator().manual_seed(index)
        inputs = torch.randn(self.nominal_examples, *self.input_shape, generator=draws)
        if self.codes:
            inputs = (inputs.abs() * 10).floor()
        return Examples(inputs, torch.randint(self.classes, (len(inputs),), generator=draws))

    def public(self) -> Examples:
        """Return other data of the same kind."""
        return self.client(100)

    def test(self) -> Examples:
        """Return the public data."""
        return self.public()

    def teacher(self) -> nn.Module:
        """Return the student."""
        return self.student("")

    def student(self, model: str) -> nn.Module:
        """Return the model without batch normalisation."""
        torch.manual_seed(0)
        if self.kind == "mlp":
            return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
        if self.kind == "cnn":
            return nn.Sequential(
                *(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()),
                *(nn.Flatten(), nn.Linear(1568, 64), nn.ReLU(), nn.Linear(64, 10)),
            )
        if self.kind == "residual":
            return nn.Sequential(
                *(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU()),
                Shortcut(nn.Conv2d(16, 16, 3, 1, 1), nn.GroupNorm(4, 16), nn.ReLU()),
                *(nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
                *(nn.Flatten(), nn.Linear(128, 10)),
            )
        if self.codes:
            return sequences.student(self.kind, self.input_shape, self.classes)
        made = student(
            "tiny" if self.kind == "digits" else self.kind, self.input_shape, self.classes
        )
        return fold_batchnorm(made.eval())  # pyright: ignore[reportArgumentType]


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the sum of the examples' losses."""
    return F.cross_entropy(logits, labels, reduction="sum")


def plan_of(*overrides: str) -> Plan:
    fixed = ["task.name=digits", "task.clients=50", "federation.clients_per_round=50"]
    steps = [f"federation.steps_per_round={STEPS}", f"federation.sampling_rate={RATE}"]
    return parse_plan("", [*fixed, *steps, *overrides])


def ways(kind: str, promise: str, batch: int) -> tuple[Callable[[], Any], Callable[[], Any], int]:
    """Return both ways to train a block, one by one and together, and the model's size."""
    task, plan = Drawn(kind, round(batch / RATE)), plan_of(*PROMISES[promise])
    trainer = LocalTrainer(plan, task, Constants(b"", np.zeros((0, 0), np.float32)))
    model = student_model(task, plan)
    bounded = promise == "bounded"
    step = NoisyStep(0.5 if bounded else None, 0.5 if bounded else 0.0, float(batch))
    clients = [Client(task.client(i), SeededRandomness(0), ("run", i, 1)) for i in range(BLOCK)]
    make = OwnGradients if own_chain_of(model) else FunctionalGradients
    common = Together(
        make(model, trainer.layout),
        plan.federation,
        cross_entropy,
        stacked_rounding(model, plan.student.quantize),
    )
    start = trainer.layout.read(model)
    return (
        lambda: [trainer.pseudo_gradients(start, [client], step)[0] for client in clients],
        lambda: common.pseudo_gradients(start, clients, step),
        trainer.layout.size,
    )


def medians(calls: tuple[Callable[[], Any], ...], repeats: int) -> list[float]:
    """Return the median CPU seconds of each call; they take turns, after one round to warm up."""
    taken: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 1):
        for call, times in zip(calls, taken, strict=True):
            began = time.process_time()
            call()
            if turn:
                times.append(time.process_time() - began)
    return [statistics.median(times) for times in taken]


def measure(kind: str, promise: str, batch: int, repeats: int) -> Row:
    alone, common, size = ways(kind, promise, batch)
    first, second = np.array(alone()), np.array(common())
    seconds = medians((alone, common), repeats)
    alone_ms, together_ms = (1e3 * taken / (BLOCK * STEPS) for taken in seconds)
    return Row(
        model=kind,
        parameters=size,
        promise=promise,
        batch=batch,
        alone_ms=alone_ms,
        together_ms=together_ms,
        ratio=alone_ms / together_ms,
        apart=float(np.abs(first - second).max() / np.abs(first).max()),
    )


def run_seconds(name: str, one_by_one: bool, rounds: int = 5) -> float:
    """Return the CPU seconds of this process for ``rounds`` rounds of a run, after its first.

    To be called in a process of its own: what is built for a plan is kept as long as a process is.
    """
    if one_by_one:  # as if no expected batch were small enough
        together.MOST_EXAMPLES = together.MOST_COPIED = 0
    fixed = ("teacher.epochs=1", "student.epochs=1", "task.public_examples=200")
    # The last round is followed by what is done once: a test, and the account of the run.
    more = (f"federation.rounds={rounds + 2}", "federation.eval_every=100", "engine.workers=1")
    said: list[str] = []
    marks: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        simulate(
            plan_of(*fixed, *more, *RUNS[name]),
            Path(folder) / "run",
            say=said.append,
            progress=lambda _: marks.append(time.process_time()),
        )
    if one_by_one != any("one by one" in text for text in said):
        raise RuntimeError(f"{name}: not trained as was asked: {said}")
    return marks[rounds] - marks[0]


def whole_runs(repeats: int) -> list[dict[str, Any]]:
    """Return the CPU seconds of each plan of :data:`RUNS`, in both ways by turns."""
    found: list[dict[str, Any]] = []
    spawn = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for name in RUNS:
            taken: dict[bool, list[float]] = {True: [], False: []}
            for _ in range(repeats):
                for one_by_one, times in taken.items():
                    times.append(pool.submit(run_seconds, name, one_by_one).result())
            before, after = statistics.median(taken[True]), statistics.median(taken[False])
            found.append({"plan": name, "alone_s": before, "together_s": after})
            print(f"{name:<28}{before:>8.2f}{after:>8.2f}{before / after:>7.2f}x", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--repeats", type=int, default=9, help="timed calls of each, at least 3")
    parser.add_argument("--only", nargs="*", choices=MODELS, default=MODELS)
    parser.add_argument("--runs", action="store_true", help="also run whole simulations, 3 of each")
    args = parser.parse_args()
    if args.repeats < 3:
        parser.error(f"--repeats {args.repeats}: must be at least 3")
    torch.set_num_threads(1)
    print("one thread; milliseconds of CPU time for one local step of one client")
    print(
        f"{'model':<9}{'params':>8} {'promise':<9}{'batch':>5}{'alone':>8}{'together':>10}{'':>9}"
    )
    rows: list[Row] = []
    for kind in args.only:
        for promise in PROMISES:
            for batch in BATCHES:
                row = measure(kind, promise, batch, args.repeats)
                rows.append(row)
                print(
                    f"{row.model:<9}{row.parameters:>8,} {row.promise:<9}{row.batch:>5}"
                    f"{row.alone_ms:>8.2f}{row.together_ms:>10.2f}{row.ratio:>8.2f}x",
                    flush=True,
                )
    runs = whole_runs(3) if args.runs else []
    if args.json:
        args.json.write_text(
            json.dumps({"rows": [asdict(r) for r in rows], "runs": runs}, indent=1)
        )


if __name__ == "__main__":
    main()
