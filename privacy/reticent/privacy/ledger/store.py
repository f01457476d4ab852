"""The database behind a ledger: transactions that end in the tip, and what is read from it."""

from __future__ import annotations

import json
import math
import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from reticent.core.errors import LedgerError
from reticent.core.protocol import BEFORE

from ..clock import Clock, DeviceTime
from .afford import History
from .chain import End, Entry, append, broken, check_payloads, end_of, walk
from .files import mapped, writing
from .marks import Marks
from .records import Head
from .tip import advance_tip, read_tip


class Store:
    """One open ledger database. Reads are SQLite's; writes happen inside :meth:`transaction`."""

    def __init__(self, folder: Path, db: sqlite3.Connection, key: bytes, clock: Clock) -> None:
        """Use what :func:`.files.prepare` made."""
        self.folder, self.db = folder, db
        self._key, self._clock = key, clock
        self.marks = Marks(folder, db, key)
        self._tip, self._pending = folder / "ledger.tip", None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Write all or nothing; durable, and known to the tip, when the block ends."""
        self._pending: Head | None = None
        with mapped(self.folder):
            with writing(self.db):
                yield
            # After the commit: a tip ahead of its database must mean that charges are lost.
            if self._pending is not None:
                advance_tip(self._tip, self._key, self._pending)

    def append(self, entries: Sequence[Entry], at: int) -> None:
        """Add entries to the chain at device time ``at``, inside a transaction."""
        if entries:
            self._pending = append(self.db, self._key, self.folder, entries, at).head

    def end(self) -> End:
        """Return the last entry."""
        return end_of(self.db, self.folder)

    def contains(self, head: Head) -> bool:
        """Tell whether ``head`` is in the chain."""
        if head.sequence == 0:
            return head == End().head
        if not 0 < head.sequence < 2**63:
            return False  # SQLite does not take such a number
        row = self.db.execute(
            "SELECT mac FROM entries WHERE sequence = ?", (head.sequence,)
        ).fetchone()
        return row is not None and isinstance(row[0], bytes) and row[0].hex() == head.mac

    def check_tip(self) -> None:
        """Raise :class:`LedgerError` unless the chain holds what the tip names."""
        # Read first: whatever another process adds meanwhile is then in the database as well.
        try:
            tip = read_tip(self._tip, self._key)
        except LedgerError:
            walk(self.db, self._key, self.folder)  # with another key, the entries say so
            raise
        if not self.contains(tip):
            raise LedgerError(
                f"{self.folder}: ledger.tip knows of entry {tip.sequence} and ledger.db ends at or "
                f"departs before it (it holds {self.end().sequence}): charges are lost, so the "
                "device must not go on; put back the whole folder"
            )

    def secure(self) -> None:
        """Bring the tip up to the database: a crash between a commit and its tip left it behind.

        What the database shows is durable, and nothing may leave the device before the tip knows.
        """
        advance_tip(self._tip, self._key, self.end().head)

    def verify(self) -> Head:
        """Check everything that can be checked inside the folder, and return the head."""
        self.check_tip()
        with writing(self.db, "BEGIN"):  # one snapshot, whatever others charge meanwhile
            faults = [row[0] for row in self.db.execute("PRAGMA integrity_check(1)")]
            if faults != ["ok"]:
                raise LedgerError(f"{self.folder}: the ledger is damaged: {faults[0]}")
            found = walk(self.db, self._key, self.folder)
            rows = self.db.execute("SELECT device, event, charges, first FROM totals")
            if {(d, e): (n, first) for d, e, n, first in rows} != found.totals:
                raise LedgerError(f"{self.folder}: the totals differ from the chain of charges")
            check_payloads(self.db, self.folder, found)
            self.marks.check()
        return found.end.head

    def observed(self, needed: bool) -> DeviceTime:
        """Return device time now, without recording it.

        Args:
            needed: Whether a window depends on it. If not, the clock is read only by a ledger that
                has been timed before, and may fail: what is then charged counts as charged at the
                next observation, so it leaves a window late.
        """
        stored, end = self.marks.time(), self.end()
        if stored is None and not needed:
            return DeviceTime(end.at)
        # A missing or older row makes time lag: late, never early.
        base = stored if stored is not None and stored.at >= end.at else DeviceTime(end.at)
        try:
            return base.advanced(self._clock.read())
        except LedgerError:
            if needed:
                raise
            return base.advanced(None)

    # What was charged

    def charges(self, devices: Sequence[str], run: str, round: int) -> dict[str, tuple[int, str]]:
        """Return entry number and event of this round's charges, by device."""
        rows = self.db.execute(
            "SELECT device, sequence, body FROM entries WHERE run = ? AND round = ? AND"
            " kind = 'charge' AND device IN (SELECT value FROM json_each(?))",
            (run, round, json.dumps(devices)),
        )
        return {device: (sequence, body) for device, sequence, body in rows}

    def charge_of(self, device: str, run: str, round: int) -> tuple[int, str] | None:
        """Return entry number and event of one device's charge for this round, or None."""
        return self.db.execute(
            "SELECT sequence, body FROM entries WHERE run = ? AND round = ? AND kind = 'charge'"
            " AND device = ?",
            (run, round, device),
        ).fetchone()

    def rounds(self, device: str) -> int:
        """Return how many rounds one device was ever charged for."""
        (count,) = self.db.execute(
            "SELECT (SELECT coalesce(sum(charges), 0) FROM totals WHERE device = ?1) -"
            " (SELECT count(*) FROM entries WHERE device = ?1 AND kind = 'charge'"
            " AND run >= ?2 AND substr(run, 1, length(?2)) = ?2)",
            (device, BEFORE),
        ).fetchone()
        return count

    def add_charges(self, devices: Sequence[str], run: str, round: int, body: str, at: int) -> None:
        """Charge ``devices``, inside a transaction."""
        start = self.end().sequence + 1
        self.append([("charge", device, run, round, body) for device in devices], at)
        self.db.executemany(
            "INSERT INTO totals VALUES (?, ?, 1, ?)"
            " ON CONFLICT (device, event) DO UPDATE SET charges = charges + 1",
            [(device, body, number) for number, device in enumerate(devices, start)],
        )

    def histories(self) -> dict[History, tuple[str, ...]]:
        """Return the distinct histories, each sorted, with the names of their devices, sorted."""
        # Grouped by the database: there may be many devices, and there are few histories.
        rows = self.db.execute(
            "SELECT history, json_group_array(device) FROM (SELECT device,"
            " json_group_array(json_array(event, charges)) AS history FROM"
            " (SELECT * FROM totals ORDER BY device, event) GROUP BY device) GROUP BY history"
        )
        found: dict[History, tuple[str, ...]] = {}
        for text, names in rows:
            history = tuple(sorted((event, charges) for event, charges in json.loads(text)))
            found[history] = tuple(sorted((*found.get(history, ()), *json.loads(names))))
        return found

    def lifetimes(self, devices: Sequence[str]) -> dict[str, History]:
        """Return what each device was ever charged, in order of first charge."""
        rows = self.db.execute(
            "SELECT device, first, event, charges FROM totals"
            " WHERE device IN (SELECT value FROM json_each(?))",
            (json.dumps(devices),),
        )
        found: dict[str, list[tuple[int, str, int]]] = {}
        for device, *row in rows:
            found.setdefault(device, []).append((row[0], row[1], row[2]))
        for history in found.values():
            history.sort()
        return {
            device: tuple([(event, charges) for _, event, charges in history])
            for device, history in found.items()
        }

    def since(self, devices: Sequence[str], at: int) -> Mapping[str, list[tuple[int, str, int]]]:
        """Return charges from device time ``at`` on: time, event, number; in order, by device."""
        rows = self.db.execute(
            "SELECT device, coalesce(at, 0), body, count(*) FROM entries WHERE sequence >= ?"
            " AND kind = 'charge' AND device IN (SELECT value FROM json_each(?))"
            " GROUP BY 1, 2, 3 ORDER BY 2, min(sequence)",
            (self.first_at(at), json.dumps(devices)),
        )
        found: defaultdict[str, list[tuple[int, str, int]]] = defaultdict(list)
        for device, when, body, charges in rows:
            found[device].append((when, body, charges))
        return found

    def first_at(self, at: int) -> int:
        """Return the number of the first entry at ``at`` or later: times never fall."""
        low, high = 1, self.end().sequence + 1
        while low < high:
            middle = (low + high) // 2
            row = self.db.execute(
                "SELECT coalesce(at, 0) FROM entries WHERE sequence = ?", (middle,)
            ).fetchone()
            if row is None:
                raise broken(self.folder, middle)
            low, high = (low, middle) if row[0] >= at else (middle + 1, high)
        return low

    # Releases

    def digest(self, device: str, run: str, round: int) -> str | None:
        """Return the SHA-256 of a round's release, or None."""
        row = self.db.execute(
            "SELECT body FROM entries WHERE run = ? AND round = ? AND kind = 'release'"
            " AND device = ?",
            (run, round, device),
        ).fetchone()
        return row[0] if row else None

    def add_release(
        self, device: str, run: str, round: int, payload: bytes, digest: str, at: int
    ) -> None:
        """Record a release and keep its bytes instead of the device's last, in a transaction."""
        self.append([("release", device, run, round, digest)], at)
        self.db.execute(
            "INSERT OR REPLACE INTO payloads VALUES (?, ?, ?, ?)", (device, run, round, payload)
        )

    def payload(self, device: str, run: str, round: int) -> object:
        """Return the bytes kept of a round's release, or None; whatever lies there, if damaged."""
        row = self.db.execute(
            "SELECT payload FROM payloads WHERE device = ? AND run = ? AND round = ?",
            (device, run, round),
        ).fetchone()
        return row[0] if row else None


def window_seconds(window: float) -> int:
    """Return a window in the whole seconds of device time, rounded up."""
    return math.ceil(window)
