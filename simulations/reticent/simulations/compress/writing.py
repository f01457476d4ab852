"""What a search leaves behind: the table, its plot and the plan that won."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import tomli_w

from reticent.core.decoding import parse_json
from reticent.core.errors import PlanError
from reticent.core.plain_files import read_plain
from reticent.core.run import without_none, write_atomic
from reticent.privacy.report.svg import ticks

from .search import Outcome, front
from .trials import Trial

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _MARGIN = 720, 420, 72, 56, 24
_FILES = ("pareto.json", "pareto.md", "pareto.svg", "plan.toml")
_KEYS = {"targets", "met", "best", "trials", "refused"}
_MOST_BYTES = 2**24
HEADERS = ("candidate", "sent", "bytes", "latency", "up", "public only", "accuracy", "front")


def require_writable(folder: Path) -> None:
    """Make ``folder`` and see that files can be written there, before hours of search.

    Raises:
        PlanError: If not, or if it holds a file that no search wrote and that would be replaced.
    """
    taken = [name for name in _FILES if os.path.lexists(folder / name)]
    if taken and not _is_outcome(folder / "pareto.json"):
        raise PlanError(
            f"--out {folder}: holds a {taken[0]} of another kind, which would be replaced: choose "
            "another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PlanError(f"--out {folder}: cannot be written: {error.strerror}") from error


def _is_outcome(path: Path) -> bool:
    """Return whether a file is the table of a search, by all of its keys."""
    try:
        data = parse_json(read_plain(path, _MOST_BYTES, PlanError, links=False))
    except (PlanError, ValueError):
        return False
    return isinstance(data, dict) and data.keys() == _KEYS


def write_outcome(outcome: Outcome, folder: Path) -> None:
    """Write ``pareto.json``, ``pareto.md``, ``pareto.svg`` and ``plan.toml`` to ``folder``.

    Raises:
        PlanError: If they cannot be written.
    """
    winner = tomli_w.dumps(without_none(outcome.best.candidate.plan.model_dump(mode="json")))
    files = {
        "pareto.json": json.dumps(to_json(outcome), indent=2),
        "pareto.md": markdown(outcome),
        "pareto.svg": plot(outcome),
        "plan.toml": winner,
    }
    try:
        for name, text in files.items():
            write_atomic(folder / name, text.encode())
    except OSError as error:
        raise PlanError(f"--out {folder}: cannot be written: {error.strerror}") from error


def to_json(outcome: Outcome) -> dict[str, Any]:
    """Return the outcome as JSON-able data."""
    best = front(outcome.trials)
    return {
        "targets": [{"kind": t.kind, "limit": t.limit} for t in outcome.targets],
        "met": outcome.met,
        "best": outcome.best.candidate.plan.digest,
        "trials": [
            {
                "name": trial.candidate.name,
                "plan": trial.candidate.plan.digest,
                "parameters": trial.parameters,
                "size": trial.size,
                "latency_us": trial.latency,
                "bytes_up": trial.bytes,
                "public_only": trial.public_only,
                "accuracy": trial.accuracy,
                "front": trial in best,
            }
            for trial in outcome.trials
        ],
        "refused": [{"name": name, "reason": reason} for name, reason in outcome.refused],
    }


def rows(outcome: Outcome) -> list[list[str]]:
    """Return the table: the most accurate first, the winner marked with an arrow."""
    best, winner = front(outcome.trials), outcome.best
    ordered = sorted(outcome.trials, key=lambda trial: (-trial.accuracy, trial.size))
    return [
        [
            f"{'→ ' if trial is winner else ''}{trial.candidate.name}",
            f"{trial.parameters:,}",
            f"{trial.size:,}",
            f"{trial.latency:.0f} µs",
            f"{trial.bytes:,}",
            f"{trial.public_only:.1%}",
            f"{trial.accuracy:.1%}",
            "yes" if trial in best else "",
        ]
        for trial in ordered
    ]


def markdown(outcome: Outcome) -> str:
    """Return the table as Markdown."""
    lines = [f"| {' | '.join(HEADERS)} |", "|---" + "|---:" * (len(HEADERS) - 1) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(outcome)]
    if outcome.refused:
        lines += ["", "Not possible:", ""]
        lines += [f"- {name}: {reason}" for name, reason in outcome.refused]
    return "\n".join(lines) + "\n"


def plot(outcome: Outcome) -> str:
    """Return accuracy against bytes of the deployed file as a self-contained SVG picture."""
    sizes = [trial.size / 1000 for trial in outcome.trials]
    shares = [100 * trial.accuracy for trial in outcome.trials]
    x_ticks, y_ticks = ticks(0, max(sizes)), ticks(min(shares), max(max(shares), min(shares) + 1))
    frame = (x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1])
    best, winner = front(outcome.trials), outcome.best
    marks = [_mark(trial, frame, trial in best, trial is winner) for trial in outcome.trials]
    title = "Accuracy on held-out public examples against size of the deployed model"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
            'font-family="sans-serif" font-size="13" role="img">',
            f"<title>{title}</title>",
            f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
            *_axes(x_ticks, y_ticks, frame),
            _limit(outcome, frame),
            *marks,
            "</svg>",
            "",
        ]
    )


def _x(value: float, frame: tuple[float, ...]) -> float:
    low, high = frame[:2]
    return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _MARGIN)


def _y(value: float, frame: tuple[float, ...]) -> float:
    low, high = frame[2:]
    return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _BOTTOM - _MARGIN)


def _axes(xs: Sequence[float], ys: Sequence[float], frame: tuple[float, ...]) -> list[str]:
    floor, right = _HEIGHT - _BOTTOM, _WIDTH - _MARGIN
    lines = [
        f'<line x1="{_LEFT}" x2="{right}" y1="{_y(y, frame):.1f}" y2="{_y(y, frame):.1f}" '
        f'stroke="#ddd"/><text x="{_LEFT - 8}" y="{_y(y, frame) + 4:.1f}" text-anchor="end">{y:g} '
        "%</text>"
        for y in ys
    ]
    lines += [
        f'<text x="{_x(x, frame):.1f}" y="{floor + 20}" text-anchor="middle">{x:g}</text>'
        for x in xs
    ]
    middle = (_LEFT + right) / 2
    lines.append(
        f'<text x="{middle}" y="{_HEIGHT - 12}" text-anchor="middle">deployed model, kB</text>'
    )
    return lines


def _limit(outcome: Outcome, frame: tuple[float, ...]) -> str:
    limits = [t.limit / 1000 for t in outcome.targets if t.kind == "size"]
    if not limits or not frame[0] <= limits[0] <= frame[1]:
        return ""
    x = _x(limits[0], frame)
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_MARGIN}" y2="{_HEIGHT - _BOTTOM}" stroke="#b45309" '
        f'stroke-dasharray="5 4"/><text x="{x + 5:.1f}" y="{_MARGIN + 12}" fill="#b45309">target'
        "</text>"
    )


def _mark(trial: Trial, frame: tuple[float, ...], on_front: bool, wins: bool) -> str:
    x, y = _x(trial.size / 1000, frame), _y(100 * trial.accuracy, frame)
    fill = "#0f5c6b" if on_front else "#9aa5a8"
    ring = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="10" fill="none" stroke="#b45309"/>'
    name = escape(trial.candidate.name)
    dot = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}"><title>{name}</title></circle>'
    return dot + (ring if wins else "")


def nearest(outcome: Outcome) -> str:
    """Return, for targets that nothing meets together, the least that each was brought to."""
    parts: list[str] = []
    for target in outcome.targets:
        least = min(outcome.trials, key=lambda trial: trial.value(target.kind))
        value = least.value(target.kind)
        if not math.isfinite(value) or value > target.limit:
            unit = "µs" if target.kind == "latency" else "B"
            parts.append(
                f"{target.text}: the least was {value:,.0f} {unit} ({least.candidate.name})"
            )
    return "; ".join(parts) or "each target was met by some candidate, but not all by one"
