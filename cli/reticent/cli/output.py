"""How the command speaks: a live line on a terminal, plain lines otherwise, JSON for machines."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import Any

import click


def redraws() -> bool:
    """Return whether standard output is a terminal that can redraw lines."""
    return sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", None)


class Progress:
    """Shows committed rounds.

    On a terminal that can redraw, one line is rewritten, cut to its width; elsewhere a line is
    printed for each tested round; with ``as_json`` every round is one JSON line.
    """

    def __init__(self, rounds: int, as_json: bool, before: Sequence[dict[str, Any]] = ()) -> None:
        """Start the clock; ``before`` are the rounds that a run that goes on has committed."""
        self._rounds = rounds
        self._json = as_json
        self._live = redraws() and not as_json
        self._first: tuple[int, float] | None = None
        self._tested = ""
        self._bytes = sum(map(_sent, before))

    def say(self, line: str) -> None:
        """Print a line of its own."""
        if self._json:
            click.echo(json.dumps({"message": line}))
        else:
            self.clear()
            click.echo(line)

    def round(self, metrics: dict[str, Any]) -> None:
        """Show a committed round."""
        if self._json:
            click.echo(json.dumps(metrics))
            return
        number = metrics["round"]
        self._bytes += _sent(metrics)
        if self._first is None:
            self._first = (number, time.monotonic())
        if metrics["accuracy"] is not None:
            self._tested = f"accuracy {metrics['accuracy']:.1%}   "
        # Epsilon is that of this round: an older one would be too small.
        line = (
            f"round {number:>4}/{self._rounds}   {self._tested}{_epsilon(metrics['epsilon'])}   "
            f"{metrics['replies']} replies{_dropped(metrics)}   {human_bytes(self._bytes)} sent"
            f"{_virtual(metrics)}"
        )
        if self._live:
            width = shutil.get_terminal_size().columns - 1  # a full line would wrap on some
            click.echo(f"\r\x1b[2K{f'{line}{self._eta(number)}'[:width]}", nl=False)
        elif metrics["accuracy"] is not None:
            click.echo(line)

    @property
    def live(self) -> bool:
        """Whether a line is rewritten in place."""
        return self._live

    def erase(self) -> None:
        """Remove the live line, if there is one."""
        if self._live and self._first is not None:
            click.echo("\r\x1b[2K", nl=False)
            self._first = None

    def clear(self) -> None:
        """End the live line, if there is one."""
        if self._live and self._first is not None:
            click.echo()

    def _eta(self, number: int) -> str:
        first, began = self._first or (number, time.monotonic())
        if number == first:
            return ""
        left = (time.monotonic() - began) / (number - first) * (self._rounds - number)
        return f"   {left:.0f} s left"


def epsilon_text(value: float | str) -> str:
    """Return an epsilon with two decimals, rounded up as the report does: it is an upper bound."""
    return "∞" if isinstance(value, str) else f"{math.ceil(round(value * 100, 6)) / 100:,.2f}"


def _epsilon(value: float | None) -> str:
    return "ε = ∞" if value is None else f"ε {epsilon_text(value)}"


def _sent(metrics: dict[str, Any]) -> int:
    # A line that lacks one is damaged, which the run says, or the report.
    return sum(metrics.get(key, 0) for key in ("bytes_up", "bytes_down", "bytes_constants"))


def _dropped(metrics: dict[str, Any]) -> str:
    count = sum(metrics["dropped"].values())
    return f", {count} dropped" if count else ""


def _virtual(metrics: dict[str, Any]) -> str:
    return f"   fleet {human_time(metrics['virtual']['time'])}" if "virtual" in metrics else ""


def human_time(seconds: float) -> str:
    """Return a duration in words: seconds, or minutes, hours and days.

    >>> [human_time(t) for t in (0.51, 75, 3 * 3600 + 60, 2 * 86400 + 3600)]
    ['0.5 s', '1 min 15 s', '3 h 01 min', '2 d 01 h']
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600:02} h"


def human_energy(joules: float) -> str:
    """Return an energy in words.

    >>> [human_energy(e) for e in (12.3, 7200, 3.6e6)]
    ['12 J', '2.0 Wh', '1.0 kWh']
    """
    if joules < 360:
        return f"{joules:.0f} J"
    return f"{joules / 3600:.1f} Wh" if joules < 3.6e6 else f"{joules / 3.6e6:.1f} kWh"


def human_bytes(count: float) -> str:
    """Return a byte count in words, powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


_WIDEST = 80


def table(headers: list[str], rows: list[list[str]]) -> str:
    """Return a plain text table; the first column is left-aligned, the others right-aligned.

    A cell of more than 80 characters, such as a reason, goes on in further lines.
    """
    parts = [line for row in rows for line in zip(*_even([*map(_lines, row)]), strict=True)]
    widths = [max(len(r[i]) for r in [headers, *parts]) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        return "  ".join([first, *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))])

    return "\n".join([line(headers), line(["-" * w for w in widths]), *map(line, parts)])


def _lines(cell: str) -> list[str]:
    if len(cell) <= _WIDEST:
        return [cell]
    lines = textwrap.wrap(cell, _WIDEST)
    return [line.ljust(max(map(len, lines))) for line in lines]


def _even(columns: list[list[str]]) -> list[list[str]]:
    height = max(map(len, columns))
    return [column + [""] * (height - len(column)) for column in columns]


def emit(data: Any) -> None:
    """Print JSON for machines."""
    click.echo(json.dumps(data, indent=2))
