"""A device's key, the statements it signs, and the anchors it has met."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from reticent.core.errors import ArtifactError, LedgerError, PayloadError
from reticent.core.run import write_atomic
from reticent.core.signing import private_pem, read_private_key, write_new
from reticent.privacy.anchor import Signed, check_anchor, public_hex, state
from reticent.privacy.bond import make_bond
from reticent.privacy.ledger import Head, Ledger
from reticent.privacy.ledger.files import alone, mapped
from reticent.privacy.ledger.tip import sync_folder
from reticent.privacy.release import Public


class RolledBack(LedgerError):
    """The ledger does not hold a head that a server countersigned."""


@dataclass(frozen=True)
class Identity:
    """Who a device is towards servers, and what servers have seen of its ledger.

    Guarantee: once an anchor of a pinned server was met, no round is run on a ledger that does not
    hold it, for any server and after any restart (the anchors are kept beside the ledger). What
    this cannot find is listed in :mod:`reticent.privacy.anchor`.

    Attributes:
        key: The device's own Ed25519 key.
        servers: Keys whose anchors count; those of others are ignored.
        folder: Holds ``device.key.pem`` and ``anchors.json``.
        bond: The signature of ``key`` by the node key (:mod:`reticent.privacy.bond`); empty where
            there is no node key.
    """

    key: Ed25519PrivateKey
    servers: tuple[Ed25519PublicKey, ...]
    folder: Path
    bond: bytes = b""

    @property
    def name(self) -> str:
        """The device's public key as hex."""
        return public_hex(self.key.public_key())

    def check(self, ledger: Ledger, anchor: bytes) -> None:
        """Refuse a ledger that lacks a head a server has seen; remember the head of ``anchor``.

        Args:
            ledger: The device's ledger.
            anchor: What came with the order; empty when nothing did.

        Raises:
            RolledBack: If the ledger lacks this anchor, or one met before.
            PayloadError: If the anchor is malformed or names another device.
            LedgerError: If the file of anchors is damaged or cannot be written.
        """
        met = self._met(anchor)
        with mapped(self.folder), alone(self.folder):  # each message is a process of its own
            known = _known(self.folder)
            more = {s: h for s, h in met.items() if _tells_more(ledger, h, known.get(s))}
            kept = {**known, **more}
            if kept != known:
                # Kept even when it refuses this ledger, so that no later server is served either.
                self._keep(kept)
        for server, head in kept.items():  # one met now and not kept is held, for it tells no more
            _require_held(ledger, head, server)

    def statement(self, ledger: Ledger, run: str, round: int, payload: bytes) -> Public[bytes]:
        """Return the signed head of ``ledger`` that goes with ``payload``, and the bond."""
        signed = state(self.key, ledger.head(), run, round, payload)
        return Public(signed.encode() + self.bond, "statement")

    def _met(self, anchor: bytes) -> dict[str, Head]:
        if not anchor:
            return {}
        signed = Signed.decode(anchor)
        if signed.device != self.name:
            raise PayloadError("the anchor is of another device")
        signers = (key for key in self.servers if check_anchor(signed, key))
        return {public_hex(key): signed.head for key in signers}

    def _keep(self, heads: dict[str, Head]) -> None:
        path = self.folder / "anchors.json"
        data = {server: [head.sequence, head.mac] for server, head in heads.items()}
        try:
            write_atomic(path, json.dumps(data, indent=1).encode())
        except OSError as error:
            raise LedgerError(f"{path}: cannot be written: {error.strerror}") from error


def open_identity(
    folder: Path,
    servers: Sequence[Ed25519PublicKey],
    node_key: ec.EllipticCurvePrivateKey | None = None,
) -> Identity:
    """Return the device's identity, making its key in ``folder`` the first time.

    Args:
        folder: Where it is kept.
        servers: Keys whose anchors count.
        node_key: The SuperNode's key, which vouches for the device's; None for none.

    Raises:
        LedgerError: If the key cannot be made or read, or anchors are there and the key is gone.
    """
    path = folder / "device.key.pem"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder):  # two processes that start at once must agree on one key
            if not path.exists():
                _make_key(path)
        key = read_private_key(path)
        name = public_hex(key.public_key())
        bond = b"" if node_key is None else make_bond(node_key, name)
    except (OSError, ArtifactError, ValueError) as error:
        raise LedgerError(f"{path}: cannot be used: {error}") from error
    return Identity(key, tuple(servers), folder, bond)


def require_met(ledger: Ledger, folder: Path) -> None:
    """Check ``ledger`` against every anchor that was met and is kept in ``folder``.

    Raises:
        RolledBack: If it lacks one.
        LedgerError: If the file of anchors is damaged.
    """
    for server, head in _known(folder).items():
        _require_held(ledger, head, server)


def _make_key(path: Path) -> None:
    if (path.parent / "anchors.json").exists():
        raise LedgerError(
            f"{path}: is missing beside anchors.json; put it back: under another key "
            "servers would take this for another device"
        )
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    write_new(part, private_pem(Ed25519PrivateKey.generate()), 0o600)
    part.replace(path)  # whole or absent, whenever power is lost
    sync_folder(path.parent)  # and there for good, before a server meets it


def _known(folder: Path) -> dict[str, Head]:
    path = folder / "anchors.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {str(k): Head(int(sequence), str(mac)) for k, (sequence, mac) in data.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise LedgerError(f"{path}: cannot be read: {error}") from error


def _tells_more(ledger: Ledger, head: Head, known: Head | None) -> bool:
    return known is None or head.sequence > known.sequence or not ledger.contains(head)


def _require_held(ledger: Ledger, head: Head, server: str) -> None:
    if not ledger.contains(head):
        raise RolledBack(
            f"the ledger does not hold entry {head.sequence} as the server with key {server[:16]}… "
            "countersigned it: it was put back to an older state, or copied; what it lost cannot "
            "be counted, so this device takes no further part"
        )
