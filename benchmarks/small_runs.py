"""What the benchmarks of whole runs share: small plans, and the hash that a run ends with."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}

from reticent.core.plan import parse_plan
from reticent.core.run import Run
from reticent.simulations.simulate import simulate

SMALL = (
    "task.name=digits",
    "task.clients=100",
    "task.public_examples=200",
    "teacher.epochs=1",
    "student.epochs=1",
    "federation.clients_per_round=60",
    "federation.rounds=4",
    "federation.sampling_rate=0.3",
)


class Stopped(Exception):
    """Stands for a crash between two rounds."""


def stop_after(round: int) -> Callable[[dict[str, Any]], None]:
    """Return what stops a run when ``round`` is committed."""

    def progress(metrics: dict[str, Any]) -> None:
        if metrics["round"] == round:
            raise Stopped

    return progress


def model_of(
    overrides: Sequence[str],
    *,
    stop: int | None = None,
    progress: Callable[[dict[str, Any]], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
) -> str:
    """Run a plan to its end in a folder of its own and return the hash of the final model.

    Args:
        overrides: Of the default plan.
        stop: Stop after this round, and go on.
        progress: Called after each round.
        say: Gets the lines that the run says.
    """
    plan = parse_plan("", overrides)
    with TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        if stop is not None:
            try:
                simulate(plan, run, progress=stop_after(stop))
            except Stopped:
                done: Run = simulate(plan, run, resume=True)
                return str(done.read_summary()["model"])
        return str(simulate(plan, run, progress=progress, say=say).read_summary()["model"])
