"""Loading the next clients' examples while others are trained: rounds with and without it.

    python benchmarks/prefetch.py [--json FILE] [--turns T] [--rounds R] [--workers N] [--wait MS..]

The first row is the built-in task ``digits``, whose examples are in memory. The others are a task
of the same examples in a compressed ``.npz`` file for each client, which is read after a sleep of
so many milliseconds: a stand-in for storage or a network that lets a core wait. The files
themselves come from the page cache. A turn is two whole runs, one each way, the first of which
alternates. Figures are wall-clock seconds of a round, medians over the rounds of all turns but the
first of each run; the last column is the range of the turns' own ratios. All runs of a row end with
the same model, or the benchmark fails. A run has so many workers of one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

# Libraries read these when they are imported.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import numpy as np
import torch
from small_runs import SMALL, model_of

from reticent.core.plan import TaskSection
from reticent.core.tasks import Examples, Task, load_task

FILES, WAIT = "RETICENT_BENCHMARK_FILES", "RETICENT_BENCHMARK_WAIT_MS"


class Stored:
    """A task of which each client's examples are a file; all else is that of ``digits``."""

    name = "stored"

    def __init__(self, inner: Task, folder: Path) -> None:
        self._folder = folder
        self.classes, self.input_shape = inner.classes, inner.input_shape
        self.clients, self.nominal_examples = inner.clients, inner.nominal_examples
        self.public, self.test = inner.public, inner.test
        self.teacher, self.student = inner.teacher, inner.student

    def client(self, index: int) -> Examples:
        """Wait as the environment says, which changes under a task that is kept, and read."""
        time.sleep(float(os.environ[WAIT]) / 1000)
        with np.load(self._folder / f"{index}.npz") as arrays:
            inputs, labels = arrays["inputs"], arrays["labels"]
        return Examples(torch.from_numpy(inputs), torch.from_numpy(labels))


@cache
def _digits(clients: int, seed: int) -> Task:
    return load_task(TaskSection(name="digits", clients=clients, public_examples=200), seed)


def stored(section: TaskSection, seed: int) -> Stored:
    """Return the task of which the environment names the folder."""
    return Stored(_digits(section.clients, seed), Path(os.environ[FILES]))


def write_files(folder: Path, clients: int) -> None:
    """Write the examples of every client of ``digits`` at seed 0."""
    task = _digits(clients, 0)
    for index in range(clients):
        held = task.client(index)
        inputs, labels = held.inputs.numpy(), held.labels.numpy()
        np.savez_compressed(folder / f"{index}.npz", inputs=inputs, labels=labels)


@dataclass(frozen=True)
class Row:
    """Median seconds of a round without and with loading ahead.

    Attributes:
        task: Where examples come from.
        wait_ms: What a client waits for them.
        workers: How many.
        clients: Of a round.
        without_s: In their turn.
        ahead_s: Loaded ahead.
        ratio: The first by the second.
        lowest: Ratio of the turn in which it is that.
        highest: The same.
    """

    task: str
    wait_ms: float
    workers: int
    clients: int
    without_s: float
    ahead_s: float
    ratio: float
    lowest: float
    highest: float


def seconds_of(overrides: Sequence[str]) -> tuple[list[float], str]:
    """Return the seconds of each round but the first, and the hash of the last model."""
    rounds: list[float] = []
    model = model_of(overrides, progress=lambda metrics: rounds.append(metrics["seconds"]))
    return rounds[1:], model


def measured(overrides: Sequence[str], turns: int) -> tuple[list[float], list[float], list[float]]:
    """Return seconds of rounds in turn and loaded ahead, and the ratio of each turn's medians."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    models: set[str] = set()
    ratios: list[float] = []
    for turn in range(turns):
        own: dict[bool, float] = {}
        for ahead in (False, True) if turn % 2 else (True, False):
            key = f"engine.prefetch={str(ahead).lower()}"
            rounds, model = seconds_of([*overrides, key])
            models.add(model)
            seconds[ahead] += rounds
            own[ahead] = statistics.median(rounds)
        ratios.append(own[False] / own[True])
    if len(models) != 1:
        raise SystemExit(f"different models: {sorted(models)}")
    return seconds[False], seconds[True], ratios


def row_of(task: str, wait: float, workers: int, rounds: int, turns: int) -> Row:
    """Measure one row."""
    keys = [*SMALL, f"federation.rounds={rounds}", f"engine.workers={workers}"]
    if task == "files":
        os.environ[WAIT] = str(wait)
        keys.append("task.name=prefetch:stored")
    without, ahead, ratios = measured(keys, turns)
    first, second = statistics.median(without), statistics.median(ahead)
    return Row(
        *(task, wait, workers, 60, round(first, 4), round(second, 4), round(first / second, 2)),
        *(round(min(ratios), 2), round(max(ratios), 2)),
    )


def line(row: Row) -> str:
    """Return a row of the table."""
    where = row.task if row.task == "digits" else f"files, {row.wait_ms:g} ms"
    return (
        f"| {where} | {row.workers} | {row.without_s:.3f} | {row.ahead_s:.3f} | "
        f"{row.ratio:.2f}x | {row.lowest:.2f} to {row.highest:.2f} |"
    )


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--wait", type=float, nargs="*", default=[0.0, 1.0, 3.0, 10.0])
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    rows: list[Row] = []
    print("| examples | workers | in turn, s | ahead, s | faster | of a turn |", flush=True)
    print("|---|---:|---:|---:|---:|---:|", flush=True)
    with TemporaryDirectory() as folder:
        os.environ[FILES] = folder
        write_files(Path(folder), 100)
        for task, wait in [("digits", 0.0), *(("files", wait) for wait in given.wait)]:
            rows.append(row_of(task, wait, given.workers, given.rounds, given.turns))
            print(line(rows[-1]), flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
