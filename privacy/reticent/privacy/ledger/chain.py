"""The chain of entries: ``mac_i = HMAC-SHA256(key, mac_{i-1} || entry_i)``, and its check."""

from __future__ import annotations

import hashlib
import hmac
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any

from reticent.core.errors import LedgerError

from .files import GENESIS
from .records import Head

Entry = tuple[str, str, str, int, str]  # kind, device, run, round, body


@dataclass(frozen=True)
class End:
    """The last entry: its number (0 when empty), its MAC and its device time."""

    sequence: int = 0
    mac: bytes = GENESIS
    at: int = 0

    @property
    def head(self) -> Head:
        """The same, as it is shown to others."""
        return Head(self.sequence, self.mac.hex())


@dataclass
class Walk:
    """What a walk along a chain finds.

    Attributes:
        end: The last entry.
        totals: Charges and number of the first of them, by device and event.
        releases: SHA-256 of every release, by device, run and round, in order.
    """

    end: End = field(default_factory=End)
    totals: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    releases: dict[tuple[str, str, int], str] = field(default_factory=dict)


def seal(key: bytes, *fields: object) -> bytes:
    """Return the MAC of a row that stands outside the chain."""
    return hmac.digest(key, _row(fields), "sha256")


def link(key: bytes, previous: bytes, sequence: int, entry: Sequence[Any], at: Any) -> bytes:
    """Return an entry's MAC; ``at`` is None for entries of version 1, which had no device time."""
    fields = [sequence, *entry] if at is None else [sequence, *entry, at]
    return hmac.digest(key, previous + _row(fields), "sha256")


def _row(fields: Sequence[object]) -> bytes:
    """Return ``fields`` as JSON, as ``json.dumps`` without spaces would write them, but faster."""
    return f"[{','.join([_value(field) for field in fields])}]".encode("utf-8", "replace")


def _value(value: object) -> str:
    # Quotes tell 1 from "1" and show where a text ends; a value of a type that never was written (a
    # damaged record) stands in a form that no written one has, and so cannot match.
    if type(value) is str:
        return encode_basestring_ascii(value)
    return str(value) if type(value) is int else f"?{value!r}"


def end_of(db: sqlite3.Connection, folder: Path) -> End:
    """Return the last entry."""
    row = db.execute(
        "SELECT sequence, mac, coalesce(at, 0) FROM entries ORDER BY sequence DESC LIMIT 1"
    ).fetchone()
    if row is None:
        return End()
    if not isinstance(row[1], bytes) or not isinstance(row[2], int):
        raise broken(folder, row[0])
    return End(*row)


def append(
    db: sqlite3.Connection, key: bytes, folder: Path, entries: Sequence[Entry], at: int
) -> End:
    """Add ``entries`` at device time ``at`` and return the new end."""
    end = end_of(db, folder)
    mac, rows = end.mac, []
    for number, entry in enumerate(entries, end.sequence + 1):
        mac = link(key, mac, number, entry, at)
        rows.append((number, *entry, at, mac))
    db.executemany("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
    return End(end.sequence + len(rows), mac, at) if rows else end


def walk(db: sqlite3.Connection, key: bytes, folder: Path) -> Walk:
    """Recompute every MAC and recount what follows from the entries.

    Raises:
        LedgerError: Naming the first entry that is missing or altered.
    """
    result, sequence, mac, last = Walk(), 0, GENESIS, 0
    rows = db.execute(
        "SELECT sequence, mac, at, kind, device, run, round, body FROM entries ORDER BY sequence"
    )
    for number, stored, at, *entry in rows:
        sequence += 1
        mac = link(key, mac, sequence, entry, at)
        if number != sequence or stored != mac or (at or 0) < last:
            raise broken(folder, sequence)
        last = at or 0
        kind, device, run, round, body = entry
        if kind == "charge":
            charges, first = result.totals.get((device, body), (0, sequence))
            result.totals[device, body] = charges + 1, first
        elif kind == "release":
            result.releases[device, run, round] = body
        else:
            raise LedgerError(f"{folder}: entry {sequence} is of an unknown kind {kind!r}")
    result.end = End(sequence, mac, last)
    return result


def check_payloads(db: sqlite3.Connection, folder: Path, found: Walk) -> None:
    """Check that the payloads kept are those of each device's last release.

    Raises:
        LedgerError: If one is missing, altered or in excess.
    """
    latest = {key[0]: (key, digest) for key, digest in found.releases.items()}
    kept: dict[str, Any] = {}
    for device, run, round, payload in db.execute("SELECT * FROM payloads"):
        data = payload if isinstance(payload, bytes) else b""
        kept[device] = ((device, run, round), hashlib.sha256(data).hexdigest())
    if kept != latest:
        raise LedgerError(f"{folder}: a stored release differs from its entry")


def broken(folder: Path, sequence: int) -> LedgerError:
    """Return the error that names a damaged entry."""
    return LedgerError(f"{folder}: entry {sequence} is missing or was altered")
