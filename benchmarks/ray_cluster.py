"""A Ray cluster of two nodes on loopback that loses a worker, and then a whole node, mid-round.

Run with ``python benchmarks/ray_cluster.py [--json]``. The plan is run in one process first; exits
with status 1 unless the cluster gives the same model each time, and lost what it was meant to lose
in the round that it was meant to.
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
PLAN += ["privacy.trust=local", "federation.steps_per_round=30"]  # rounds of some seconds
STRUCK, DELAY = 3, 0.25  # the round, and seconds after it was begun
QUICK_TO_NOTICE = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}


@dataclass(frozen=True)
class Row:
    """One run: where, what happened to it, what it said of that, its model, and how long it took.

    ``rounds`` are the seconds of its rounds.
    """

    where: str
    event: str
    said: str
    model: str
    rounds: list[float]
    seconds: float


class Blow:
    """Strikes shortly after a round was begun, and hears what the run says of it before its end."""

    def __init__(self, strike: Callable[[], None]) -> None:
        self.said: list[str] = []
        self.rounds: list[float] = []
        self.problem = "it was not struck"
        self._strike = strike

    def say(self, line: str) -> None:
        """Take a line that the run says."""
        if line.startswith("a worker ended") and len(self.rounds) == STRUCK - 1:
            self.said.append(line)

    def progress(self, metrics: dict[str, Any]) -> None:
        """Take the end of a round, and strike in the next if that is the one."""
        self.rounds.append(metrics["seconds"])
        if metrics["round"] == STRUCK - 1:
            threading.Timer(DELAY, self._fall).start()

    def _fall(self) -> None:
        try:
            self._strike()
        except Exception as error:
            self.problem = f"it could not be struck: {error!r}"
        else:
            self.problem = ""


def nothing() -> None:
    """Leave the cluster alone."""


def kill_an_actor() -> None:
    """Kill the process of one of our actors, while it plays."""
    os.kill(titled("ray::_Actor.play")[0], signal.SIGKILL)


def run(where: str, event: str, overrides: list[str], strike: Callable[[], None]) -> Row:
    """Run the plan and let ``strike`` happen in its third round."""
    began, blow = time.perf_counter(), Blow(strike)
    model = model_of([*PLAN, *overrides], progress=blow.progress, say=blow.say)
    print(f"{where}, {event}: {model[:16]}", file=sys.stderr, flush=True)
    if blow.problem:
        sys.exit(f"{where}, {event}: {blow.problem}")
    if bool(blow.said) != (strike is not nothing):
        sys.exit(f"{where}, {event}: in round {STRUCK} the run said {blow.said} of lost workers")
    said = "; ".join(blow.said)
    return Row(where, event, said, model, blow.rounds, time.perf_counter() - began)


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
    rounds = "".join(f"{f'round {k + 1}':>9}" for k in range(len(rows[0].rounds)))
    lines = [f"{'where':<15}{'event in round 3':<18}{'model':<18}{rounds}{'all, s':>9}  it said"]
    for row in rows:
        times = "".join(f"{seconds:>9.1f}" for seconds in [*row.rounds, row.seconds])
        lines.append(f"{row.where:<15}{row.event:<18}{row.model[:16]:<18}{times}  {row.said}")
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
