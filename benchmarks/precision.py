"""Test accuracy of the teacher in each precision, and what a step of its training takes.

    python benchmarks/precision.py [plan.toml] [--set section.key=value ...] [--seeds 0 1 2]

One thread, as runs train. On a machine with a GPU, ``--set teacher.device=cuda`` measures there.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from reticent.core.plan import Plan, parse_plan
from reticent.core.tasks import load_task
from reticent.server.distillation import new_teacher
from reticent.server.means import require_means, teacher_means
from reticent.server.public_training import accuracy, steps_of, train_public

PRECISIONS = ("fp32", "bf16", "fp16")


def trained(plan: Plan) -> tuple[float, float]:
    """Return the test accuracy of the plan's first teacher, and seconds a step."""
    task, section = load_task(plan.task, plan.seed), plan.teacher
    public = task.public()
    model = new_teacher(plan, task)
    began = time.monotonic()
    train_public(
        model,
        public,
        section.epochs,
        section.learning_rate,
        plan.seed,
        "teacher",
        means=teacher_means(plan),
    )
    seconds = time.monotonic() - began
    return accuracy(model, task.test()), seconds / steps_of(public, section.epochs)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("plan", nargs="?", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    text = options.plan.read_text() if options.plan else ""
    torch.set_num_threads(1)
    print("| precision | accuracy, % (range) | ms a step (median) |\n|---|---:|---:|")
    for precision in PRECISIONS:
        found = []
        for seed in options.seeds:
            keys = [*options.set, f"seed={seed}", f'teacher.precision="{precision}"']
            plan = parse_plan(text, keys)
            require_means(plan)
            found.append(trained(plan))
        reached = [100 * accurate for accurate, _ in found]
        milliseconds = 1000 * statistics.median(seconds for _, seconds in found)
        print(
            f"| `{precision}` | {statistics.mean(reached):.1f} ({min(reached):.1f}-"
            f"{max(reached):.1f}) | {milliseconds:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
