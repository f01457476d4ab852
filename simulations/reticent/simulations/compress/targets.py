"""What a search is to reach: ``size=20kB``, ``latency=100us``, ``bytes=2kB``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from reticent.core.errors import PlanError

_BYTES = {"B": 1.0, "kB": 1e3, "MB": 1e6}
_TIME = {"us": 1.0, "µs": 1.0, "ms": 1e3, "s": 1e6}
KINDS = {"size": _BYTES, "latency": _TIME, "bytes": _BYTES}
"""Units of each kind: of the deployed file, of one prediction, of one update on its way up."""

_FORM = re.compile(r"([a-z]+)=([0-9.eE+-]+) ?([a-zA-Zµ]*)")


@dataclass(frozen=True)
class Target:
    """An upper limit.

    Attributes:
        kind: ``size``, ``latency`` or ``bytes``.
        limit: In bytes or microseconds.
        text: As it was given.
    """

    kind: str
    limit: float
    text: str


def parse_targets(texts: Iterable[str]) -> tuple[Target, ...]:
    """Return the targets that ``texts`` name.

    >>> parse_targets(["size=20kB"])[0].limit
    20000.0

    Raises:
        PlanError: If there is none, one is malformed, not above 0, or a kind is named twice.
    """
    targets = tuple(_parsed(text) for text in texts)
    kinds = [target.kind for target in targets]
    if not kinds or len(set(kinds)) != len(kinds):
        given = ", ".join(target.text for target in targets) or "nothing"
        raise PlanError(f"--target: {given}: give each of {', '.join(KINDS)} at most once, and one")
    return targets


def _parsed(text: str) -> Target:
    found = _FORM.fullmatch(text.strip())
    kind = found.group(1) if found else ""
    if found is None or kind not in KINDS:
        raise PlanError(
            f"--target {text}: must be one of size=20kB (the deployed file), latency=100us (one "
            "prediction, one thread) and bytes=2kB (one update of one client)"
        )
    units = KINDS[kind]
    unit = found.group(3) or next(iter(units))
    if unit not in units:
        raise PlanError(f"--target {text}: unit {unit!r} must be one of {', '.join(units)}")
    try:
        limit = float(found.group(2)) * units[unit]
    except ValueError:
        limit = math.nan
    if not 0 < limit < math.inf:
        raise PlanError(f"--target {text}: must be a finite number above 0")
    return Target(kind, limit, text)
