"""The contenders of ``round.py``; one process runs one of them and prints a line of JSON.

Every contender trains on the same clients' data, about one epoch. ``pfl`` and ``flower-as-written``
process a client's n examples once on average, the others 8/7 n, in four Poisson batches. Those
that are private clip each example to 1 and add noise of multiplier 0.5 at every step, except pfl,
which clips and noises whole updates.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import round_opacus
import round_work as work
import torch
from torch.nn import functional as F

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
BEGAN = time.perf_counter()


@dataclass(frozen=True)
class Job:
    """What to run; ``workers`` is about our own engines."""

    model: str
    population: int
    cohort: int
    rounds: int
    workers: int


@dataclass(frozen=True)
class Outcome:
    """Seconds until the first round began, seconds of each round, and the final accuracy.

    A round ends where the next one can begin: ours when it is committed to disk.
    """

    start: float
    rounds: list[float]
    accuracy: float


def bare(job: Job) -> Outcome:
    """Plain SGD on one thread: no privacy, no messages, no ledger."""
    model, rng = work.model_of(job.model), np.random.default_rng(0)
    parameters, times, start = list(model.parameters()), [], time.perf_counter() - BEGAN
    for cohort in work.cohorts(job.population, job.cohort, job.rounds):
        began = time.perf_counter()
        before = [p.detach().clone() for p in parameters]
        total = [torch.zeros_like(p) for p in parameters]
        for index in cohort:
            plain_steps(model, work.client(index), rng)
            with torch.no_grad():
                for p, sum_, first in zip(parameters, total, before, strict=True):
                    sum_ += p - first
                    p.copy_(first)
        with torch.no_grad():
            for p, sum_ in zip(parameters, total, strict=True):
                p += sum_ / len(cohort)
        times.append(time.perf_counter() - began)
    return Outcome(start, times, work.accuracy(model))


def plain_steps(model: torch.nn.Module, data: work.Examples, rng: np.random.Generator) -> None:
    """Run one client's local steps on Poisson batches."""
    for _ in range(work.STEPS):
        batch = torch.from_numpy(np.flatnonzero(rng.random(len(data.labels)) < work.RATE))
        loss = F.cross_entropy(model(data.inputs[batch]), data.labels[batch], reduction="sum")
        gradients = torch.autograd.grad(loss / work.BATCH, list(model.parameters()))
        with torch.no_grad():
            for p, gradient in zip(model.parameters(), gradients, strict=True):
                p -= work.LEARNING_RATE * gradient


def ours(job: Job, engine: str) -> Outcome:
    """Run a plan of ours, ledger and gate included."""
    from reticent.core.plan import parse_plan
    from reticent.simulations.simulate import simulate

    plan = parse_plan(
        "",
        [
            "task.name=round_work:task",
            f"task.clients={job.population}",
            "task.public_examples=20",
            "teacher.epochs=1",
            f"student.model={job.model}",
            "student.epochs=1",
            "student.distill.kind=none",
            "student.prune.kind=none",
            "student.quantize.kind=none",
            "privacy.trust=local",
            f"privacy.noise_multiplier={work.SIGMA}",
            f"privacy.clip={work.CLIP}",
            f"federation.rounds={job.rounds}",
            f"federation.clients_per_round={job.cohort}",
            f"federation.steps_per_round={work.STEPS}",
            f"federation.sampling_rate={work.RATE}",
            f"federation.learning_rate={work.LEARNING_RATE}",
            "federation.server.kind=sgd",
            "federation.server.momentum=0.0",
            f"federation.server.learning_rate={work.LEARNING_RATE}",
            "federation.average=0.0",
            f"federation.eval_every={job.rounds}",
            'updates.codec=["identity"]',
            'updates.broadcast=["identity"]',
            f"engine.kind={engine}",
            f"engine.workers={job.workers}",
        ],
    )
    marks: list[float] = []

    def progress(metrics: dict[str, Any]) -> None:
        now = time.perf_counter()
        marks.extend([now] if marks else [now - metrics["seconds"], now])

    with TemporaryDirectory() as folder:
        summary = simulate(plan, Path(folder) / "run", progress=progress).read_summary()
    return Outcome(marks[0] - BEGAN, seconds_between(marks), summary["accuracy"]["fp32"])


def seconds_between(marks: list[float]) -> list[float]:
    """Return the seconds of each round from its beginning, and the end of every one."""
    return [float(seconds) for seconds in np.diff(marks)]


def flower(job: Job, train: Callable[[str, Any, work.Examples], Any]) -> Outcome:
    """Run Flower's own simulation with FedAvg."""
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    marks: list[float] = []
    final: list[Any] = []
    kind = job.model

    class Timed(FedAvg):
        def configure_train(self, *args: Any, **kwargs: Any) -> Any:
            if not marks:
                marks.append(time.perf_counter())
            return super().configure_train(*args, **kwargs)

        def aggregate_train(self, *args: Any, **kwargs: Any) -> Any:
            found = super().aggregate_train(*args, **kwargs)
            marks.append(time.perf_counter())
            return found

    server, app = ServerApp(), ClientApp()

    @app.train()
    def local(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        state = message.content["arrays"].to_torch_state_dict()  # type: ignore[union-attr]
        data = work.client(int(context.node_config["partition-id"]))
        arrays, count = ArrayRecord(train(kind, state, data)), MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": arrays, "metrics": count}), reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = Timed(
            fraction_train=job.cohort / job.population,
            fraction_evaluate=0.0,
            min_train_nodes=job.cohort,
            min_available_nodes=job.population,
        )
        first = ArrayRecord(work.model_of(kind).state_dict())
        final.append(strategy.start(grid, first, num_rounds=job.rounds).arrays)

    cores = len(os.sched_getaffinity(0))
    run_simulation(
        server,
        app,
        num_supernodes=job.population,
        backend_config={
            "init_args": {"num_cpus": cores, "include_dashboard": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    model = work.model_of(kind)
    model.load_state_dict(final[0].to_torch_state_dict())
    return Outcome(marks[0] - BEGAN, seconds_between(marks), work.accuracy(model))


def pfl(job: Job, private: bool) -> Outcome:
    """Run pfl-research: whole updates clipped and noised centrally, or no privacy."""
    from round_pfl import run

    start, times, accuracy = run(job.model, job.population, job.cohort, job.rounds, private, BEGAN)
    return Outcome(start, times, accuracy)


CONTENDERS: dict[str, Callable[[Job], Outcome]] = {
    "bare": bare,
    "ours": lambda job: ours(job, "inprocess"),
    "ours-ray": lambda job: ours(job, "ray"),
    "flower-reused": lambda job: flower(job, round_opacus.reused),
    "flower-as-written": lambda job: flower(job, round_opacus.as_written),
    "pfl": lambda job: pfl(job, private=False),
    "pfl-central-dp": lambda job: pfl(job, private=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=sorted(CONTENDERS))
    parser.add_argument("job", help="a Job as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    outcome = CONTENDERS[args.contender](Job(**json.loads(args.job)))
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(asdict(outcome)))


if __name__ == "__main__":
    main()
