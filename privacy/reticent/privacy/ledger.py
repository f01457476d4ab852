"""The ledger: a durable, append-only record of what every device has spent, and its hard stop.

Charge the whole planned round, fsync, train, store the release, fsync, send. A crash at any point
keeps the charge, so the record never counts less than what left the device.

Every entry carries ``mac_i = HMAC-SHA256(key, mac_{i-1} || entry_i)``. Whoever damages, alters,
reorders or removes an entry without the key is found by :meth:`Ledger.verify`. Cutting entries off
the end, or putting back an older copy of the folder, is found only by comparing with a head that
was kept elsewhere: that is what :meth:`Ledger.contains` is for.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
import secrets
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from reticent.core.errors import LedgerError, PrivacyError

from .accounting import epsilon, require_delta, require_one_unit
from .calibrate import max_steps
from .events import Event, PoissonGaussian, event_from_json, merge

VERSION = 1
APPLICATION = 0x72746331  # marks the file as a ledger: "rtc1"
GENESIS = bytes(32)
KEY_BYTES = 32
BUSY_SECONDS = 30.0
SCHEMA = (
    "CREATE TABLE entries (sequence INTEGER PRIMARY KEY, kind TEXT NOT NULL, device TEXT NOT NULL,"
    " run TEXT NOT NULL, round INTEGER NOT NULL, body TEXT NOT NULL, mac BLOB NOT NULL,"
    " UNIQUE (run, round, kind, device))",
    # How often each device was charged each event: what a charge needs to know of the past.
    "CREATE TABLE totals (device TEXT NOT NULL, event TEXT NOT NULL, charges INTEGER NOT NULL,"
    " PRIMARY KEY (device, event)) WITHOUT ROWID",
    "CREATE TABLE payloads (device TEXT PRIMARY KEY, run TEXT NOT NULL, round INTEGER NOT NULL,"
    " payload BLOB NOT NULL)",
)


@dataclass(frozen=True)
class Budget:
    """The hard stop of one device: ``epsilon`` (may be infinite) at ``delta``."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        """Check both numbers."""
        require_delta(self.delta)
        if not self.epsilon > 0:
            raise PrivacyError(f"budget.epsilon={self.epsilon!r}: must be > 0 (or infinite)")


@dataclass(frozen=True)
class Charge:
    """One planned round, recorded. ``repeated`` tells that it had been recorded before."""

    device: str
    run: str
    round: int
    event: Event
    sequence: int
    repeated: bool = False


@dataclass(frozen=True)
class Head:
    """The end of the chain: the last entry's number (0 when empty) and its MAC as hex."""

    sequence: int
    mac: str


@dataclass(frozen=True)
class Spent:
    """Devices with the same history: their names, what happened to each, and its epsilon."""

    devices: tuple[str, ...]
    events: tuple[Event, ...]
    epsilon: float


class BudgetExceeded(PrivacyError):
    """A charge would exceed a device's budget; nothing was recorded for it."""

    def __init__(self, device: str, spent: float, budget: Budget, event: Event) -> None:
        """Describe the refusal; ``spent`` is the device's epsilon before the refused charge."""
        super().__init__(
            f"device {device}: a round of {event.describe()} would exceed its "
            f"budget of epsilon={budget.epsilon:g} at delta={budget.delta:g}, of which "
            f"{spent:.4g} is spent; the device takes no further part under this budget"
        )
        self.device, self.spent, self.budget, self.event = device, spent, budget, event

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel between processes: exceptions are otherwise rebuilt from their message."""
        return type(self), (self.device, self.spent, self.budget, self.event)


_Entry = tuple[str, str, str, int, str]  # kind, device, run, round, body


class Ledger:
    """A ledger in one folder: ``ledger.db`` (SQLite, WAL, synchronous=FULL) and ``ledger.key``.

    Get one from :meth:`open`. Several processes may have the same ledger open; within a process,
    use one instance per thread. Every method raises :class:`LedgerError` when the database is
    damaged, read-only, full, or locked for more than 30 seconds.
    """

    def __init__(self, folder: Path, database: sqlite3.Connection, key: bytes) -> None:
        """Use :meth:`open` instead."""
        self._folder, self._db, self._key = folder, database, key

    @staticmethod
    def open(folder: Path, verify: bool = True) -> Ledger:
        """Open the ledger in ``folder``, creating both files if neither exists.

        Args:
            folder: Created if absent.
            verify: Also walk the whole chain, in time linear in its length.

        Raises:
            LedgerError: If one of the two files is missing, if the ledger is damaged, or if it
                was written by a version that this one does not know.
        """
        with _mapped(folder):
            folder.mkdir(parents=True, exist_ok=True)
            db = _connect(folder / "ledger.db")
            try:
                ledger = Ledger(folder, db, _prepare(db, folder))
                if verify:
                    ledger.verify()
            except BaseException:
                db.close()
                raise
            return ledger

    def close(self) -> None:
        """Close the database; calling it again does nothing."""
        self._db.close()

    def __enter__(self) -> Ledger:
        """Return the ledger itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the ledger."""
        self.close()

    def charge(self, device: str, run: str, round: int, event: Event, budget: Budget) -> Charge:
        """Record the whole planned round before any of it happens; durable on return.

        A charge is never refunded: a round that fails afterwards stays charged.

        Charging the same ``(device, run, round)`` with the same event again returns the earlier
        charge, marked ``repeated``, without a second one. This is sound because one charge covers
        one release. If a release was stored, :meth:`stored_release` gives its bytes and sending
        those again tells nothing new. If none was stored, nothing left the device, since a release
        is stored before it is sent; so the first training had no observable outcome, and training
        again is the only one. :meth:`store_release` holds the caller to this.

        The budget: while every event has the same parameters, the exact (``pld``) epsilon of all
        their steps must fit, so a calibrated schedule fits to its last step. From the first
        differing event on, the sum of Renyi divergences must fit, which stays valid when a server
        chooses parameters after seeing releases (Feldman and Zrnic 2021; Lecuyer 2021). A server
        that chooses adaptively *between* the two regimes gets at most (epsilon, 2 delta); one that
        follows a fixed plan gets (epsilon, delta).

        Raises:
            BudgetExceeded: If the charge does not fit; nothing is recorded.
            LedgerError: If this round was charged with another event.
        """
        result = self.charge_many([device], run, round, event, budget)[0]
        if isinstance(result, BudgetExceeded):
            raise result
        return result

    def charge_many(
        self, devices: Sequence[str], run: str, round: int, event: Event, budget: Budget
    ) -> list[Charge | BudgetExceeded]:
        """Charge a cohort as :meth:`charge` does, in one transaction with one fsync.

        Returns:
            For each device, in order, its charge or (not raised) the reason for its refusal.

        Raises:
            LedgerError: As :meth:`charge`, or if a device is named twice; nothing is recorded.
        """
        for device in devices:
            _require_key(device, run, round)
        if len(set(devices)) != len(devices):
            raise LedgerError(f"{self._folder}: a device is named twice in one cohort")
        body, afford = event.to_json(), _Afford(event, budget)
        results: list[Charge | BudgetExceeded] = []
        new: list[_Entry] = []
        with self._transaction():
            known = self._charges(devices, run, round)
            histories = self._histories(devices)
            end = self._end()[0]
            for device in devices:
                if device in known:
                    results.append(self._repeat(known[device], device, run, round, event))
                elif (spent := afford.refusal(histories.get(device, ()))) is not None:
                    results.append(BudgetExceeded(device, spent, budget, event))
                else:
                    new.append(("charge", device, run, round, body))
                    results.append(Charge(device, run, round, event, end + len(new)))
            self._append(new)
            self._db.executemany(
                "INSERT INTO totals VALUES (?, ?, 1)"
                " ON CONFLICT (device, event) DO UPDATE SET charges = charges + 1",
                [(device, body) for _, device, *_ in new],
            )
        return results

    def store_release(self, device: str, run: str, round: int, payload: bytes) -> None:
        """Store what is about to be sent; durable on return, so only then may it be sent.

        Storing the same bytes again does nothing. Only a device's latest payload is kept, but the
        SHA-256 of every release is.

        Raises:
            LedgerError: If the round was not charged, or had another release: that would be two
                releases under one charge.
        """
        _require_key(device, run, round)
        digest = hashlib.sha256(payload).hexdigest()
        with self._transaction():
            if device not in self._charges([device], run, round):
                raise LedgerError(f"{self._name(device, run, round)}: must be charged before it")
            earlier = self._digest(device, run, round)
            if earlier == digest:
                return
            if earlier is not None:
                raise LedgerError(
                    f"{self._name(device, run, round)}: already released other bytes; one charge "
                    "covers one release"
                )
            self._append([("release", device, run, round, digest)])
            self._db.execute(
                "INSERT OR REPLACE INTO payloads VALUES (?, ?, ?, ?)", (device, run, round, payload)
            )

    def stored_release(self, device: str, run: str, round: int) -> bytes | None:
        """Return the stored bytes of a release, or None if there was none.

        Raises:
            LedgerError: If there was one whose bytes gave way to a later round's; the round must
                not be answered again.
        """
        _require_key(device, run, round)
        with _mapped(self._folder):
            digest = self._digest(device, run, round)
            row = self._db.execute(
                "SELECT payload FROM payloads WHERE device = ? AND run = ? AND round = ?",
                (device, run, round),
            ).fetchone()
        if digest is None:
            return None
        if row is None:
            raise LedgerError(
                f"{self._name(device, run, round)}: released before, and its bytes gave way to a "
                "later release; this round must not be answered again"
            )
        if not isinstance(row[0], bytes) or hashlib.sha256(row[0]).hexdigest() != digest:
            raise LedgerError(f"{self._name(device, run, round)}: its stored bytes are damaged")
        return row[0]

    def events(self, device: str) -> list[Event]:
        """Return everything charged to ``device``, merged; empty for an unknown device."""
        with _mapped(self._folder):
            return list(_merged(self._histories([device]).get(device, ())))

    def spent(self, device: str, delta: float) -> float:
        """Return the ``pld`` epsilon of everything charged to ``device``."""
        return epsilon(self.events(device), delta)

    def devices(self) -> list[str]:
        """Return the names of all devices that were ever charged, sorted."""
        with _mapped(self._folder):
            return [
                row[0] for row in self._db.execute("SELECT DISTINCT device FROM totals ORDER BY 1")
            ]

    def summary(self, delta: float) -> list[Spent]:
        """Return what devices spent, one row for each distinct history, the largest first."""
        with _mapped(self._folder):
            groups: defaultdict[tuple[tuple[str, int], ...], list[str]] = defaultdict(list)
            for device, history in self._histories(None).items():
                groups[history].append(device)
        rows = [(tuple(names), _merged(history)) for history, names in groups.items()]
        spent = [Spent(names, events, epsilon(events, delta)) for names, events in rows]
        return sorted(spent, key=lambda row: (-row.epsilon, row.devices))

    def head(self) -> Head:
        """Return the end of the chain, to be kept somewhere else as an anchor."""
        with _mapped(self._folder):
            sequence, mac = self._end()
            return Head(sequence, mac.hex())

    def contains(self, head: Head) -> bool:
        """Tell whether ``head`` is in the chain: False after a rollback, a cut or a fork."""
        if head.sequence == 0:
            return head.mac == GENESIS.hex()
        with _mapped(self._folder):
            row = self._db.execute(
                "SELECT mac FROM entries WHERE sequence = ?", (head.sequence,)
            ).fetchone()
        return row is not None and isinstance(row[0], bytes) and row[0].hex() == head.mac

    def verify(self) -> Head:
        """Check the database, walk the chain and recount what follows from it.

        Raises:
            LedgerError: Naming the first entry that is missing or altered.
        """
        with _mapped(self._folder), self._snapshot():
            faults = [row[0] for row in self._db.execute("PRAGMA integrity_check(1)")]
            if faults != ["ok"]:
                raise LedgerError(f"{self._folder}: the ledger is damaged: {faults[0]}")
            head, totals, releases = self._walk()
            recorded = {(d, e): n for d, h in self._histories(None).items() for e, n in h}
            if recorded != totals:
                raise LedgerError(f"{self._folder}: the totals differ from the chain of charges")
            self._verify_payloads(releases)
        return head

    def _walk(self) -> tuple[Head, Counter[tuple[str, str]], dict[tuple[str, str, int], str]]:
        sequence, mac = 0, GENESIS
        totals: Counter[tuple[str, str]] = Counter()
        releases: dict[tuple[str, str, int], str] = {}
        rows = self._db.execute(
            "SELECT sequence, mac, kind, device, run, round, body FROM entries ORDER BY sequence"
        )
        for number, stored, *entry in rows:
            sequence += 1
            mac = self._mac(mac, sequence, (*entry,))
            if number != sequence or stored != mac:
                raise LedgerError(f"{self._folder}: entry {sequence} is missing or was altered")
            kind, device, run, round, body = entry
            if kind == "charge":
                totals[device, body] += 1
            else:
                releases[device, run, round] = body
        return Head(sequence, mac.hex()), totals, releases

    def _verify_payloads(self, releases: dict[tuple[str, str, int], str]) -> None:
        latest = {key[0]: (key, digest) for key, digest in releases.items()}
        found: dict[str, Any] = {}
        for device, run, round, payload in self._db.execute("SELECT * FROM payloads"):
            data = payload if isinstance(payload, bytes) else b""
            found[device] = ((device, run, round), hashlib.sha256(data).hexdigest())
        if found != latest:
            raise LedgerError(f"{self._folder}: a stored release differs from its entry")

    def _mac(self, previous: bytes, sequence: int, entry: tuple[Any, ...]) -> bytes:
        # json.dumps tells 1 from "1" and quotes every separator; a value of a type that never was
        # written (a damaged record) is shown by repr and so cannot match.
        row = json.dumps([sequence, *entry], separators=(",", ":"), default=repr)
        return hmac.digest(self._key, previous + row.encode("utf-8", "surrogatepass"), "sha256")

    def _append(self, entries: Sequence[_Entry]) -> None:
        sequence, mac = self._end()
        rows: list[tuple[Any, ...]] = []
        for number, entry in enumerate(entries, sequence + 1):
            mac = self._mac(mac, number, entry)
            rows.append((number, *entry, mac))
        self._db.executemany("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def _end(self) -> tuple[int, bytes]:
        row = self._db.execute(
            "SELECT sequence, mac FROM entries ORDER BY sequence DESC LIMIT 1"
        ).fetchone()
        if row is None:
            return 0, GENESIS
        if not isinstance(row[1], bytes):
            raise LedgerError(f"{self._folder}: entry {row[0]} is missing or was altered")
        return row[0], row[1]

    def _charges(self, devices: Sequence[str], run: str, round: int) -> dict[str, tuple[int, str]]:
        rows = self._db.execute(
            "SELECT device, sequence, body FROM entries WHERE run = ? AND round = ? AND"
            " kind = 'charge' AND device IN (SELECT value FROM json_each(?))",
            (run, round, json.dumps(devices)),
        )
        return {device: (sequence, body) for device, sequence, body in rows}

    def _histories(self, devices: Sequence[str] | None) -> dict[str, tuple[tuple[str, int], ...]]:
        """Return, for each device, its distinct events as JSON with their counts, sorted."""
        chosen = "" if devices is None else " WHERE device IN (SELECT value FROM json_each(?))"
        rows = self._db.execute(
            f"SELECT device, event, charges FROM totals{chosen} ORDER BY device, event",
            () if devices is None else (json.dumps(devices),),
        )
        histories: defaultdict[str, tuple[tuple[str, int], ...]] = defaultdict(tuple)
        for device, event, charges in rows:
            histories[device] += ((event, charges),)
        return dict(histories)

    def _digest(self, device: str, run: str, round: int) -> str | None:
        row = self._db.execute(
            "SELECT body FROM entries WHERE run = ? AND round = ? AND kind = 'release'"
            " AND device = ?",
            (run, round, device),
        ).fetchone()
        return row[0] if row else None

    def _repeat(
        self, known: tuple[int, str], device: str, run: str, round: int, event: Event
    ) -> Charge:
        sequence, body = known
        if body != event.to_json():
            raise LedgerError(
                f"{self._name(device, run, round)}: was charged as {body} and cannot be charged "
                f"again as {event.to_json()}"
            )
        return Charge(device, run, round, event, sequence, repeated=True)

    def _name(self, device: str, run: str, round: int) -> str:
        return f"{self._folder}: device {device}, run {run}, round {round}"

    @contextmanager
    def _transaction(self, begin: str = "BEGIN IMMEDIATE") -> Iterator[None]:
        with _mapped(self._folder):
            self._db.execute(begin)
            try:
                yield
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    @contextmanager
    def _snapshot(self) -> Iterator[None]:
        # One read transaction, so that a walk during another process's charge sees one state.
        with self._transaction("BEGIN"):
            yield


class _Afford:
    """Whether one event still fits a budget after a history; each history is priced once."""

    def __init__(self, event: Event, budget: Budget) -> None:
        self._event, self._budget = event, budget
        self._known: dict[tuple[tuple[str, int], ...], float | None] = {}

    def refusal(self, history: tuple[tuple[str, int], ...]) -> float | None:
        """Return None if the event fits, else the epsilon already spent."""
        if history not in self._known:
            before = _merged(history)
            fits = self._fits(merge([*before, self._event]))
            self._known[history] = None if fits else epsilon(before, self._budget.delta)
        return self._known[history]

    def _fits(self, events: list[Event]) -> bool:
        limit, delta = self._budget.epsilon, self._budget.delta
        charges = [e for e in events if isinstance(e, PoissonGaussian)]
        require_one_unit(charges)
        if math.isinf(limit):
            return True
        if len(charges) < len(events):
            return False
        if len(charges) > 1:
            return epsilon(charges, delta, "rdp") <= limit
        rate, noise = charges[0].sampling_rate, charges[0].noise_multiplier
        # The second test settles what the search's last digits might not; it is rarely reached.
        if charges[0].steps <= max_steps(limit, delta, rate, noise):
            return True
        return epsilon(charges, delta) <= limit


@lru_cache(maxsize=4096)
def _parsed(text: str) -> Event:
    return event_from_json(text)


def _merged(history: tuple[tuple[str, int], ...]) -> tuple[Event, ...]:
    parsed = ((_parsed(text), charges) for text, charges in history)
    return tuple(merge(event.times(charges) for event, charges in parsed))


def _require_key(device: str, run: str, round: int) -> None:
    for name, value in (("device", device), ("run", run)):
        if not isinstance(value, str) or not value or not value.isprintable():
            raise LedgerError(f"{name}={value!r}: must be a non-empty printable string")
    if isinstance(round, bool) or not isinstance(round, int) or not 0 <= round < 2**63:
        raise LedgerError(f"round={round!r}: must be a whole number >= 0")


def _connect(path: Path) -> sqlite3.Connection:
    # Created here, because SQLite would make it readable to everyone.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
    db.execute("PRAGMA synchronous = FULL")
    return db


def _prepare(db: sqlite3.Connection, folder: Path) -> bytes:
    """Create what is absent under the write lock, check the version, and return the key."""
    path = folder / "ledger.key"
    if db.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        db.execute("PRAGMA journal_mode = WAL")
    db.execute("BEGIN IMMEDIATE")
    try:
        if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            _create(db, path)
        _require_schema(db, folder)
        empty = db.execute("SELECT 1 FROM entries LIMIT 1").fetchone() is None
        if empty and not path.exists():
            _write_key(path)
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")
    if not path.exists():
        raise LedgerError(f"{path}: is missing; the ledger beside it cannot be checked without it")
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise LedgerError(f"{path}: holds {len(key)} bytes: must hold {KEY_BYTES}")
    return key


def _create(db: sqlite3.Connection, key: Path) -> None:
    # The key is written after the tables, so a key without tables means that a history is gone.
    if key.exists():
        raise LedgerError(
            f"{key.parent}: ledger.key is there and the history in ledger.db is gone; put the file "
            "back (a device whose spending is unknown must not spend more)"
        )
    for statement in SCHEMA:
        db.execute(statement)
    db.execute(f"PRAGMA application_id = {APPLICATION}")
    db.execute(f"PRAGMA user_version = {VERSION}")


def _require_schema(db: sqlite3.Connection, folder: Path) -> None:
    application = db.execute("PRAGMA application_id").fetchone()[0]
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if application != APPLICATION:
        raise LedgerError(f"{folder / 'ledger.db'}: is not a ledger")
    if version != VERSION:
        raise LedgerError(
            f"{folder / 'ledger.db'}: has schema version {version}: must be {VERSION}; it was "
            "written by another version of reticent"
        )
    statements = {row[0] for row in db.execute("SELECT sql FROM sqlite_master WHERE sql NOTNULL")}
    if statements != set(SCHEMA):
        raise LedgerError(f"{folder / 'ledger.db'}: is damaged: its tables were altered")


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
    parent = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


@contextmanager
def _mapped(folder: Path) -> Iterator[None]:
    """Turn what SQLite and the file system raise into :class:`LedgerError`."""
    try:
        yield
    except sqlite3.ProgrammingError as error:
        raise LedgerError(f"{folder}: the ledger is closed: {error}") from error
    except sqlite3.OperationalError as error:
        raise LedgerError(f"{folder}: the ledger cannot be used: {error}") from error
    except sqlite3.Error as error:
        raise LedgerError(f"{folder}: the ledger is damaged: {error}") from error
    except OSError as error:
        reason = error.strerror or error
        raise LedgerError(f"{folder}: the ledger cannot be used: {reason}") from error
