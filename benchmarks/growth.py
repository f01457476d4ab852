"""Growth of a simulation: time and memory of a round against cohort, population, size, workers.

Run with ``python benchmarks/growth.py [--quick] [--json] [--page FILE.html]``. Each point is a run
of ``round_peers.py`` (ours, in process, private) in a process of its own; its time is the median of
the rounds but the first, its memory the largest resident sum of all its processes. A slope is that
of a least-squares line through the logarithms: 0 does not grow, 1 grows in proportion.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from round import turn

from reticent.privacy.report.svg import Chart, line_chart

CORES = len(os.sched_getaffinity(0))
BASE: dict[str, object] = {
    "model": "mlp-13",
    "population": 10_000,
    "cohort": 100,
    "rounds": 4,
    "workers": CORES,
}
WIDTHS = {10_345: 13, 100_180: 126, 1_000_120: 1_258, 10_000_315: 12_579}
STYLE = (
    "body{font-family:sans-serif}svg{width:30em}text{font-size:11px}.grid{stroke:#ddd}"
    ".axis{stroke:#888}.line{fill:none;stroke:#06c;stroke-width:2}.dot{fill:#06c}"
)


@dataclass(frozen=True)
class Point:
    """One run: what was varied and to what, seconds of a round and peak memory."""

    axis: str
    value: int
    round_s: float
    peak_mb: float


def points(quick: bool) -> dict[str, dict[int, dict[str, object]]]:
    """Return, for each axis, what each of its values changes in the base."""
    top = 2 if quick else 4
    small = {"population": 1_000, "cohort": 20} if quick else {}
    return {
        "cohort": {10**k: {"cohort": 10**k} for k in range(1, top + 1)},
        "population": {10**k: {**small, "population": 10**k} for k in range(3, 4 + top // 2 + 1)},
        "parameters": {
            size: {**small, "model": f"mlp-{width}"}
            for size, width in list(WIDTHS.items())[: top if quick else None]
        },
        "workers": {count: {**small, "workers": count} for count in range(1, CORES + 1)},
    }


def measure(quick: bool, limit: float) -> list[Point]:
    """Run every point."""
    found: list[Point] = []
    for axis, values in points(quick).items():
        for value, changes in values.items():
            job = {**BASE, **changes, **({"rounds": 2} if quick else {})}
            outcome = turn("ours", job, sys.executable, limit)
            if isinstance(outcome, str):
                sys.exit(f"{axis} {value}: {outcome}")
            seconds = statistics.median(outcome.rounds[1:])
            found.append(Point(axis, value, seconds, outcome.peak_mb))
            print(found[-1], file=sys.stderr, flush=True)
    return found


def slope(xs: list[float], ys: list[float]) -> float:
    """Return the slope of the least-squares line through the logarithms."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def slopes(found: list[Point]) -> dict[str, dict[str, float]]:
    """Return the slopes of time and memory along each axis that has two values or more."""
    result: dict[str, dict[str, float]] = {}
    for axis in dict.fromkeys(p.axis for p in found):
        along = [p for p in found if p.axis == axis]
        if len(along) > 1:
            xs = [float(p.value) for p in along]
            result[axis] = {
                "time": slope(xs, [p.round_s for p in along]),
                "memory": slope(xs, [p.peak_mb for p in along]),
            }
    return result


def table(found: list[Point]) -> str:
    """Return points and slopes as aligned text."""
    lines = [f"{'axis':<12}{'value':>12}{'round s':>10}{'peak MB':>10}"]
    lines += [f"{p.axis:<12}{p.value:>12,}{p.round_s:>10.3f}{p.peak_mb:>10.0f}" for p in found]
    lines += ["", f"{'slope':<12}{'time':>12}{'memory':>10}"]
    lines += [f"{a:<12}{s['time']:>12.2f}{s['memory']:>10.2f}" for a, s in slopes(found).items()]
    return "\n".join(lines)


def page(found: list[Point]) -> str:
    """Return an HTML page with a chart of time and one of memory for each axis."""
    charts: list[str] = []
    for axis in dict.fromkeys(p.axis for p in found):
        along = [p for p in found if p.axis == axis]
        for name, unit, values in (
            ("time of a round", "s", [p.round_s for p in along]),
            ("peak memory", "MB", [p.peak_mb for p in along]),
        ):
            xs = [math.log10(p.value) for p in along]
            chart = Chart(
                identity=f"{axis}-{unit}",
                title=f"{name} against {axis}",
                description=f"Decimal logarithms of {name} in {unit} and of {axis}.",
                x_label=f"log10 {axis}",
                y_label=f"log10 {unit}",
                points=tuple(zip(xs, map(math.log10, values), strict=True)),
            )
            charts.append(f"<h2>{chart.title}</h2>\n{line_chart(chart)}")
    body = "\n".join(charts)
    return f"<!doctype html><title>Growth</title><style>{STYLE}</style>\n{body}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the small end of each axis")
    parser.add_argument("--json", action="store_true", help="print points and slopes as JSON")
    parser.add_argument("--page", type=Path, help="write charts to this HTML file")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds that a run may take")
    args = parser.parse_args()
    found = measure(args.quick, args.limit)
    if args.page:
        args.page.write_text(page(found), encoding="utf-8")
    result = {"points": [asdict(p) for p in found], "slopes": slopes(found)}
    print(json.dumps(result, indent=1) if args.json else table(found))


if __name__ == "__main__":
    main()
