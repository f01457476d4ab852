"""How often in a row a round of each plan was begun and came to no end; ``failures.json``.

A file of its own beside the diary, so that nothing else that a device writes down can push it out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import Any

from reticent.core.decoding import parse_json
from reticent.core.run import write_atomic

MOST_PLANS = 100
"""Plans that are kept, those begun last: only plans that somebody signed are ever begun."""

Failures = dict[str, tuple[int, float]]
"""By plan, the one begun last at the end: how often, and when last, in seconds since 1970."""


def read_failures(folder: Path) -> Failures | None:
    """Return what is written down in a state folder; None if it is absent or damaged."""
    found: Any = None
    with suppress(OSError, ValueError):
        found = parse_json((folder / "failures.json").read_bytes())
    if not isinstance(found, dict) or not all(_is_sound(entry) for entry in found.values()):
        return None
    return {plan: (count, last) for plan, (count, last) in found.items()}


def write_failures(folder: Path, failures: Mapping[str, tuple[int, float]]) -> None:
    """Write them down; a crash leaves the ones before.

    Raises:
        OSError: If they cannot be written.
    """
    kept = dict(list(failures.items())[-MOST_PLANS:])
    write_atomic(folder / "failures.json", json.dumps(kept).encode())


def _is_sound(entry: Any) -> bool:
    if not isinstance(entry, list) or [type(value) for value in entry] != [int, float]:
        return False
    return entry[0] > 0 and isfinite(entry[1])
