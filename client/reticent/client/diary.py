"""What happened on a device, for its owner: a short file that never leaves it.

``diary.jsonl`` holds one JSON object a line, the newest last, and is kept below twice
:data:`MOST_LINES` lines. It holds no data, no losses and no key.

Guarantee: what was not done pushes out nothing that was done, however often somebody asks for it.
When the file is cut, refusals and failures that are the same become one line with their number,
and have room of their own.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path
from time import time
from typing import Any

from reticent.core.run import write_atomic
from reticent.privacy.ledger.files import alone

from .failures import Failures, read_failures, write_failures

MOST_LINES = 500
MOST_REFUSALS = 100
"""Different refusals and failures that are kept when the diary is cut, beside the other lines."""

MOST_TEXT = 300
_LATEST = 1e11
"""Seconds since 1970 that every calendar still has."""

BEGUN, RELEASED, ENDED = "begun", "released", "ended"
REFUSED, FAILED = _NOT_DONE = "refused", "failed"
INSTALLED = "installed"
_CHANGES = {BEGUN: 1, ENDED: -1, RELEASED: -math.inf}
"""What each line does to the count of rounds without an end; of any other line, nothing."""


@dataclass(frozen=True)
class Line:
    """One thing that happened.

    Attributes:
        at: Seconds since 1970.
        what: ``begun``, then ``released`` or, if it was refused later, ``ended``; ``refused`` or
            ``failed``, and why; ``installed``, and which model.
        reason: Why, for a person.
        plan: Digest of the plan that the order named.
        round: The order's round.
        code: What the server was told; 0 where nothing was refused.
        times: How often it happened, the last time as written here; more than 1 for ``refused``
            and ``failed`` alone.
    """

    at: float
    what: str
    reason: str = ""
    plan: str = ""
    round: int = 0
    code: int = 0
    times: int = 1


class Diary:
    """The diary in a device's state folder; a crash loses at most the line that was being written.

    Args:
        folder: The state folder; it must exist.
        clock: Returns seconds since 1970.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time) -> None:
        self.folder, self.path, self.clock = folder, folder / "diary.jsonl", clock

    def add(
        self, what: str, reason: str = "", plan: str = "", round: int = 0, code: int = 0
    ) -> None:
        """Append a line; it is on disk on return.

        Raises:
            OSError: If it cannot be written.
        """
        line = Line(self.clock(), what, reason[:MOST_TEXT], plan[:64], round, code)
        data = json.dumps(asdict(line)).encode() + b"\n"
        with alone(self.folder):  # each message is a process of its own
            if what in _CHANGES:  # first: a round must not begin uncounted
                failures = self._failures()
                _count(failures, line)
                write_failures(self.folder, failures)
            self._trim()
            with open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
                end = file.seek(0, os.SEEK_END)
                if end and _last_byte(file, end) != b"\n":
                    data = b"\n" + data  # the rest of a line that power took
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

    def lines(self) -> list[Line]:
        """Return what is there, oldest first; what a crash left half written is left out.

        Raises:
            OSError: If it is there and cannot be read.
        """
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        found = (_parse(line) for line in text.splitlines())
        return [line for line in found if line is not None]

    def failures(self, plan: str) -> tuple[int, float]:
        """Return how often in a row a round of this plan was begun and came to no end, and when.

        A process that was killed leaves no other trace. A round that was refused after it began is
        at an end, but says nothing about whether the next one works.
        """
        return self._failures().get(plan, (0, 0.0))

    def _failures(self) -> Failures:
        failures = read_failures(self.folder)
        if failures is None:  # damaged, or the device is of a version that counted lines
            failures = {}
            for line in self.lines():
                _count(failures, line)
        return failures

    def refusals(self) -> dict[str, int]:
        """Return how often each reason was given, the commonest first."""
        reasons: Counter[str] = Counter()
        for line in self.lines():
            if line.what == REFUSED:
                reasons[line.reason] += line.times
        return dict(reasons.most_common())

    def _trim(self) -> None:
        with suppress(FileNotFoundError):
            if self.path.read_bytes().count(b"\n") >= 2 * MOST_LINES:
                kept = (json.dumps(asdict(line)) + "\n" for line in _cut(self.lines()))
                write_atomic(self.path, "".join(kept).encode())
                self.path.chmod(0o600)


def _count(failures: Failures, line: Line) -> None:
    """Change the count of the line's plan as the line says; a plan without any is taken out."""
    if line.what in _CHANGES:
        count, last = failures.pop(line.plan, (0, 0.0))
        if (after := count + _CHANGES[line.what]) > 0:
            failures[line.plan] = int(after), float(line.at) if line.what == BEGUN else last


def _cut(lines: Iterable[Line]) -> list[Line]:
    """Return the newest lines, oldest first; the last round that was released is among them."""
    numbered = list(enumerate(lines))
    done = [one for one in numbered if one[1].what not in _NOT_DONE]
    released = [one for one in done if one[1].what == RELEASED]
    refused = _folded(one for one in numbered if one[1].what in _NOT_DONE)
    kept = {*done[-MOST_LINES:], *released[-1:], *refused[-MOST_REFUSALS:]}
    return [line for _, line in sorted(kept, key=itemgetter(0))]


def _folded(numbered: Iterable[tuple[int, Line]]) -> list[tuple[int, Line]]:
    """Return the last of each kind of refusal or failure, with how many there were."""
    kinds: dict[object, tuple[int, Line]] = {}
    for number, line in numbered:
        kind = line.what, line.reason, line.plan, line.code
        times = kinds.pop(kind)[1].times if kind in kinds else 0
        kinds[kind] = number, replace(line, times=times + line.times)
    return list(kinds.values())


def _last_byte(file: Any, end: int) -> bytes:
    file.seek(end - 1)
    last = file.read(1)
    file.seek(end)
    return last


def _parse(text: str) -> Line | None:
    try:
        line = Line(**json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return None
    words = (line.what, line.reason, line.plan)
    numbers = (line.round, line.code, line.times)
    sound = all(type(word) is str for word in words) and all(type(n) is int for n in numbers)
    sound = sound and type(line.at) is float and 0 <= line.at < _LATEST
    return line if sound and line.times > 0 else None
