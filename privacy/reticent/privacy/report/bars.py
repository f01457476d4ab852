"""Bar charts as inline SVG: counts of clients, and a claim beside what an audit found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .svg import HEIGHT, WIDTH, ticks
from .words import bound_text, epsilon_text

MOST_BARS = 10
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 28, 56


@dataclass(frozen=True)
class Bar:
    """So many clients, under a name such as an epsilon or a range of it."""

    name: str
    count: int


@dataclass(frozen=True)
class BarChart:
    """Counts side by side.

    Attributes:
        identity: Prefix of element ids, unique on the page.
        title: Read out by screen readers.
        description: Ditto: what the chart shows, in words.
        x_label: Name of the horizontal axis.
        bars: At least one, in order.
    """

    identity: str
    title: str
    description: str
    x_label: str
    bars: tuple[Bar, ...]
    y_label: str = "clients"


def spread(values: Sequence[tuple[float, int]], rounded_up: bool = True) -> tuple[Bar, ...]:
    """Return bars for ``(value, clients)`` pairs: one a value, or ten equal ranges if too many.

    Values are finite and not negative. Nobody is lost: counts add up to those given.
    """
    text = epsilon_text if rounded_up else bound_text
    counts: dict[float, int] = {}
    for value, clients in values:
        counts[value] = counts.get(value, 0) + clients
    if len(counts) <= MOST_BARS:
        return tuple(Bar(text(value), counts[value]) for value in sorted(counts))
    low, high = min(counts), max(counts)
    width = (high - low) / MOST_BARS
    binned = [0] * MOST_BARS
    for value, clients in counts.items():
        binned[min(MOST_BARS - 1, int((value - low) / width))] += clients
    return tuple(
        Bar(f"{text(low + k * width)}–{text(low + (k + 1) * width)}", n)
        for k, n in enumerate(binned)
    )


def bar_chart(chart: BarChart) -> str:
    """Return ``chart`` as an ``<svg>`` element; every bar carries its count as text."""
    top = ticks(0, max(bar.count for bar in chart.bars))[-1] or 1
    bottom, width = HEIGHT - _BOTTOM, (WIDTH - _LEFT - _RIGHT) / len(chart.bars)
    kind, offset = ("small", 14) if len(chart.bars) > 6 else ("tick", 0)
    parts: list[str] = []
    for index, bar in enumerate(chart.bars):
        tall = round(bar.count / top * (bottom - _TOP), 1)
        middle = round(_LEFT + (index + 0.5) * width, 1)
        thick = round(min(64, width * 0.7), 1)
        name_y = bottom + 18 + offset * (index % 2)
        parts += [
            f'<rect class="bar" x="{middle - thick / 2:.1f}" y="{bottom - tall:.1f}" '
            f'width="{thick}" height="{tall}"/>',
            f'<text class="count" x="{middle}" y="{bottom - tall - 6:.1f}" text-anchor="middle">'
            f"{bar.count:,}</text>",
            f'<text class="{kind}" x="{middle}" y="{name_y}" text-anchor="middle">'
            f"{escape(bar.name)}</text>",
        ]
    axis = f'<path class="axis" d="M{_LEFT} {bottom}H{WIDTH - _RIGHT}"/>'
    return _svg(chart.identity, chart.title, chart.description, [*parts, axis, *_names(chart)])


def _names(chart: BarChart) -> list[str]:
    middle = (_TOP + HEIGHT - _BOTTOM) / 2
    return [
        f'<text class="name" x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{HEIGHT - 6}" '
        f'text-anchor="middle">{escape(chart.x_label)}</text>',
        f'<text class="name" x="20" y="{middle}" text-anchor="middle" '
        f'transform="rotate(-90 20 {middle})">{escape(chart.y_label)}</text>',
    ]


@dataclass(frozen=True)
class Claim:
    """A claimed epsilon beside an audit's lower bound.

    Attributes:
        claimed: Finite; the most that the mechanism is said to reveal.
        lower_bound: The least that the audit shows it to reveal.
        confidence: Of the lower bound.
        violated: Whether the audit contradicts the claim.
    """

    claimed: float
    lower_bound: float
    confidence: float
    violated: bool


def claim_chart(claim: Claim) -> str:
    """Return a bar for what is claimed and a marked line for what was shown, as ``<svg>``."""
    marks = ticks(0, max(claim.claimed, claim.lower_bound) or 1)
    left, right, bottom = 24, WIDTH - 24, 190

    def x(value: float) -> float:
        return round(left + value / marks[-1] * (right - left), 1)

    claimed, found = x(claim.claimed), x(claim.lower_bound)
    verdict = "above the claim: violated" if claim.violated else "not above the claim"
    sure = f"{100 * claim.confidence:g} % confidence"
    parts = [
        *(
            f'<path class="grid" d="M{x(m)} 44V{bottom}"/>'
            f'<text x="{x(m)}" y="{bottom + 18}" text-anchor="middle">{m:g}</text>'
            for m in marks
        ),
        f'<rect class="bar" x="{left}" y="64" width="{round(claimed - left, 1)}" height="34"/>',
        f'<text class="count" x="{left + 4}" y="57">claimed: at most '
        f"{epsilon_text(claim.claimed)}</text>",
        f'<path class="found" d="M{found} 118V166M{found} 142H{right}"/>',
        f'<path class="tip" d="M{right - 8} 136L{right} 142L{right - 8} 148"/>',
        _found_label(claim, found, left, right, sure),
        f'<path class="axis" d="M{left} {bottom}H{right}"/>',
        f'<text class="name" x="{WIDTH / 2}" y="{bottom + 42}" text-anchor="middle">ε</text>',
    ]
    description = (
        f"Claimed epsilon at most {epsilon_text(claim.claimed)}; the audit shows at least "
        f"{bound_text(claim.lower_bound)} with {sure}, {verdict}."
    )
    return _svg("claim", "Claim against audit", description, parts, height=246)


def _found_label(claim: Claim, found: float, left: float, right: float, sure: str) -> str:
    text = f"audit: at least {bound_text(claim.lower_bound)} ({sure})"
    end = found > (left + right) / 2
    place, anchor = (found - 8, "end") if end else (found + 8, "start")
    return (
        f'<text class="label ink" x="{place}" y="132" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _svg(
    identity: str, title: str, description: str, parts: Sequence[str], height: int = HEIGHT
) -> str:
    names = f"{identity}-title {identity}-desc"
    return "\n".join(
        [
            f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" '
            f'aria-labelledby="{names}" xmlns="http://www.w3.org/2000/svg">',
            f'<title id="{identity}-title">{escape(title)}</title>',
            f'<desc id="{identity}-desc">{escape(description)}</desc>',
            *parts,
            "</svg>",
        ]
    )
