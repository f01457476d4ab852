"""A Ray cluster of two nodes on loopback that loses a worker, and then a whole node, mid-round.

Run with ``python benchmarks/ray_cluster.py [--json]``. The plan is run in one process first; exits
with status 1 unless the cluster gives the same model each time.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from family import titled
from ray.cluster_utils import Cluster  # pyright: ignore[reportMissingImports]
from small_runs import SMALL, model_of

PLAN = [*SMALL, "federation.rounds=4", "federation.retries=0"]
DELAY = 0.1  # seconds after a round was begun
QUICK_TO_NOTICE = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}


@dataclass(frozen=True)
class Row:
    """One run: where, what happened to it, its model, and how long it took."""

    where: str
    event: str
    model: str
    seconds: float


def during(round: int, strike: Callable[[], None]) -> Callable[[dict[str, Any]], None]:
    """Return what strikes shortly after round ``round`` was begun."""

    def progress(metrics: dict[str, Any]) -> None:
        if metrics["round"] == round - 1:
            threading.Timer(DELAY, strike).start()

    return progress


def nothing() -> None:
    """Leave the cluster alone."""


def kill_an_actor() -> None:
    """Kill the process of one of our actors."""
    os.kill(titled("ray::_Actor")[0], signal.SIGKILL)


def run(where: str, event: str, overrides: list[str], strike: Callable[[], None]) -> Row:
    """Run the plan and let ``strike`` happen in its third round."""
    began = time.perf_counter()
    model = model_of([*PLAN, *overrides], progress=during(3, strike))
    print(f"{where}, {event}: {model[:16]}", file=sys.stderr, flush=True)
    return Row(where, event, model, time.perf_counter() - began)


def measure() -> list[Row]:
    """Run in one process, then on a cluster in peace, without an actor, without a node."""
    rows = [run("one process", "none", ["engine.workers=1"], nothing)]
    head = {"num_cpus": 1, "_system_config": QUICK_TO_NOTICE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        second = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        engine = ["engine.kind=ray", f"engine.address={cluster.address}", "engine.workers=2"]
        events = [
            ("none", nothing),
            ("an actor killed", kill_an_actor),
            ("a node killed", lambda: cluster.remove_node(second, allow_graceful=False)),
        ]
        rows += [run("two Ray nodes", name, engine, strike) for name, strike in events]
    finally:
        cluster.shutdown()
    return rows


def table(rows: list[Row]) -> str:
    """Return ``rows`` as aligned text."""
    lines = [f"{'where':<15}{'event in round 3':<18}{'model':<18}{'seconds':>8}"]
    lines += [f"{r.where:<15}{r.event:<18}{r.model[:16]:<18}{r.seconds:>8.1f}" for r in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    args = parser.parse_args()
    rows = measure()
    print(json.dumps([asdict(row) for row in rows], indent=1) if args.json else table(rows))
    if len({row.model for row in rows}) > 1:
        sys.exit("the cluster gave another model")


if __name__ == "__main__":
    main()
