"""Telling the SuperLink that a SuperNode is gone, when it could not say so itself.

A SuperNode that was killed counts as connected until it has missed its heartbeats, for a minute:
until then the SuperLink turns its successor away, and a ServerApp waits for its reply. So the agent
speaks for it, with the node's own key: one request of Flower's Fleet API (1.41), protobuf over
HTTPS, written out here because Flower's own client is not public. If it fails nothing is lost but
that minute.
"""

from __future__ import annotations

import http.client
import re
import socket
import ssl
import time
from base64 import b64encode
from datetime import UTC, datetime

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from reticent.core.errors import ProvisionError

from .folder import Device, read_node_key

SECONDS = 5.0
_PATH = "/v1/fleet/deactivate-node"
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5]\d\d)\b")
_LONGEST_LINE = 4096


def leave(device: Device, node: int) -> bool:
    """Say that ``node``, which has the device's key, left; return whether the SuperLink answered.

    Its answer does not matter: it refuses this of a node that has said so itself. Blocks for a few
    times :data:`SECONDS` at most, however slowly it answers: for each address of its name, the
    handshake, the request and the answer.
    """
    host, _, port = device.address.rpartition(":")
    try:
        trusting = ssl.create_default_context(cafile=str(device.authority))
        link = http.client.HTTPSConnection(
            host.strip("[]"), int(port), timeout=SECONDS, context=trusting
        )
        try:
            link.request("POST", _PATH, _message(node), _headers(device))
            return _status(link.sock) < http.client.INTERNAL_SERVER_ERROR
        finally:
            link.close()
    except (OSError, ValueError, http.client.HTTPException, ProvisionError):
        return False


def _status(link: socket.socket) -> int:
    """Return the status with which an answer begins; the rest of it is not waited for.

    A timeout is of one read, and Python's own client makes as many as the server likes.

    Raises:
        OSError: If it is not there within :data:`SECONDS`.
        ValueError: If the answer is none of HTTP.
    """
    deadline, line = time.monotonic() + SECONDS, b""
    while b"\n" not in line:
        link.settimeout(max(0.0, deadline - time.monotonic()))
        if not (more := link.recv(_LONGEST_LINE)) or len(line) > _LONGEST_LINE:
            raise ValueError("no answer")
        line += more
    if not (found := _STATUS.match(line)):
        raise ValueError("no answer of HTTP")
    return int(found[1])


def _message(node: int) -> bytes:
    """Return ``DeactivateNodeRequest(node_id=node)``: field 1, a varint."""
    digits: list[int] = []
    while node >= 0x80:
        digits.append(node & 0x7F | 0x80)
        node >>= 7
    return bytes([0x08, *digits, node])


def _headers(device: Device) -> dict[str, str]:
    """Return what authenticates the node: a signature of the time."""
    key = read_node_key(device.node_key)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    now = datetime.now(UTC).isoformat()
    signature = key.sign(now.encode("ascii"), ec.ECDSA(SHA256()))
    return {
        "content-type": "application/protobuf",
        "accept": "application/protobuf",
        "flwr-public-key": b64encode(public).decode("ascii"),
        "flwr-timestamp": now,
        "flwr-signature": b64encode(signature).decode("ascii"),
    }
