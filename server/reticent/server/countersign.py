"""The server's record of devices' ledger heads, and the anchors it returns to them."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from reticent.core.errors import PayloadError, RunError
from reticent.core.signing import make_signing_key, read_private_key
from reticent.privacy.anchor import BYTES, Signed, check_statement, countersign
from reticent.privacy.bond import is_bond
from reticent.privacy.ledger import Head

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS devices (device TEXT PRIMARY KEY, sequence INTEGER NOT NULL,"
    " mac TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS nodes (node TEXT PRIMARY KEY, device TEXT NOT NULL) WITHOUT ROWID",
)


@dataclass
class Countersigner:
    """Judges devices' statements and countersigns them, over every run of one server.

    Guarantee: an update is used only if its device's ledger did not go back since the last update
    of that device that was part of a committed round: a lower head, another head of the same
    number, another device key on the same node, and two updates of one device in one round are
    refused. Where runs share the record at the same time, an update that was signed before another
    run committed a later head is refused too, and accepted when it is asked for again.
    What this cannot find is listed in :mod:`reticent.privacy.anchor`.

    Attributes:
        key: The server's own Ed25519 key, which devices pin.
        node_key: Returns the public half of a node's key, as an OpenSSH line: only a device key
            that it vouches for is taken from that node. None for a node that is not welcome, of
            which nothing is taken. Where there is no such function any device key is taken from
            any node: the server keeps no record of who is enrolled.
    """

    key: Ed25519PrivateKey
    _db: sqlite3.Connection
    _path: Path
    _open: dict[str, tuple[str, Head]] = field(default_factory=dict)  # node and head, by device
    node_key: Callable[[int], str | None] | None = None

    @staticmethod
    def open(folder: Path, key: Ed25519PrivateKey) -> Countersigner:
        """Open ``anchors.db`` in ``folder``, making both if absent.

        Raises:
            RunError: If it cannot be used.
        """
        path = folder / "anchors.db"
        with _mapped(path):
            folder.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
            db.execute("PRAGMA synchronous = FULL")
            for statement in _SCHEMA:
                db.execute(statement)
        return Countersigner(key, db, path)

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def begin(self) -> None:
        """Forget the statements of a round that was not committed."""
        self._open.clear()

    def anchor(self, node: int) -> bytes:
        """Return the anchor to send with an order to ``node``; empty before its first statement."""
        device = self._device_of(node)
        head = self._head_of(device) if device else None
        return countersign(self.key, device, head).encode() if device and head else b""

    def accept(self, node: int, statement: bytes, run: str, round: int, payload: bytes) -> None:
        """Check one statement and keep it until :meth:`commit`.

        Raises:
            PayloadError: With a reason that is counted, when the update must not be used.
        """
        try:
            signed, bond = Signed.decode(statement[:BYTES]), statement[BYTES:]
            genuine = check_statement(signed, run, round, payload)
        except (PayloadError, ValueError) as error:
            raise PayloadError("the device's ledger statement cannot be read") from error
        if not genuine:
            raise PayloadError("the device's ledger statement is not signed for this update")
        self._require_bond(node, bond, signed.device)
        device = self._device_of(node)
        if device is not None and device != signed.device:
            raise PayloadError("the node's device key changed: its ledger may have been deleted")
        if signed.device in self._open:
            raise PayloadError("two nodes speak for one device: its ledger was copied")
        self._require_forward(signed)
        self._open[signed.device] = (str(node), signed.head)

    def commit(self) -> None:
        """Make the round's statements durable: the next anchors are about them.

        Raises:
            RunError: If the database cannot be written.
        """
        with _mapped(self._path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._write(self._open)
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
        self._open.clear()

    def _write(self, accepted: Mapping[str, tuple[str, Head]]) -> None:
        for device, (node, head) in accepted.items():
            # Another run may have committed a later head meanwhile, which must not be forgotten.
            self._db.execute(
                "INSERT INTO devices VALUES (?, ?, ?) ON CONFLICT (device) DO UPDATE SET"
                " sequence = excluded.sequence, mac = excluded.mac"
                " WHERE excluded.sequence > sequence",
                (device, head.sequence, head.mac),
            )
            self._db.execute("INSERT OR REPLACE INTO nodes VALUES (?, ?)", (node, device))

    def _require_bond(self, node: int, bond: bytes, device: str) -> None:
        if self.node_key is None:
            return
        public = self.node_key(node)
        if public is None:
            raise PayloadError("the node is no enrolled device's, or its device was revoked")
        if not is_bond(bond, public, device):
            raise PayloadError("the node's key does not vouch for the device's key")

    def _require_forward(self, signed: Signed) -> None:
        last = self._head_of(signed.device)
        if last is None:
            return
        if signed.head.sequence < last.sequence:
            raise PayloadError("the device's ledger was put back to an older state")
        if signed.head.sequence == last.sequence and signed.head != last:
            raise PayloadError("the device's ledger was forked")

    def _device_of(self, node: int) -> str | None:
        with _mapped(self._path):
            row = self._db.execute("SELECT device FROM nodes WHERE node = ?", (str(node),))
            found = row.fetchone()
        return found[0] if found else None

    def _head_of(self, device: str) -> Head | None:
        with _mapped(self._path):
            row = self._db.execute("SELECT sequence, mac FROM devices WHERE device = ?", (device,))
            found = row.fetchone()
        return Head(*found) if found else None


def create_state(folder: Path) -> Path:
    """Make a server's signing key and record of ledger heads; return the public key's path.

    Raises:
        ArtifactError: If a key is already there, or cannot be written.
        RunError: If the record cannot be written.
    """
    make_signing_key(folder / "keys")
    open_state(folder).close()
    return folder / "keys" / "signing_key.pub.pem"


def open_state(folder: Path) -> Countersigner:
    """Open what :func:`create_state` made.

    Raises:
        ArtifactError: If there is no key.
        RunError: If the record cannot be used.
    """
    return Countersigner.open(folder, read_private_key(folder / "keys" / "signing_key.pem"))


@contextmanager
def _mapped(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise RunError(f"{path}: the record of ledger heads cannot be used: {error}") from error
