"""The files of a ledger: database, key and tip, made in an order that survives a crash."""

from __future__ import annotations

import fcntl
import os
import secrets
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from reticent.core.durable import sync_folder
from reticent.core.errors import LedgerError

from .records import Head
from .schema import create, migrate
from .tip import create_tip

KEY_BYTES = 32
BUSY_SECONDS = 30.0
GENESIS = bytes(32)

Check = Callable[[sqlite3.Connection, bytes], Head]


def connect(path: Path) -> sqlite3.Connection:
    """Open or create the database, readable by its owner alone; every commit is synchronised."""
    # Created here, because SQLite would make it readable to everyone.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
    db.execute("PRAGMA synchronous = FULL")
    return db


def prepare(db: sqlite3.Connection, folder: Path, check: Check) -> bytes:
    """Create what is absent, migrate an older version, and return the key.

    Args:
        db: From :func:`connect`.
        folder: Where the files are.
        check: Walks a chain under a key and returns its head; called on an older version's chain
            before its migration is committed.

    Raises:
        LedgerError: If a file is missing or is not what it should be.
    """
    # SQLite does not wait for others when it changes to a write-ahead log; we do.
    with alone(folder):
        return _prepare(db, folder, check)


def _prepare(db: sqlite3.Connection, folder: Path, check: Check) -> bytes:
    if db.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        db.execute("PRAGMA journal_mode = WAL")
    # The tables are committed before the key is written: a key without tables can then only mean
    # that a history is gone, and not that a crash came between.
    with writing(db):
        if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            _require_new(folder)
            create(db)
        elif migrate(db, folder):
            key = _read_key(folder)
            head = check(db, key)
            # A tip that is there already is of an attempt that a crash stopped, or of a later
            # state than this database, which was put back; so it stays, and is compared.
            if not (folder / "ledger.tip").exists():
                create_tip(folder / "ledger.tip", key, head)
    with writing(db):
        empty = db.execute("SELECT 1 FROM entries LIMIT 1").fetchone() is None
        if empty and not (folder / "ledger.key").exists():
            _write_key(folder / "ledger.key")
        key = _read_key(folder)
        if not (folder / "ledger.tip").exists():
            _require_empty(empty, folder)
            create_tip(folder / "ledger.tip", key, Head(0, GENESIS.hex()))
    return key


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for the same out of ``folder``, until the block ends.

    Raises:
        OSError: If the folder cannot be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # given back when the descriptor is closed
        yield
    finally:
        os.close(descriptor)


@contextmanager
def writing(db: sqlite3.Connection, begin: str = "BEGIN IMMEDIATE") -> Iterator[None]:
    """Run a transaction: committed when the block ends, rolled back when it raises."""
    db.execute(begin)
    try:
        yield
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


@contextmanager
def mapped(folder: Path) -> Iterator[None]:
    """Turn what SQLite and the file system raise into :class:`LedgerError`."""
    try:
        yield
    except sqlite3.ProgrammingError as error:
        raise LedgerError(f"{folder}: the ledger is closed: {error}") from error
    except sqlite3.OperationalError as error:
        raise LedgerError(f"{folder}: the ledger cannot be used: {error}") from error
    except sqlite3.Error as error:
        raise LedgerError(f"{folder}: the ledger is damaged: {error}") from error
    except UnicodeError as error:
        raise LedgerError(f"{folder}: the ledger is damaged: it holds no text: {error}") from error
    except OSError as error:
        reason = error.strerror or error
        raise LedgerError(f"{folder}: the ledger cannot be used: {reason}") from error


def _require_new(folder: Path) -> None:
    for name in ("ledger.key", "ledger.tip"):
        if (folder / name).exists():
            raise LedgerError(
                f"{folder}: {name} is there and the history in ledger.db is gone; put the file "
                "back (a device whose spending is unknown must not spend more)"
            )


def _require_empty(empty: bool, folder: Path) -> None:
    if not empty:
        raise LedgerError(
            f"{folder / 'ledger.tip'}: is missing; without it nothing shows that the ledger beside "
            "it is complete; put back the file, or the whole folder"
        )


def _read_key(folder: Path) -> bytes:
    path = folder / "ledger.key"
    if not path.exists():
        raise LedgerError(f"{path}: is missing; the ledger beside it cannot be checked without it")
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise LedgerError(f"{path}: holds {len(key)} bytes: must hold {KEY_BYTES}")
    return key


def _write_key(path: Path) -> None:
    # Whole or absent, and durable before the first entry that depends on it.
    part = path.with_suffix(".part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(descriptor, secrets.token_bytes(KEY_BYTES))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(part, path)
    sync_folder(path.parent)
