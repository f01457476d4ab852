"""Rows outside the chain, each under a MAC of its own: device time, and refusals.

They are overwritten, so whoever can write to the file can put an older one back. That gains
nothing: an older device time renews later, and an older count of refusals only forgets them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from reticent.core.errors import LedgerError

from ..clock import DeviceTime
from .chain import seal


class Marks:
    """Device time as last observed, and how often each device was refused."""

    def __init__(self, folder: Path, db: sqlite3.Connection, key: bytes) -> None:
        """Read and write the rows in ``db``; all writes happen inside a caller's transaction."""
        self._folder, self._db, self._key = folder, db, key

    def check(self) -> None:
        """Raise :class:`LedgerError` if a row was altered."""
        self.time()
        for (device,) in self._db.execute("SELECT device FROM refusals").fetchall():
            self.refusals(device)

    def time(self) -> DeviceTime | None:
        """Return the last observation of device time, or None if there never was one."""
        row = self._db.execute("SELECT at, boot, uptime, mac FROM clock").fetchone()
        if row is None:
            return None
        if row[3] != seal(self._key, "clock", *row[:3]):
            raise LedgerError(f"{self._folder}: the record of device time was altered")
        return DeviceTime(*row[:3])

    def keep(self, now: DeviceTime) -> None:
        """Record an observation; one that says nothing new is not recorded."""
        stored = self.time()
        if now == stored or (stored is None and not now.boot):
            return
        row = now.at, now.boot, now.uptime
        self._db.execute("DELETE FROM clock")
        self._db.execute(
            "INSERT INTO clock VALUES (?, ?, ?, ?)", (*row, seal(self._key, "clock", *row))
        )

    def refusals(self, device: str) -> tuple[int, str, int]:
        """Return how many rounds were refused, and the run and round of the last one."""
        row = self._db.execute(
            "SELECT refused, run, round, mac FROM refusals WHERE device = ?", (device,)
        ).fetchone()
        if row is None:
            return 0, "", -1
        if row[3] != seal(self._key, "refusals", device, *row[:3]):
            raise LedgerError(f"{self._folder}: the count of {device}'s refusals was altered")
        return row[0], row[1], row[2]

    def refuse(self, devices: Sequence[str], run: str, round: int) -> None:
        """Count a refusal of each device; the same round asked again at once is one."""
        rows = []
        for device in devices:
            refused, *last = self.refusals(device)
            if last != [run, round]:
                row = device, refused + 1, run, round
                rows.append((*row, seal(self._key, "refusals", *row)))
        self._db.executemany("INSERT OR REPLACE INTO refusals VALUES (?, ?, ?, ?, ?)", rows)
