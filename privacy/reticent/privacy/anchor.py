"""Countersignatures: how a device's rolled-back or copied ledger is found out.

A ledger cannot tell that it was put back to an older state: its own chain is whole. So a head is
kept elsewhere. With every update the device sends a *statement*: its key, the number of its last
entry and that entry's MAC, signed for this update. The server keeps the latest and returns it,
signed with its own key, as an *anchor* with its next order.

====================================================  =========================================
what happened to the device's ledger                  who refuses
====================================================  =========================================
put back to a state before the last anchor            the device, when it meets the anchor; and
                                                      the server, if it sees the lower number
copied, and both copies go on (a fork)                the copy that meets the other's anchor; and
                                                      the server, if the numbers are equal and the
                                                      heads are not
deleted, with the device's key (a fresh start)        the server: the node's device key changed
====================================================  =========================================

Not detected: a ledger put back further than to the last anchor of a server that is never met
again; a whole device put back before its first statement; a device that starts afresh as a new
node, with a new node key; a fork whose copies never meet the same server; server and device put
back together; a device that was altered to lie. The ledger protects a device's owner against
accidents and against servers, not against the owner. A server whose key is pinned can stop a
device for good, with an anchor that the ledger never held; it cannot make it spend more.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from reticent.core.errors import PayloadError

from .ledger import Head

_FORMAT = struct.Struct(">B32sQ32s64s")  # version, device, sequence, MAC, signature
_VERSION = 1
_MOST_ENTRIES = 2**63 - 1  # what a ledger, and a server's record of it, can number
BYTES = _FORMAT.size


@dataclass(frozen=True)
class Signed:
    """A signed ledger head: a device's statement, or a server's anchor.

    Attributes:
        device: The device's Ed25519 public key, 32 bytes as hex.
        head: Number and MAC of the last entry.
        signature: 64 bytes.
    """

    device: str
    head: Head
    signature: bytes

    def encode(self) -> bytes:
        """Return the :data:`BYTES` bytes that travel."""
        device, mac = bytes.fromhex(self.device), bytes.fromhex(self.head.mac)
        return _FORMAT.pack(_VERSION, device, self.head.sequence, mac, self.signature)

    @staticmethod
    def decode(data: bytes) -> Signed:
        """Parse what :meth:`encode` wrote; the signature is not checked here.

        Raises:
            PayloadError: If the length or the version differs, or no ledger has such an entry.
        """
        if len(data) != BYTES:
            raise PayloadError(f"a signed ledger head has {len(data)} bytes: must have {BYTES}")
        version, device, sequence, mac, signature = _FORMAT.unpack(data)
        if version != _VERSION:
            raise PayloadError(f"signed ledger head of version {version}: must be {_VERSION}")
        if sequence > _MOST_ENTRIES:
            raise PayloadError(f"ledger entry {sequence}: must be at most {_MOST_ENTRIES}")
        return Signed(device.hex(), Head(sequence, mac.hex()), signature)


def public_hex(key: Ed25519PublicKey) -> str:
    """Return a public key as hex."""
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def state(key: Ed25519PrivateKey, head: Head, run: str, round: int, payload: bytes) -> Signed:
    """Return the device's statement that ``payload`` was released at ``head``."""
    device = public_hex(key.public_key())
    return Signed(device, head, key.sign(_statement(device, head, run, round, payload)))


def check_statement(signed: Signed, run: str, round: int, payload: bytes) -> bool:
    """Tell whether the device that ``signed`` names made it for this payload of this round."""
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signed.device))
    text = _statement(signed.device, signed.head, run, round, payload)
    return _verified(key, signed.signature, text)


def countersign(key: Ed25519PrivateKey, device: str, head: Head) -> Signed:
    """Return the server's anchor: it has seen ``device`` at ``head``."""
    return Signed(device, head, key.sign(_anchor(device, head)))


def check_anchor(signed: Signed, server: Ed25519PublicKey) -> bool:
    """Tell whether ``server`` made the anchor."""
    return _verified(server, signed.signature, _anchor(signed.device, signed.head))


def _statement(device: str, head: Head, run: str, round: int, payload: bytes) -> bytes:
    digest = hashlib.sha256(payload).hexdigest()
    return _text("statement", device, head.sequence, head.mac, run, round, digest)


def _anchor(device: str, head: Head) -> bytes:
    return _text("anchor", device, head.sequence, head.mac)


def _text(kind: str, *fields: str | int) -> bytes:
    # The kind separates the domains: no statement can be read as an anchor.
    return json.dumps(["reticent", kind, _VERSION, *fields], separators=(",", ":")).encode()


def _verified(key: Ed25519PublicKey, signature: bytes, text: bytes) -> bool:
    try:
        key.verify(signature, text)
    except InvalidSignature:
        return False
    return True
