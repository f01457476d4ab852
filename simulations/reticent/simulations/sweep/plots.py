"""The plots of a sweep: accuracy against epsilon, bytes and time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from reticent.privacy.report.adversaries import READERS
from reticent.privacy.report.scatter import WIDE, ScatterChart, Series, Spot, scatter_chart
from reticent.privacy.report.svg import Rule
from reticent.privacy.report.words import bytes_text, epsilon_text, percent_text

from .results import Results, Row
from .statistics import Estimate, estimate

PROMISES = ("privacy.epsilon", "privacy.noise_multiplier")
_NARROW = 460
_LIGHT = (
    ".chart text{fill:#5b636d;font:13px sans-serif}.chart .name{fill:#1d2126}"
    ".chart path{fill:none}.chart .grid{stroke:#dedbd2}.chart .axis{stroke:#5b636d}"
    ".series{color:#14606b;fill:currentColor}.series-1{color:#a8561c}.series-2{color:#5a4a9c}"
    ".series-3{color:#1d6b43}.series-4{color:#a62b26}.series-5{color:#5b636d}"
    ".chart .joint,.chart .error{stroke:currentColor;stroke-width:1.6}"
    ".chart .spot{fill:currentColor}"
    ".chart .rule{stroke:#a8561c;stroke-width:1.6;stroke-dasharray:6 4}"
    ".chart .label{fill:#a8561c;font-weight:600}"
)


def plots(results: Results) -> dict[str, dict[str, Any]]:
    """Return ``{"caption", "svg", "note"}`` of every plot with data, by its name."""
    made = {
        "accuracy-epsilon": _against_epsilon(results),
        "accuracy-bytes": _against(
            results, "total", "bytes", "encoded bytes of the whole run, up and down", bytes_text
        ),
        "accuracy-time": _against(
            results, "seconds", "time", "seconds of all rounds, on this machine", "{:g}".format
        ),
    }
    return {name: plot for name, plot in made.items() if plot is not None}


def standalone(svg: str) -> str:
    """Return a plot as a file of its own, on white, with its colours inside."""
    head, rest = svg.split(">", 1)
    white = '<rect width="100%" height="100%" fill="#fff"/>'
    return f"{head}><style>{_LIGHT}</style>{white}{rest}\n"


def _against_epsilon(results: Results) -> dict[str, Any] | None:
    rows = [row for row in results.rows if row.accuracy is not None]
    private = [row for row in rows if 0 < row.epsilons[READERS] < math.inf]
    if not private:
        return None
    open_rows = [row for row in rows if math.isinf(row.epsilons[READERS])]
    rules = _baseline(results) + tuple(
        Rule(f"no privacy {percent_text(row.accuracy.mean)}", row.accuracy.mean)
        for row in open_rows[:2]
        if row.accuracy
    )
    return _plot(
        "accuracy-epsilon",
        "Accuracy against ε",
        "ε against readers of the models (logarithmic)",
        _series(private, lambda row: Estimate(1, row.epsilons[READERS], None, None), joined=True),
        rules,
        lambda x: f"{x:g}",
        logarithmic=True,
    )


def _against(
    results: Results, key: str, name: str, x_label: str, x_text: Callable[[float], str]
) -> dict[str, Any] | None:
    rows = [row for row in results.rows if row.accuracy is not None]
    series = _series(rows, lambda row: row.estimates[key], joined=False)
    if not series:  # bytes and seconds are not shown where they follow from a secret draw
        return None
    return _plot(
        f"accuracy-{name}",
        f"Accuracy against {name}",
        x_label,
        series,
        _baseline(results),
        x_text,
        logarithmic=False,
    )


def _plot(
    identity: str,
    title: str,
    x_label: str,
    series: tuple[Series, ...],
    rules: tuple[Rule, ...],
    x_text: Callable[[float], str],
    logarithmic: bool,
) -> dict[str, Any]:
    spoken = "; ".join(spot.text for each in series for spot in each.spots)
    chart = ScatterChart(
        identity=identity,
        title=title,
        description=f"{title}, with 95 % confidence intervals over seeds: {spoken}.",
        x_label=x_label,
        y_label="test accuracy",
        series=series,
        rules=rules,
        logarithmic=logarithmic,
        x_text=x_text,
        y_text=lambda y: f"{round(100 * y, 6):g} %",
        y_limits=(0.0, 1.0),
        width=WIDE if logarithmic else _NARROW,
        dodged=logarithmic,
    )
    return {"caption": title, "svg": scatter_chart(chart)}


def _series(
    rows: list[Row], x_of: Callable[[Row], Estimate | None], joined: bool
) -> tuple[Series, ...]:
    groups: dict[str, list[Spot]] = defaultdict(list)
    for row in rows:
        spot = _spot(row, x_of(row))
        if spot is not None:
            groups[_name(row)].append(spot)
    return tuple(
        Series(name, tuple(sorted(spots, key=lambda spot: spot.x)), joined)
        for name, spots in groups.items()
    )


def _name(row: Row) -> str:
    """Return the settings that a line of the plot has in common."""
    rest = [
        f"{key.rpartition('.')[2]} {value}" for key, value in row.settings if key not in PROMISES
    ]
    return ", ".join(rest).replace('"', "")


def _spot(row: Row, x: Estimate | None) -> Spot | None:
    y = row.accuracy
    if x is None or y is None:
        return None
    text = f"{row.label}: {percent_text(y.mean)}, ε {epsilon_text(row.epsilons[READERS])}"
    if y.half is not None:
        text += f", 95 % interval {percent_text(y.low)} to {percent_text(y.high)}, n = {y.n}"
    bars = None if y.half is None else (y.low, y.high)
    wide = None if x.half is None else (x.low, x.high)
    return Spot(x.mean, y.mean, text, bars, wide)


def _baseline(results: Results) -> tuple[Rule, ...]:
    """Return the student of public data alone, if all rows begin each seed with the same one.

    It is in the form that the points are in, int8 where these are, and its mean is over all seeds
    of any row: a row may lack some.
    """
    found: dict[int, float] = {}
    for row in results.rows:
        for seed, value in row.baselines.items():
            if round(found.setdefault(seed, value), 3) != round(value, 3):
                return ()
    mean = estimate([*found.values()])
    return (Rule(f"public data only {percent_text(mean.mean)}", mean.mean),) if mean else ()
