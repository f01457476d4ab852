"""What the audit shows at several epsilons, and of faults planted in the client's real path.

Run with ``python benchmarks/audit.py [--json] [--task fashion] [--rounds N] [--canaries N]``. The
plan is the default one with another epsilon or unit; every figure is measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

# Libraries read these when they are imported.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

from reticent.cli.output import epsilon_text
from reticent.client import round as client_round
from reticent.client import training
from reticent.core.plan import Plan, parse_plan
from reticent.privacy import randomness
from reticent.simulations.audit import Audit, audit_plan

SOUND = (
    ("ε 1", ("privacy.epsilon=1.0",)),
    ("ε 4", ("privacy.epsilon=4.0",)),
    ("ε 8", ("privacy.epsilon=8.0",)),
    ("ε 8, local trust", ("privacy.epsilon=8.0", 'privacy.trust="local"')),
    ("ε 8, replace-one", ("privacy.epsilon=8.0", 'privacy.relation="replace-one"')),
    ("ε 8, per-layer", ("privacy.epsilon=8.0", 'privacy.clipping="per-layer"')),
    ("ε 8, client level", ("privacy.epsilon=8.0", 'privacy.unit="client"')),
)
FAULTY = ("privacy.epsilon=4.0",)


@dataclass(frozen=True)
class Row:
    """One audit."""

    what: str
    claimed: float
    lower_bound: float
    any_dependence: float
    any_mechanism: float
    estimate: float | None
    largest_correlation: float | None
    variance_ratio: float | None
    canaries: int
    rounds: int
    verdict: str
    seconds: float


@contextmanager
def patched(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Replace ``owner.name`` by ``make`` of it."""
    real = getattr(owner, name)
    setattr(owner, name, make(real))
    try:
        yield
    finally:
        setattr(owner, name, real)


def noise_halved(real: Any) -> Any:
    def halved(*arguments: Any) -> Any:
        step = real(*arguments)
        return replace(step, noise=step.noise / 2)

    return halved


def clipping_off(real: Any) -> Any:
    def unclipped(self: Any, *given: Any) -> Any:
        inputs, labels, counts, loss, clip, *rest = given
        return real(self, inputs, labels, counts, loss, 1e6 * clip, *rest)

    return unclipped


def noise_reused(real: Any) -> Any:
    def stream(self: Any, *path: Any) -> Any:
        # (purpose, run, client, round, step): without the client, clients of a round share noise.
        return real(self, *((*path[:2], *path[3:]) if path[0] == "noise" else path))

    return stream


def rate_doubled(real: Any) -> Any:
    return lambda self, count: real(self, count) / 2


FAULTS = (
    ("noise halved", client_round, "noisy_step", noise_halved),
    ("clipping off", training.ClippedGradients, "sums", clipping_off),
    ("noise reused", randomness.SeededRandomness, "stream", noise_reused),
    ("q under-stated", randomness._SeededStream, "uniform", rate_doubled),
)


def row(what: str, audit: Audit) -> Row:
    values = asdict(audit)
    check = audit.randomness
    known = {k: values[k] for k in Row.__dataclass_fields__ if k in values}
    return Row(
        what=what,
        largest_correlation=check.largest_correlation,
        variance_ratio=check.variance_ratio,
        verdict=audit.verdict,
        **known,
    )


def rows(task: str, canaries: int | None, rounds: int | None) -> Iterator[Row]:
    def plan(overrides: tuple[str, ...]) -> Plan:
        return parse_plan("", [f"task.name={task}", *overrides])

    for what, overrides in SOUND:
        yield row(what, audit_plan(plan(overrides), canaries, rounds))
    for what, owner, name, make in FAULTS:
        with patched(owner, name, make):
            yield row(f"{what} (ε 4)", audit_plan(plan(FAULTY), canaries, rounds))


def line(r: Row) -> str:
    correlation = "" if r.largest_correlation is None else f"{r.largest_correlation:.3f}"
    variance = "" if r.variance_ratio is None else f"{r.variance_ratio:.3f}"
    lower = (r.lower_bound, r.any_dependence, r.any_mechanism)
    bounds = " ".join(f"{math.floor(value * 100) / 100:8.2f}" for value in lower)
    return (
        f"{r.what:24} {epsilon_text(r.claimed):>8} {bounds} {correlation:>8} {variance:>8} "
        f"{r.verdict:>11} {r.seconds:6.1f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--task", default="fashion")
    parser.add_argument("--canaries", type=int)
    parser.add_argument("--rounds", type=int)
    given = parser.parse_args()
    found: list[Row] = []
    if not given.json:
        print(
            f"{'':24} {'claimed':>8} {'bound':>8} {'depend.':>8} {'any':>8} {'corr.':>8} "
            f"{'variance':>8} {'verdict':>11}"
        )
    for r in rows(given.task, given.canaries, given.rounds):
        found.append(r)
        if not given.json:
            print(line(r), flush=True)
    if given.json:
        print(json.dumps([asdict(r) for r in found], indent=2))


if __name__ == "__main__":
    main()
