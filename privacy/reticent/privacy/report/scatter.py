"""Points with error bars as inline SVG, on a plain or a logarithmic axis, in named series."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from .svg import Rule, ticks

WIDE, PLOT_HEIGHT = 640, 300
SERIES = 6  # colours; more series repeat them with other marks
_LEFT, _RIGHT, _BOTTOM, _LEGEND = 76, 16, 50, 22
_DODGE = 7  # between spots of neighbouring series at one place
_GLYPH, _GAP = 7.4, 34  # width of a letter, and of a mark with its space, in user units
_MARKS = (
    '<circle class="spot" cx="{x}" cy="{y}" r="4.5"/>',
    '<path class="spot" d="M{x} {y}m-5 4.5h10l-5 -9.5z"/>',
    '<path class="spot" d="M{x} {y}m-4.2 -4.2h8.4v8.4h-8.4z"/>',
    '<path class="spot" d="M{x} {y}m0 -6l6 6l-6 6l-6 -6z"/>',
)


@dataclass(frozen=True)
class Spot:
    """A point, the ends of its bars, and what is shown when a pointer rests on it.

    Attributes:
        x: Finite; > 0 on a logarithmic axis.
        y: Finite.
        x_ends: Lower and upper end of the horizontal bar; None for no bar.
        y_ends: Ditto, vertical.
        text: Read out, and shown on hovering.
    """

    x: float
    y: float
    text: str
    y_ends: tuple[float, float] | None = None
    x_ends: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    """Spots of one name; ``joined`` by a line in order of x."""

    name: str
    spots: tuple[Spot, ...]
    joined: bool = True


@dataclass(frozen=True)
class ScatterChart:
    """Series over two axes; at least one spot.

    Attributes:
        identity: Prefix of element ids, unique on the page.
        title: Read out by screen readers.
        description: Ditto: what the chart shows, in words.
        x_label: Name of the horizontal axis.
        y_label: Name of the vertical axis.
        series: In order of the legend.
        rules: Horizontal lines with names.
        logarithmic: Whether the horizontal axis is.
        x_text: Formats a tick of the horizontal axis.
        y_text: Formats a tick of the vertical axis.
        y_limits: The vertical axis is cut there; bars may be.
        width: In user units; text is as large in all charts that are shown at their width.
        dodged: Whether series are set apart by a few units, where they share places on the
            horizontal axis.
    """

    identity: str
    title: str
    description: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    rules: tuple[Rule, ...] = ()
    logarithmic: bool = False
    x_text: Callable[[float], str] = "{:g}".format
    y_text: Callable[[float], str] = "{:g}".format
    y_limits: tuple[float, float] = (-math.inf, math.inf)
    width: int = WIDE
    dodged: bool = False


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten, or powers alone over a wide range, that span a range.

    >>> log_ticks(1, 8), log_ticks(0.3, 20000)
    ([1, 2, 5, 10], [0.1, 1, 10, 100, 1000, 10000, 100000])
    """
    factors = (1, 2, 5) if high / low <= 1000 else (1,)
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    found = [float(f"{factor}e{power}") for power in powers for factor in factors]
    first = max(value for value in found if value <= low * (1 + 1e-9))
    last = min(value for value in found if value >= high * (1 - 1e-9))
    values = [value for value in found if first <= value <= last]
    return [int(v) if v == int(v) else v for v in values]


def scatter_chart(chart: ScatterChart) -> str:
    """Return ``chart`` as an ``<svg>`` element."""
    legend = _legend(chart.series, chart.width)
    frame = _frame(chart, 16 + _LEGEND * (max((row for _, row, _ in legend), default=-1) + 1))
    name = f"{chart.identity}-title {chart.identity}-desc"
    parts = [
        f'<svg class="chart scatter" viewBox="0 0 {chart.width} {frame.bottom + _BOTTOM}" '
        f'role="img" aria-labelledby="{name}" xmlns="http://www.w3.org/2000/svg">',
        f'<title id="{chart.identity}-title">{escape(chart.title)}</title>',
        f'<desc id="{chart.identity}-desc">{escape(chart.description)}</desc>',
        *_axes(chart, frame),
        *_rules(chart.rules, frame),
        *(part for k, series in enumerate(chart.series) for part in _series(series, k, frame)),
        *_names(chart.rules, frame),
        *(_entry(chart.series[k].name, k, x, row) for k, (x, row, _) in enumerate(legend)),
        "</svg>",
    ]
    return "\n".join(part for part in parts if part)


@dataclass(frozen=True)
class _Frame:
    """Maps data to user units."""

    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    top: int
    logarithmic: bool
    width: int
    dodge: tuple[float, ...]

    @property
    def right(self) -> int:
        return self.width - _RIGHT

    @property
    def bottom(self) -> int:
        return self.top + PLOT_HEIGHT - _BOTTOM

    def x(self, value: float) -> float:
        low, high, place = self.x_ticks[0], self.x_ticks[-1], value
        if self.logarithmic:
            low, high, place = math.log(low), math.log(high), math.log(max(value, low))
        share = min(1.0, max(0.0, (place - low) / (high - low or 1.0)))
        return round(_LEFT + share * (self.right - _LEFT), 1)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        share = min(1.0, max(0.0, (value - low) / (high - low or 1.0)))
        return round(self.bottom - share * (self.bottom - self.top), 1)


def _frame(chart: ScatterChart, top: int) -> _Frame:
    spots = [spot for series in chart.series for spot in series.spots]
    xs = [x for spot in spots for x in (spot.x, *(spot.x_ends or ()))]
    ys = [y for spot in spots for y in (spot.y, *(spot.y_ends or ()))]
    low, high = chart.y_limits
    kept = [min(high, max(low, y)) for y in [*ys, *(rule.y for rule in chart.rules)]]
    if chart.logarithmic:
        x_ticks: Sequence[float] = log_ticks(min(spot.x for spot in spots), max(xs))
    else:
        x_ticks = ticks(0, max(max(xs), 1e-9))
    count = len(chart.series)
    apart = tuple(_DODGE * (k - (count - 1) / 2) * chart.dodged for k in range(count))
    y_ticks = ticks(min(kept), max(kept))
    return _Frame(x_ticks, y_ticks, top, chart.logarithmic, chart.width, apart)


def _axes(chart: ScatterChart, frame: _Frame) -> Iterator[str]:
    right, bottom = frame.right, frame.bottom
    for y in frame.y_ticks:
        yield (
            f'<path class="grid" d="M{_LEFT} {frame.y(y)}H{right}"/>'
            f'<text x="{_LEFT - 8}" y="{frame.y(y) + 4:.1f}" text-anchor="end">'
            f"{escape(chart.y_text(y))}</text>"
        )
    for x in frame.x_ticks:
        yield (
            f'<path class="axis" d="M{frame.x(x)} {bottom}v5"/><text x="{frame.x(x)}" '
            f'y="{bottom + 19}" text-anchor="middle">{escape(chart.x_text(x))}</text>'
        )
    middle = (frame.top + bottom) / 2
    yield f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>'
    yield (
        f'<text class="name" x="{(_LEFT + right) / 2}" y="{bottom + 42}" '
        f'text-anchor="middle">{escape(chart.x_label)}</text>'
        f'<text class="name" x="15" y="{middle}" text-anchor="middle" '
        f'transform="rotate(-90 15 {middle})">{escape(chart.y_label)}</text>'
    )


def _rules(rules: Sequence[Rule], frame: _Frame) -> Iterator[str]:
    for rule in rules:
        yield f'<path class="rule" d="M{_LEFT} {frame.y(rule.y)}H{frame.right}"/>'


def _names(rules: Sequence[Rule], frame: _Frame) -> Iterator[str]:
    """Name each line above it; where two names would touch, the lower one stands below."""
    last = -math.inf
    for rule in sorted(rules, key=lambda rule: -rule.y):
        y = frame.y(rule.y)
        place = y - 6 if y - 6 - last >= 15 else max(y + 14, last + 15)
        last = place
        yield (
            f'<text class="label" x="{frame.right - 2}" y="{place:.1f}" text-anchor="end">'
            f"{escape(rule.name)}</text>"
        )


def _series(series: Series, index: int, frame: _Frame) -> Iterator[str]:
    yield f'<g class="series series-{index % SERIES}">'
    places = [(frame.x(spot.x) + frame.dodge[index], frame.y(spot.y)) for spot in series.spots]
    if series.joined and len(places) > 1:
        yield f'<path class="joint" d="M{"L".join(f"{x} {y}" for x, y in places)}"/>'
    for spot, (x, y) in zip(series.spots, places, strict=True):
        yield from _bars(spot, frame, x, y)
        mark = _mark(index, x, y)
        yield f"<g><title>{escape(spot.text)}</title>{mark}</g>"
    yield "</g>"


def _bars(spot: Spot, frame: _Frame, x: float, y: float) -> Iterator[str]:
    if spot.y_ends is not None:
        low, high = (frame.y(end) for end in spot.y_ends)
        yield f'<path class="error" d="M{x} {low}V{high}M{x - 5} {low}h10M{x - 5} {high}h10"/>'
    if spot.x_ends is not None:
        low, high = (frame.x(end) for end in spot.x_ends)
        yield f'<path class="error" d="M{low} {y}H{high}M{low} {y - 5}v10M{high} {y - 5}v10"/>'


def _mark(index: int, x: float, y: float) -> str:
    # Shape as well as colour, and another shape for the same colour in the next cycle.
    return _MARKS[(index + index // SERIES) % len(_MARKS)].format(x=x, y=y)


def _legend(series: Sequence[Series], wide: int) -> list[tuple[float, int, float]]:
    """Return ``(x, row, width)`` of every name; none for a single one without a name."""
    if len(series) == 1 and not series[0].name:
        return []
    placed: list[tuple[float, int, float]] = []
    x, row = float(_LEFT), 0
    for each in series:
        width = _GAP + _GLYPH * len(each.name)
        if placed and x + width > wide - _RIGHT:
            x, row = float(_LEFT), row + 1
        placed.append((x, row, width))
        x += width
    return placed


def _entry(name: str, index: int, x: float, row: int) -> str:
    y = 12 + _LEGEND * row
    return (
        f'<g class="series series-{index % SERIES}">{_mark(index, x + 6, y)}</g>'
        f'<text x="{x + 17:.1f}" y="{y + 4.5}">{escape(name)}</text>'
    )
