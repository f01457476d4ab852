"""A ledger of version 1 opens under version 2 with nothing lost, or stays as it was."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from reticent.core.errors import LedgerError
from reticent.privacy.events import PoissonGaussian
from reticent.privacy.ledger import Budget, BudgetExceeded, Head, Ledger

KEY = bytes(range(32))
EVENT = PoissonGaussian(0.2, 1.2, 1)
OTHER = PoissonGaussian(0.1, 1.0, 1)
FREE = Budget(math.inf, 1e-5)

# What version 1 wrote, kept here as it was: its tables, and its rule for MACs.
SCHEMA = """
CREATE TABLE entries (sequence INTEGER PRIMARY KEY, kind TEXT NOT NULL, device TEXT NOT NULL,\
 run TEXT NOT NULL, round INTEGER NOT NULL, body TEXT NOT NULL, mac BLOB NOT NULL,\
 UNIQUE (run, round, kind, device));
CREATE TABLE totals (device TEXT NOT NULL, event TEXT NOT NULL, charges INTEGER NOT NULL,\
 PRIMARY KEY (device, event)) WITHOUT ROWID;
CREATE TABLE payloads (device TEXT PRIMARY KEY, run TEXT NOT NULL, round INTEGER NOT NULL,\
 payload BLOB NOT NULL);
PRAGMA application_id = 1920230193;
PRAGMA user_version = 1;
"""

# Opens a ledger and kills itself before the given statement of the migration.
VICTIM = """
import os, signal, sys
from pathlib import Path
from reticent.privacy.ledger import Ledger, ledger

connect, done = ledger.connect, 0

def watched(path):
    db = connect(path)
    db.set_trace_callback(watch)
    return db

def watch(statement):
    global done
    done += statement.startswith(("ALTER", "CREATE", "INSERT", "DROP", "COMMIT"))
    if done > int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

ledger.connect = watched
Ledger.open(Path(sys.argv[1]))
"""


def entries() -> Iterator[tuple[str, str, str, int, str]]:
    for number in range(6):
        for device in ("a", "b"):
            body = (OTHER if number == 4 else EVENT).to_json()
            yield "charge", device, "run é", number, body
        yield "release", "a", "run é", number, hashlib.sha256(payload(number)).hexdigest()


def payload(number: int) -> bytes:
    return b"bytes of round %d" % number


def write_version_1(folder: Path) -> list[Head]:
    folder.mkdir()
    (folder / "ledger.key").write_bytes(KEY)
    db = sqlite3.connect(folder / "ledger.db")
    db.execute("PRAGMA journal_mode = WAL")
    db.executescript(SCHEMA)
    mac, heads = bytes(32), [Head(0, "00" * 32)]
    for sequence, entry in enumerate(entries(), 1):
        row = json.dumps([sequence, *entry], separators=(",", ":")).encode()
        mac = hmac.new(KEY, mac + row, "sha256").digest()
        db.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)", (sequence, *entry, mac))
        heads.append(Head(sequence, mac.hex()))
    totals = Counter((device, body) for kind, device, _, _, body in entries() if kind == "charge")
    db.executemany("INSERT INTO totals VALUES (?, ?, ?)", [(*k, n) for k, n in totals.items()])
    db.execute("INSERT INTO payloads VALUES ('a', 'run é', 5, ?)", (payload(5),))
    db.commit()
    db.close()
    return heads


def version(folder: Path) -> int:
    db = sqlite3.connect(folder / "ledger.db")
    try:
        return db.execute("PRAGMA user_version").fetchone()[0]
    finally:
        db.close()


def test_a_ledger_of_version_1_opens_with_its_whole_history(tmp_path: Path) -> None:
    heads = write_version_1(tmp_path / "ledger")
    with Ledger.open(tmp_path / "ledger") as ledger:
        assert ledger.verify() == ledger.head() == heads[-1]
        assert all(ledger.contains(head) for head in heads)
        assert ledger.events("b") == [OTHER, PoissonGaussian(0.2, 1.2, 5)]
        assert ledger.stored_release("a", "run é", 5) == payload(5)
        assert ledger.charge("b", "run é", 4, OTHER, FREE).repeated
        with pytest.raises(LedgerError, match="must not be answered again"):
            ledger.stored_release("a", "run é", 2)
    assert version(tmp_path / "ledger") == 2


def test_a_migrated_ledger_goes_on_and_still_checks_its_old_entries(tmp_path: Path) -> None:
    heads = write_version_1(tmp_path / "ledger")
    with Ledger.open(tmp_path / "ledger") as ledger:
        ledger.charge("a", "new", 0, EVENT, FREE)
        ledger.store_release("a", "new", 0, b"new")
    with Ledger.open(tmp_path / "ledger") as ledger:
        assert ledger.verify().sequence == heads[-1].sequence + 2
        assert all(ledger.contains(head) for head in heads)
    for column, value in [("body", "'x'"), ("at", "0"), ("device", "'z'")]:
        forged = tmp_path / column
        shutil.copytree(tmp_path / "ledger", forged)
        db = sqlite3.connect(forged / "ledger.db")
        db.execute(f"UPDATE entries SET {column} = {value} WHERE sequence = 1")
        db.commit()
        db.close()
        with pytest.raises(LedgerError, match="entry 1 "):
            Ledger.open(forged)


def test_a_new_entry_cannot_pass_as_one_of_version_1(tmp_path: Path) -> None:
    with Ledger.open(tmp_path) as ledger:
        ledger.charge("a", "run", 0, EVENT, FREE)
        ledger._store.db.execute("UPDATE entries SET at = NULL")
        with pytest.raises(LedgerError, match="entry 1 "):
            ledger.verify()


def test_old_charges_count_in_a_window_from_its_first_use_on(tmp_path: Path) -> None:
    write_version_1(tmp_path / "ledger")
    with Ledger.open(tmp_path / "ledger") as ledger:
        budget = Budget(ledger.spent("b", 1e-5) * 1.001, 1e-5, window=10)
        with pytest.raises(BudgetExceeded):
            ledger.charge("b", "new", 0, EVENT, budget)


@pytest.mark.parametrize("step", [0, 4, 8, 10])
def test_a_crash_in_a_migration_leaves_version_1(tmp_path: Path, step: int) -> None:
    heads = write_version_1(tmp_path / "ledger")
    victim = subprocess.run([sys.executable, "-c", VICTIM, tmp_path / "ledger", str(step)])
    assert victim.returncode == -signal.SIGKILL
    assert version(tmp_path / "ledger") == 1
    with Ledger.open(tmp_path / "ledger") as ledger:
        assert ledger.verify() == heads[-1]
        assert len(ledger.events("a")) == 2


def test_a_database_of_version_1_put_back_after_its_migration_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    write_version_1(folder)
    older = (folder / "ledger.db").read_bytes()
    with Ledger.open(folder) as ledger:
        ledger.charge("a", "new", 0, EVENT, FREE)
    (folder / "ledger.db").write_bytes(older)
    for _ in range(2):
        with pytest.raises(LedgerError, match="charges are lost"):
            Ledger.open(folder)


def test_a_damaged_version_1_is_refused_and_left_alone(tmp_path: Path) -> None:
    write_version_1(tmp_path / "ledger")
    db = sqlite3.connect(tmp_path / "ledger" / "ledger.db")
    db.execute("UPDATE entries SET round = 9 WHERE sequence = 4")
    db.commit()
    db.close()
    with pytest.raises(LedgerError, match="entry 4 "):
        Ledger.open(tmp_path / "ledger")
    assert version(tmp_path / "ledger") == 1


@pytest.mark.parametrize("unknown", [0, 3, 99])
def test_an_unknown_version_is_refused_by_its_number(tmp_path: Path, unknown: int) -> None:
    write_version_1(tmp_path / "ledger")
    db = sqlite3.connect(tmp_path / "ledger" / "ledger.db")
    db.execute(f"PRAGMA user_version = {unknown}")
    db.close()
    with pytest.raises(LedgerError, match=f"schema version {unknown}: must be"):
        Ledger.open(tmp_path / "ledger")
