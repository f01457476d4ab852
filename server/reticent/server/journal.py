"""The journal: a round is committed whole or not at all, and a run resumes from it."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from reticent.core.decoding import parse_json
from reticent.core.errors import RunError
from reticent.core.run import Run, write_atomic

from .optimizer import ServerState

_KEPT_CHECKPOINTS = 2
_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS rounds (
    round INTEGER PRIMARY KEY, checkpoint TEXT NOT NULL, metrics TEXT NOT NULL, anchor TEXT
);
CREATE TABLE IF NOT EXISTS participations (
    client TEXT PRIMARY KEY, rounds INTEGER NOT NULL, asked INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS open (client TEXT PRIMARY KEY);
"""
_MOST_CHARGED = """
SELECT max(
    (SELECT ifnull(max(asked), 0) FROM participations),
    (SELECT ifnull(max(ifnull(asked, 0) + 1), 0) FROM open LEFT JOIN participations USING (client))
)
"""


class Journal:
    """Committed rounds of one run.

    A round's checkpoint is written and synced first, then one SQLite transaction records its
    SHA-256, the metrics, who took part and the ledger head. What is not recorded did not happen:
    on resume, files of an unrecorded round are ignored and overwritten.
    """

    def __init__(self, run: Run, kept: int = _KEPT_CHECKPOINTS) -> None:
        """Open or create the journal of ``run``, which keeps the last ``kept`` checkpoints.

        Raises:
            RunError: If the file is damaged or cannot be written.
        """
        self._run, self._kept = run, max(kept, _KEPT_CHECKPOINTS)
        with _explained(run.journal):
            self._db = sqlite3.connect(run.journal, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def fact(self, key: str) -> str | None:
        """Return a recorded fact of the run."""
        with _explained(self._run.journal):
            row = self._db.execute("SELECT value FROM facts WHERE key=?", (key,)).fetchone()
        return row[0] if row else None

    def record(self, key: str, value: str) -> None:
        """Record a fact of the run, once and for all."""
        with _explained(self._run.journal):
            self._db.execute("INSERT INTO facts VALUES (?, ?)", (key, value))

    def revise(self, key: str, value: str) -> None:
        """Record a fact that may be known already.

        A process that died between facts which belong together, such as the files of the
        preparation, leaves some of them, and the next process makes them all.
        """
        with _explained(self._run.journal):
            self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (key, value))

    def store(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Write ``checkpoints/name.safetensors`` and record its SHA-256."""
        digest = self._write(name, arrays)
        self.revise(f"file:{name}", digest)

    def restore(self, name: str) -> dict[str, np.ndarray] | None:
        """Return what :meth:`store` wrote, or None if it was never recorded.

        Raises:
            RunError: If the file is missing or altered.
        """
        digest = self.fact(f"file:{name}")
        return None if digest is None else self._read(name, digest)

    def open(self, clients: Collection[str]) -> frozenset[str]:
        """Record who is about to be asked in the open round, and return all who were so far.

        Durable on return, so before anyone is asked: a device charges a round when it trains. A
        round that fails or is interrupted is run again under its number, which costs a device that
        charged it nothing more; but others may be asked in its place, and then both have charged.

        Raises:
            RunError: If the disk is full or cannot be written.
        """
        with _explained(self._run.journal), self._transaction():
            rows = [(client,) for client in clients]
            self._db.executemany("INSERT OR IGNORE INTO open VALUES (?)", rows)
            return self._opened()

    def commit(
        self,
        state: ServerState,
        metrics: dict[str, Any],
        clients: Collection[str],
        anchor: str | None,
        asked: Collection[str] | None = None,
    ) -> None:
        """Commit a round: all of it is durable when this returns.

        Args:
            state: The state after the round.
            metrics: Its figures.
            clients: Whose updates were used.
            anchor: The ledger head to record, if there is a ledger here.
            asked: Who was asked; by default ``clients``. Each of them may have charged a round,
                and sent an update that came too late, or that comes in a later round. Who was
                recorded by :meth:`open` is added.

        Raises:
            RunError: If the disk is full or cannot be written; the round is then not committed.
        """
        digest = self._write(f"round-{state.round:06d}", _arrays(state))
        used = frozenset(clients)
        with _explained(self._run.journal), self._transaction():
            sent = self._opened().union(used if asked is None else asked)
            self._db.execute(
                "INSERT INTO rounds VALUES (?, ?, ?, ?)",
                (state.round, digest, json.dumps(metrics), anchor),
            )
            self._db.executemany(
                "INSERT INTO participations VALUES (?1, ?2, ?3) ON CONFLICT (client)"
                " DO UPDATE SET rounds = rounds + ?2, asked = asked + ?3",
                [(c, int(c in used), int(c in sent)) for c in sorted(used | sent)],
            )
            self._db.execute("DELETE FROM open")
        self._write_metrics(metrics, state.round)
        stale = self._path(f"round-{state.round - self._kept:06d}")
        stale.unlink(missing_ok=True)

    def latest(self) -> ServerState | None:
        """Return the state after the last committed round, or None before the first.

        Raises:
            RunError: If its checkpoint is missing, truncated or altered.
        """
        with _explained(self._run.journal):
            row = self._db.execute(
                "SELECT round, checkpoint FROM rounds ORDER BY round DESC LIMIT 1"
            ).fetchone()
        if row is None:
            return None
        name = f"round-{row[0]:06d}"
        try:
            return _state(row[0], self._read(name, row[1]))
        except (TypeError, ValueError, IndexError) as error:
            raise RunError(f"{self._path(name)}: holds no state of a round: {error}") from error

    def after(self, number: int) -> ServerState:
        """Return the state after a committed round, one of the last that are kept.

        Raises:
            RunError: If it was not committed, or its checkpoint is missing or altered.
        """
        with _explained(self._run.journal):
            row = self._db.execute(
                "SELECT checkpoint FROM rounds WHERE round=?", (number,)
            ).fetchone()
        if row is None:
            raise RunError(f"{self._run.journal}: round {number} was not committed")
        return _state(number, self._read(f"round-{number:06d}", row[0]))

    def anchor(self) -> str | None:
        """Return the ledger head that the last committed round recorded."""
        with _explained(self._run.journal):
            row = self._db.execute(
                "SELECT anchor FROM rounds ORDER BY round DESC LIMIT 1"
            ).fetchone()
        return row[0] if row else None

    def metrics(self) -> list[dict[str, Any]]:
        """Return the metrics of every committed round, in order.

        Raises:
            RunError: If they are damaged.
        """
        with _explained(self._run.journal):
            rows = self._db.execute("SELECT metrics FROM rounds ORDER BY round").fetchall()
        try:
            return [parse_json(r[0]) for r in rows]
        except (ValueError, TypeError) as error:
            raise RunError(f"{self._run.journal}: damaged: {error}") from error

    def participations(self) -> dict[str, int]:
        """Return how many applied rounds each client took part in."""
        with _explained(self._run.journal):
            return dict(self._db.execute("SELECT client, rounds FROM participations"))

    def asked(self) -> dict[str, int]:
        """Return in how many applied rounds each client was asked, and may have charged."""
        with _explained(self._run.journal):
            return dict(self._db.execute("SELECT client, asked FROM participations"))

    def charged(self) -> dict[str, int]:
        """Return how many rounds each client may have charged, the open one among them."""
        found = self.asked()
        with _explained(self._run.journal):
            return found | {client: found.get(client, 0) + 1 for client in self._opened()}

    def most_charged(self) -> int:
        """Return the most rounds that a client may have charged: the largest of :meth:`charged`."""
        with _explained(self._run.journal):
            return int(self._db.execute(_MOST_CHARGED).fetchone()[0])

    def _opened(self) -> frozenset[str]:
        return frozenset(row[0] for row in self._db.execute("SELECT client FROM open"))

    def rewrite_metrics(self) -> None:
        """Make ``metrics.jsonl`` agree with the journal, after a crash between the two.

        Raises:
            RunError: If it holds rounds and the journal none: they were committed, and whoever took
                part in them has charged them.
        """
        known = self.metrics()
        if not known and self._run.read_metrics():
            raise RunError(
                f"{self._run.journal}: holds no round, and {self._run.metrics.name} does: the "
                "journal was lost or replaced; restore it from a copy, or start a new run"
            )
        lines = "".join(json.dumps(m) + "\n" for m in known)
        write_atomic(self._run.metrics, lines.encode())

    def _write_metrics(self, metrics: dict[str, Any], number: int) -> None:
        mode = "a" if number > 1 else "w"
        with _explained(self._run.metrics), self._run.metrics.open(mode) as handle:
            handle.write(json.dumps(metrics) + "\n")

    def _path(self, name: str) -> Path:
        return self._run.checkpoints / f"{name}.safetensors"

    def _write(self, name: str, arrays: dict[str, np.ndarray]) -> str:
        data = save(arrays)
        with _explained(self._path(name)):
            write_atomic(self._path(name), data)
        return hashlib.sha256(data).hexdigest()

    def _read(self, name: str, digest: str) -> dict[str, np.ndarray]:
        path = self._path(name)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise RunError(f"{path}: cannot be read: {error.strerror}") from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise RunError(f"{path}: truncated or altered (its SHA-256 is not the journal's)")
        try:
            return load(data)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}: damaged: {error}") from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def _arrays(state: ServerState) -> dict[str, np.ndarray]:
    """Return what a checkpoint holds; the bound and the held model only where there is one."""
    arrays = {k: v for k, v in vars(state).items() if k not in ("round", "clip") and v is not None}
    if state.clip is not None:
        arrays["clip"] = np.array([state.clip], dtype=np.float64)
    return arrays


def _state(number: int, arrays: dict[str, np.ndarray]) -> ServerState:
    clip = arrays.pop("clip", None)
    return ServerState(number, **arrays, clip=None if clip is None else float(clip[0]))


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.DatabaseError, OSError) as error:
        raise RunError(
            f"{path}: {error}; rounds committed before are kept, continue with --resume once "
            "there is room and the file is whole"
        ) from error
