"""A teacher that learned from private data against one that did not, at the same total epsilon.

    python benchmarks/private_teacher.py [--seeds 0 1 2] [--shares 0.25 0.5] [--runs DIR]

On ``fashion`` with few public images, so that a teacher has little to learn from them. In the row
``public`` the teacher (a CNN with GroupNorm, 105,962 parameters) begins at random. In the others it
was trained by DP-SGD on the clients' pooled private images first, as a curator who holds them
could, under a share of the promised epsilon; the plan declares that (``teacher.trained``), every
ledger is charged for it, and the rounds have the noise that the rest allows. Accuracies are in per
cent, mean and standard deviation over the seeds. ``before`` is the private weights alone, on the
test images, and so part of no promise: a figure that only a benchmark may look at.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}

import numpy as np
import torch
from round_work import model_of
from torch import nn
from torch.nn import functional as F

from reticent.core.errors import PlanError
from reticent.core.plan import Plan, TaskSection, parse_plan
from reticent.core.run import Run
from reticent.core.tasks import Examples, Task, load_task
from reticent.core.update import Layout
from reticent.privacy.accounting import epsilon
from reticent.privacy.clipping import ClippedGradients
from reticent.privacy.events import PoissonGaussian
from reticent.server.possible import require_new_models
from reticent.simulations.simulate import simulate

EPSILON, DELTA, CLIP, RATE, STEPS, LEARNING_RATE = 8.0, 1e-5, 1.0, 0.04, 400, 0.5
CLIENTS, PUBLIC = 100, 100
_private: dict[int, dict[str, torch.Tensor]] = {}
"""Private weights of each seed; empty for a teacher that begins at random."""


class Learned:
    """``fashion`` with another teacher, which may begin at private weights."""

    def __init__(self, section: TaskSection, seed: int) -> None:
        self._base: Task = load_task(section.model_copy(update={"name": "fashion"}), seed)
        self._seed = seed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def teacher(self) -> nn.Module:
        """Return a teacher at the private weights, if there are any."""
        model = fresh()
        if self._seed in _private:
            model.load_state_dict(_private[self._seed])
        return model


def task(section: TaskSection, seed: int) -> Learned:
    """Return the task; a plan names it with ``task.name = "private_teacher:task"``."""
    return Learned(section, seed)


def fresh() -> nn.Module:
    """Return a teacher at random weights."""
    model = model_of("cnn")
    for layer in model.children():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.reset_parameters()
    return model


class Trained(NamedTuple):
    """Private weights, their event, and how good they are."""

    weights: dict[str, torch.Tensor]
    event: PoissonGaussian
    accuracy: float


@cache
def noise_for(target: float) -> float:
    """Return the smallest noise multiplier, to a thousandth, that keeps ``target``."""
    low, high = 0.3, 20.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        spent = epsilon([PoissonGaussian(RATE, middle, STEPS)], DELTA)
        low, high = (low, middle) if spent <= target else (middle, high)
    return high


def trained(base: Task, seed: int, target: float) -> Trained:
    """Train a teacher by DP-SGD on all clients' examples."""
    every = [base.client(i) for i in range(base.clients)]
    pooled = Examples(*(torch.cat(parts) for parts in zip(*every, strict=True)))
    torch.manual_seed(seed)
    model, noise = fresh(), noise_for(target)
    layout, rng = Layout.of(model), np.random.default_rng([seed, 1])
    clipped = ClippedGradients(model, layout)
    weights, velocity = layout.read(model), np.zeros(layout.size)
    for step in range(STEPS):
        chosen = torch.from_numpy(np.flatnonzero(rng.random(len(pooled.labels)) < RATE))
        layout.write(model, weights)
        total = clipped.sum(pooled.inputs[chosen], pooled.labels[chosen], _loss, CLIP)
        noised = total + CLIP * noise * rng.standard_normal(layout.size)
        velocity = 0.9 * velocity + noised / (RATE * len(pooled.labels))
        rate = LEARNING_RATE * (1 - step / STEPS)
        weights = (weights - rate * velocity).astype(np.float32)
    layout.write(model, weights)
    test = base.test()
    with torch.no_grad():
        hits = model.eval()(test.inputs).argmax(dim=1) == test.labels
    event = PoissonGaussian(RATE, noise, STEPS)
    return Trained(model.state_dict(), event, float(hits.double().mean()))


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


def planned(seed: int, event: PoissonGaussian | None) -> Plan:
    """Return the plan, with the event of its teacher declared."""
    keys = [
        "task.name=private_teacher:task",
        f"task.clients={CLIENTS}",
        f"task.public_examples={PUBLIC}",
        f"privacy.epsilon={EPSILON}",
        f"privacy.budget={2 * EPSILON}",
        f"seed={seed}",
        "engine.workers=1",
        "federation.eval_every=60",
    ]
    if event is None:
        return parse_plan("", keys)
    keys += [
        "teacher.epochs=1",  # hardly moved: 100 public images would spoil it
        "teacher.learning_rate=1e-5",
        f"teacher.trained.sampling_rate={RATE}",
        f"teacher.trained.noise_multiplier={event.noise_multiplier}",
        f"teacher.trained.steps={STEPS}",
        "teacher.trained.unit=example",
        "teacher.trained.relation=add-or-remove-one",
    ]
    plan = parse_plan("", [*keys, f"teacher.trained.weights={'0' * 64}"])
    try:
        require_new_models(plan, load_task(plan.task, seed))
    except PlanError as error:
        digest = str(error).partition('must be "')[2][:64]
        return parse_plan("", [*keys, f"teacher.trained.weights={digest}"])
    raise SystemExit("the weights were not noticed")


def row(name: str, seeds: list[int], share: float, runs: Path) -> str:
    """Run a row at every seed and return it."""
    figures: list[list[float]] = []
    for seed in seeds:
        _private.clear()
        event, before = None, float("nan")
        if share:
            base = load_task(TaskSection(name="fashion", clients=CLIENTS), seed)
            weights, event, before = trained(base, seed, share * EPSILON)
            _private[seed] = weights
        plan = planned(seed, event)
        run: Run = simulate(plan, runs / f"{name}-{seed}")
        summary = run.read_summary()
        spent, found = summary["privacy"]["epsilon"], summary["accuracy"]
        kinds = ("teacher", "public_only", "fp32", "int8")
        figures.append([before, *(found[k] for k in kinds), spent])
        print(name, seed, figures[-1], file=sys.stderr, flush=True)
    *columns, spent = zip(*figures, strict=True)
    cells = [cell(column) for column in columns]
    return f"| {name} | {' | '.join(cells)} | {max(spent):.2f} |"


def cell(values: tuple[float, ...]) -> str:
    """Return mean and standard deviation in per cent; a dash where nothing was measured."""
    if np.isnan(values).any():
        return "–"
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * spread:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--runs", type=Path, default=Path("runs/private_teacher"))
    args = parser.parse_args()
    sys.modules["private_teacher"] = sys.modules["__main__"]  # one module, one set of weights
    print("| teacher | before | teacher | public only | fp32 | int8 | ε, total |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for share in (0.0, *args.shares):
        name = f"private-{share * EPSILON:g}" if share else "public"
        print(row(name, args.seeds, share, args.runs), flush=True)


if __name__ == "__main__":
    main()
