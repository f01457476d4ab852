"""The live view of a run on a terminal: one block of lines, redrawn in place after each round."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from reticent.core.plan import Plan

from .output import Progress, epsilon_text, human_bytes, human_time, redraws

_LEVELS = "▁▂▃▄▅▆▇█"
_LABELS = 9  # width of the column of names
_APART = 0.1  # least seconds between two frames
_RECENT = 10  # rounds that the rate of clients is taken over
_SLIM = 48  # narrower terminals get the figures alone


def progress_for(
    plan: Plan, as_json: bool, before: Sequence[dict[str, Any]] = ()
) -> Progress | Dashboard:
    """Return the dashboard on a terminal that can redraw lines, and plain lines elsewhere.

    ``before`` are the rounds that a run that goes on has committed.
    """
    if as_json or not redraws():
        return Progress(plan.federation.rounds, as_json, before)
    return Dashboard(plan, before)


@dataclass
class Board:
    """What the frame shows; a function of the committed rounds and the clock.

    Attributes:
        rounds: Rounds of the plan.
        target: Epsilon that the plan allows; None where it gives none.
        private: Whether privacy is on.
        number: The last committed round.
        epsilon: As it was after the last round; None before, and where privacy is off.
        accuracies: Of every tested round.
        up: Encoded bytes of updates, of the whole run.
        down: Ditto of models and constants.
        replies: Of the last round.
        dropped: Ditto.
        fleet: Virtual time of a simulated fleet, seconds; None without one.
    """

    rounds: int
    target: float | None
    private: bool
    number: int = 0
    epsilon: float | None = None
    accuracies: list[float] = field(default_factory=list)
    up: int = 0
    down: int = 0
    replies: int = 0
    dropped: int = 0
    fleet: float | None = None
    _recent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_RECENT))

    def add(self, metrics: dict[str, Any]) -> None:
        """Take in a committed round."""
        self.number = metrics["round"]
        self.up += metrics["bytes_up"]
        self.down += metrics["bytes_down"] + metrics["bytes_constants"]
        self.replies, self.dropped = metrics["replies"], sum(metrics["dropped"].values())
        self._recent.append((metrics["replies"], metrics["seconds"]))
        if "virtual" in metrics:
            self.fleet = metrics["virtual"]["time"]
        if metrics["epsilon"] is not None:
            self.epsilon = metrics["epsilon"]
        if metrics["accuracy"] is not None:
            self.accuracies.append(metrics["accuracy"])

    @property
    def rate(self) -> float:
        """Clients a second over the last rounds."""
        seconds = sum(took for _, took in self._recent)
        return sum(replies for replies, _ in self._recent) / seconds if seconds else 0.0


class Dashboard:
    """Shows committed rounds in one block at the end of the terminal; lines go above it.

    The terminal never has to be restored: the cursor stays visible, the screen is the ordinary
    one, and no thread draws. After an error or Ctrl-C, or if the process is killed, the last frame
    simply stays.
    """

    def __init__(self, plan: Plan, before: Sequence[dict[str, Any]] = ()) -> None:
        """Start the clock."""
        private = plan.private
        self._console = _Steady(file=sys.stdout, highlight=False, markup=False)
        self._live: Live | None = None
        self._drawn = 0.0
        target = None if private is None else private.epsilon
        fleet = None if plan.fleet is None else 0.0
        self._board = Board(plan.federation.rounds, target, private is not None, fleet=fleet)
        for metrics in before:
            self._board.add(metrics)
        self._first: tuple[int, float] | None = None

    def say(self, line: str) -> None:
        """Print a line above the block."""
        self._console.print(Text(line), soft_wrap=True)

    def round(self, metrics: dict[str, Any]) -> None:
        """Show a committed round; frames come at most ten times a second."""
        self._board.add(metrics)
        now = time.monotonic()
        if self._first is None:
            self._first = (metrics["round"] - 1, now - metrics["seconds"])
        if now - self._drawn < _APART and metrics["round"] < self._board.rounds:
            return
        self._drawn = now
        if self._live is None:
            # What else is printed, a library's warnings included, goes above the block.
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        frame = frame_of(self._board, self._left(now), self._console.width)
        self._live.update(frame, refresh=True)

    def clear(self) -> None:
        """Leave the last frame, and go on below it."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _left(self, now: float) -> float:
        board, (before, began) = self._board, self._first or (0, now)
        return (now - began) / max(1, board.number - before) * (board.rounds - board.number)


class _Steady(Console):
    """A console that never hides the cursor, so that nothing has to bring it back."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


def frame_of(board: Board, left: float, width: int) -> Table:
    """Return the block, at most ``width`` columns wide; on a slim terminal without bars."""
    slim = width < _SLIM
    table = Table.grid(padding=(0, 1))
    table.add_column(style="bold", width=_LABELS, no_wrap=True)
    table.add_column(no_wrap=True, overflow="crop")
    bar = 0 if slim else max(10, min(40, width - 40))
    rows = [
        ("round", _rounds(board, left, bar)),
        ("accuracy", _accuracy(board, slim, width)),
        ("ε", _epsilon(board, bar)),
        ("bytes", Text(f"{human_bytes(board.up)} up, {human_bytes(board.down)} down")),
        ("clients", Text(_clients(board))),
    ]
    if board.fleet is not None:
        rows.append(("fleet", Text(human_time(board.fleet))))
    for name, value in rows:
        table.add_row(name, value)
    return table


def _rounds(board: Board, left: float, bar: int) -> Table:
    words = f"{board.number}/{board.rounds}"
    end = f"{_clock(left)} left" if board.number < board.rounds else "done"
    return _line(words, _bar(board.number, board.rounds, bar), end)


def _accuracy(board: Board, slim: bool, width: int) -> Text:
    if not board.accuracies:
        return Text("not tested yet")
    last = f"{board.accuracies[-1]:.1%}"
    if slim:
        return Text(last)
    best = f"best {max(board.accuracies):.1%}"
    curve = sparkline(board.accuracies, max(8, min(40, width - _LABELS - 24)))
    return Text.assemble(f"{last:<6} ", (curve, "cyan"), f"  {best}")


def _epsilon(board: Board, bar: int) -> Table | Text:
    if not board.private:
        return Text("∞ (privacy is off)")
    if board.epsilon is None:
        return Text("not known before the first round")
    spent = epsilon_text(board.epsilon)
    if board.target is None:
        return Text(f"{spent} (no target)")
    return _line(f"{spent}", _bar(board.epsilon, board.target, bar), f"of {board.target:g}")


def _clients(board: Board) -> str:
    dropped = f", {board.dropped} dropped" if board.dropped else ""
    return f"{board.rate:,.0f}/s, {board.replies} replies{dropped}"


def _line(first: str, bar: ProgressBar | None, last: str) -> Table:
    parts = Table.grid(padding=(0, 1))
    parts.add_row(*([f"{first:<7}", bar, last] if bar else [first, last]))
    return parts


def _bar(done: float, total: float, width: int) -> ProgressBar | None:
    return ProgressBar(total=total, completed=min(done, total), width=width) if width else None


def _clock(seconds: float) -> str:
    whole = int(seconds + 0.5)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def sparkline(values: Sequence[float], most: int) -> str:
    """Return a curve of at most ``most`` letters: means of equal stretches, low to high.

    Values that are no number are left out.

    >>> sparkline([0.0, 0.5, 1.0], 8), sparkline([0.7], 8)
    ('▁▅█', '▁')
    """
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    count = min(most, len(values))
    edges = [round(k * len(values) / count) for k in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), max(means) - min(means) or 1.0
    top = len(_LEVELS) - 1
    return "".join(_LEVELS[int((mean - low) / span * top + 0.5)] for mean in means)
