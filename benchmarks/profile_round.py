"""Where the time of a simulated round goes: a profile of whole rounds by part, one worker.

    python benchmarks/profile_round.py [--rounds R] [--json] [--set k=v ...]

The default plan runs in one process on one thread under cProfile, whose own cost weighs on small
calls; the first round, which loads and warms up, is left out. Parts do not overlap, and "other" is
what remains: messages, charges, checks, the server's sums.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import tempfile
from pathlib import Path
from typing import Any

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import torch

from reticent.core.plan import parse_plan
from reticent.simulations.simulate import simulate

PARTS = {
    "clipped gradients": ("client/training.py", "_gradient_sums"),
    "encoding": ("client/round.py", "_encoded"),
    "decoding": ("server/folding.py", "_decoded"),
    "noise": ("client/steps.py", "noised"),
    "choice of the batch": ("client/steps.py", "batch"),
    "examples of a client": ("core/tasks/images.py", "client"),
    "charges": ("client/round.py", "_charge"),
}
WHOLE = ("server/strategy.py", "_run_round")


def seconds(stats: dict[Any, Any], file: str, function: str) -> float:
    """Return the cumulative seconds of one function of the product."""
    return sum(
        row[3]
        for (path, _, name), row in stats.items()
        if name == function and path.endswith(f"reticent/{file}")
    )


def measure(overrides: list[str], rounds: int) -> tuple[float, dict[str, float]]:
    """Return seconds of the profiled rounds, and each part's."""
    profile, done = cProfile.Profile(), 0

    def progress(_: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        if done == 1:
            profile.enable()
        elif done == rounds + 1:
            profile.disable()

    keys = [f"federation.rounds={rounds + 1}", "engine.workers=1", "federation.eval_every=1000"]
    with tempfile.TemporaryDirectory() as folder:
        simulate(parse_plan("", [*keys, *overrides]), Path(folder) / "run", progress=progress)
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    parts = {name: seconds(stats, *where) for name, where in PARTS.items()}
    whole = seconds(stats, *WHOLE)
    return whole, {**parts, "other": whole - sum(parts.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="profiled rounds, at least 1")
    parser.add_argument("--json", action="store_true", help="print seconds as JSON")
    parser.add_argument("--set", action="append", default=[], metavar="K=V", help="plan overrides")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: must be at least 1")
    torch.set_num_threads(1)
    whole, parts = measure(args.set, args.rounds)
    if args.json:
        print(json.dumps({"rounds": args.rounds, "seconds": whole, "parts": parts}, indent=1))
        return
    print(f"{args.rounds} rounds, {whole:.2f} s under the profiler")
    for name, taken in sorted(parts.items(), key=lambda part: -part[1]):
        print(f"{name:<22}{taken:>8.2f} s{taken / whole:>7.0%}")


if __name__ == "__main__":
    main()
