"""Line charts as inline SVG: no scripts, no fonts, no files; colours come from the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 12, 24, 48
_APART = 18  # smallest distance between two labels, in user units


@dataclass(frozen=True)
class Rule:
    """A horizontal line with a name, such as a limit."""

    name: str
    y: float


@dataclass(frozen=True)
class Chart:
    """One line over rounds, with horizontal rules.

    Attributes:
        identity: Prefix of element ids, unique on the page.
        title: Read out by screen readers.
        description: Ditto: what the chart shows, in words.
        x_label: Name of the horizontal axis.
        y_label: Name of the vertical axis.
        points: ``(x, y)`` pairs, finite, ascending in x; at least one.
        rules: Horizontal lines.
        from_zero: Whether the vertical axis begins at 0.
        y_text: Formats a tick of the vertical axis.
        planned: A second line, dashed: what was planned or allowed.
        labels_left: Whether rules are named at their left end, where the line is far below.
    """

    identity: str
    title: str
    description: str
    x_label: str
    y_label: str
    points: tuple[tuple[float, float], ...]
    rules: tuple[Rule, ...] = ()
    from_zero: bool = False
    y_text: Callable[[float], str] = "{:g}".format
    labels_left: bool = False
    planned: tuple[tuple[float, float], ...] = ()


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return at most ``most`` round numbers (1, 2 or 5 times a power of ten) that span a range.

    >>> ticks(0, 8.3)
    [0, 2, 4, 6, 8, 10]
    """
    # A range that is nothing beside its values is drawn as a point among round numbers.
    size = max(abs(low), abs(high), 1e-9)
    span = high - low if high - low > 1e-9 * size else size
    step = 10.0 ** math.floor(math.log10(span / most))
    for factor in (1, 2, 5, 10, 20):
        first, last = math.floor(low / (step * factor)), math.ceil(high / (step * factor))
        if last - first + 1 <= most:
            break
    digits = max(0, -math.floor(math.log10(step * factor)))
    values = [round(k * step * factor, digits) for k in range(first, last + 1)]
    return [int(v) if v == int(v) else v for v in values]


def line_chart(chart: Chart) -> str:
    """Return ``chart`` as an ``<svg>`` element."""
    both = (*chart.points, *chart.planned)
    xs = [0.0, *(x for x, _ in both)]
    ys = [*(y for _, y in both), *(rule.y for rule in chart.rules)]
    x_ticks = [x for x in ticks(0, max(xs)) if x == int(x) and x <= max(xs)]
    y_ticks = ticks(0 if chart.from_zero else min(ys), max(ys))
    frame = _Frame(0, max(xs), y_ticks[0], y_ticks[-1])
    name = f"{chart.identity}-title {chart.identity}-desc"
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{name}" '
        'xmlns="http://www.w3.org/2000/svg">',
        f'<title id="{chart.identity}-title">{escape(chart.title)}</title>',
        f'<desc id="{chart.identity}-desc">{escape(chart.description)}</desc>',
        *_axes(chart, frame, x_ticks, y_ticks),
        *(_rule_line(rule, index, frame) for index, rule in enumerate(chart.rules)),
        _planned(chart.planned, frame),
        _line(chart.points, frame),
        *_rule_labels(chart, frame),
        "</svg>",
    ]
    return "\n".join(parts)


@dataclass(frozen=True)
class _Frame:
    """Maps data to user units."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        share = (value - self.x0) / (self.x1 - self.x0 or 1.0)
        return round(_LEFT + share * (WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.y0) / (self.y1 - self.y0 or 1.0)
        return round(HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM), 1)


def _axes(
    chart: Chart, frame: _Frame, x_ticks: Sequence[float], y_ticks: Sequence[float]
) -> list[str]:
    left, right, bottom = _LEFT, WIDTH - _RIGHT, HEIGHT - _BOTTOM
    parts = [
        f'<path class="grid" d="M{left} {frame.y(y)}H{right}"/>'
        f'<text x="{left - 8}" y="{frame.y(y) + 4:.1f}" text-anchor="end">'
        f"{escape(chart.y_text(y))}</text>"
        for y in y_ticks
    ]
    parts += [
        f'<path class="axis" d="M{frame.x(x)} {bottom}v5"/>'
        f'<text x="{frame.x(x)}" y="{bottom + 19}" text-anchor="middle">{x:g}</text>'
        for x in x_ticks
    ]
    middle = (_TOP + bottom) / 2
    return [
        *parts,
        f'<path class="axis" d="M{left} {bottom}H{right}"/>',
        f'<text class="name" x="{(left + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{escape(chart.x_label)}</text>",
        f'<text class="name" x="15" y="{middle}" text-anchor="middle" '
        f'transform="rotate(-90 15 {middle})">{escape(chart.y_label)}</text>',
    ]


def _line(points: Sequence[tuple[float, float]], frame: _Frame) -> str:
    places = [f"{frame.x(x)} {frame.y(y)}" for x, y in points]
    dots = [places[-1]] if len(places) > 24 else places
    circles = "".join(
        f'<circle class="dot" cx="{x}" cy="{y}" r="3"/>' for x, y in (p.split() for p in dots)
    )
    return f'<path class="line" d="M{"L".join(places)}"/>{circles}'


def _planned(points: Sequence[tuple[float, float]], frame: _Frame) -> str:
    if not points:
        return ""
    places = "L".join(f"{frame.x(x)} {frame.y(y)}" for x, y in points)
    return f'<path class="planned" d="M{places}"/>'


def _rule_line(rule: Rule, index: int, frame: _Frame) -> str:
    y = frame.y(rule.y)
    return f'<path class="rule rule-{index}" d="M{_LEFT} {y}H{WIDTH - _RIGHT}"/>'


def _rule_labels(chart: Chart, frame: _Frame) -> list[str]:
    """Place each name above its line, or below when the line above it is too near."""
    rules = chart.rules
    x, anchor = (_LEFT + 6, "start") if chart.labels_left else (WIDTH - _RIGHT - 4, "end")
    order = sorted(range(len(rules)), key=lambda i: frame.y(rules[i].y))
    labels: list[str] = []
    last = -math.inf
    for index in order:
        line = frame.y(rules[index].y)
        place = line - 7
        if place - last < _APART:
            place = max(line + 14, last + _APART)
        last = place
        labels.append(
            f'<text class="label label-{index}" x="{x}" y="{place:.1f}" '
            f'text-anchor="{anchor}">{escape(rules[index].name)}</text>'
        )
    return labels
