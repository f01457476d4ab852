"""The tables, their version, and the way from an older version to this one."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from reticent.core.errors import LedgerError

VERSION = 2
APPLICATION = 0x72746331  # marks the file as a ledger: "rtc1"

_PAYLOADS = (
    "CREATE TABLE payloads (device TEXT PRIMARY KEY, run TEXT NOT NULL, round INTEGER NOT NULL,"
    " payload BLOB NOT NULL)"
)
SCHEMA_1 = (
    "CREATE TABLE entries (sequence INTEGER PRIMARY KEY, kind TEXT NOT NULL, device TEXT NOT NULL,"
    " run TEXT NOT NULL, round INTEGER NOT NULL, body TEXT NOT NULL, mac BLOB NOT NULL,"
    " UNIQUE (run, round, kind, device))",
    "CREATE TABLE totals (device TEXT NOT NULL, event TEXT NOT NULL, charges INTEGER NOT NULL,"
    " PRIMARY KEY (device, event)) WITHOUT ROWID",
    _PAYLOADS,
)
SCHEMA = (
    # "at" is device time in seconds; NULL in entries of version 1, whose MAC does not cover it.
    "CREATE TABLE entries (sequence INTEGER PRIMARY KEY, kind TEXT NOT NULL, device TEXT NOT NULL,"
    " run TEXT NOT NULL, round INTEGER NOT NULL, body TEXT NOT NULL, at INTEGER, mac BLOB NOT NULL,"
    " UNIQUE (run, round, kind, device))",
    # How often each device was charged each event, and the number of the first such charge: what a
    # charge needs to know of the past.
    "CREATE TABLE totals (device TEXT NOT NULL, event TEXT NOT NULL, charges INTEGER NOT NULL,"
    " first INTEGER NOT NULL, PRIMARY KEY (device, event)) WITHOUT ROWID",
    _PAYLOADS,
    # The last observation of device time, at most one row, under a MAC of its own.
    "CREATE TABLE clock (at INTEGER NOT NULL, boot TEXT NOT NULL, uptime INTEGER NOT NULL,"
    " mac BLOB NOT NULL)",
    # One row a device however often a server asks, so that asking cannot fill the disk.
    "CREATE TABLE refusals (device TEXT PRIMARY KEY, refused INTEGER NOT NULL, run TEXT NOT NULL,"
    " round INTEGER NOT NULL, mac BLOB NOT NULL) WITHOUT ROWID",
)
_FROM_1 = (
    "ALTER TABLE entries RENAME TO old_entries",
    "ALTER TABLE totals RENAME TO old_totals",
    *(statement for statement in SCHEMA if statement != _PAYLOADS),
    "INSERT INTO entries SELECT sequence, kind, device, run, round, body, NULL, mac"
    " FROM old_entries ORDER BY sequence",
    "INSERT INTO totals SELECT t.device, t.event, t.charges, e.first FROM old_totals t JOIN"
    " (SELECT device, body, min(sequence) AS first FROM old_entries WHERE kind = 'charge'"
    " GROUP BY device, body) e ON e.device = t.device AND e.body = t.event",
    "DROP TABLE old_entries",
    "DROP TABLE old_totals",
    f"PRAGMA user_version = {VERSION}",
)


def create(db: sqlite3.Connection) -> None:
    """Write the tables into an empty database; call it inside a transaction."""
    for statement in SCHEMA:
        db.execute(statement)
    db.execute(f"PRAGMA application_id = {APPLICATION}")
    db.execute(f"PRAGMA user_version = {VERSION}")


def migrate(db: sqlite3.Connection, folder: Path) -> bool:
    """Bring an older version's tables to this one; call it inside a transaction.

    Entries keep their numbers and MACs, so heads that were anchored elsewhere stay in the chain.

    Returns:
        Whether anything was changed.

    Raises:
        LedgerError: If this is no ledger, of an unknown version, or its tables were altered.
    """
    path = folder / "ledger.db"
    if _pragma(db, "application_id") != APPLICATION:
        raise LedgerError(f"{path}: is not a ledger")
    version = _pragma(db, "user_version")
    if not 1 <= version <= VERSION:
        raise LedgerError(
            f"{path}: has schema version {version}: must be at most {VERSION}; it was written by a "
            "newer version of reticent, which alone can open it"
        )
    if version == 1:
        _require(db, SCHEMA_1, path)
        for statement in _FROM_1:
            db.execute(statement)
    _require(db, SCHEMA, path)
    return version == 1


def _pragma(db: sqlite3.Connection, name: str) -> int:
    return db.execute(f"PRAGMA {name}").fetchone()[0]


def _require(db: sqlite3.Connection, schema: tuple[str, ...], path: Path) -> None:
    statements = {row[0] for row in db.execute("SELECT sql FROM sqlite_master WHERE sql NOTNULL")}
    if statements != set(schema):
        raise LedgerError(f"{path}: is damaged: its tables were altered")
