"""The bond: a device's key, vouched for by the node key that the server gave the device.

Flower's SuperLink checks that a request comes from the node that it names, but takes the author of
a *reply* from the reply itself (flwr 1.41): a device that knows another's node id and the id of
the message that was sent to it can answer in its place. A statement (:mod:`.anchor`) is signed by
the device's key, which the server meets with the first update. So that nobody else introduces his
own key for a node then, every statement is followed by a signature of that key by the node key,
whose public half the server keeps.

======================================================  =======================================
whoever answers in a device's place                     what comes of it
======================================================  =======================================
with an update, signed by any key but the device's      refused: there is no bond for that key
with an update that the device signed for this round    it is that device's own update
with an error                                           the device is left out of the round: it is
                                                        a denial of service, and no more
======================================================  =======================================
"""

from __future__ import annotations

import json

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

_HALF = 48  # bytes of a number of P-384
BYTES = 2 * _HALF


def make_bond(node_key: ec.EllipticCurvePrivateKey, device: str) -> bytes:
    """Return the :data:`BYTES` bytes that vouch for ``device``, an Ed25519 key in hexadecimal.

    Raises:
        ValueError: If the node key is not of P-384.
    """
    if not isinstance(node_key.curve, ec.SECP384R1):
        raise ValueError(f"the node key is of {node_key.curve.name}: must be of secp384r1")
    numbers = decode_dss_signature(node_key.sign(_text(device), ec.ECDSA(SHA384())))
    return b"".join(number.to_bytes(_HALF, "big") for number in numbers)


def is_bond(bond: bytes, node_public: str, device: str) -> bool:
    """Tell whether the holder of a node key, its public half an OpenSSH line, made ``bond``."""
    if len(bond) != BYTES:
        return False
    try:
        key = load_ssh_public_key(node_public.encode())
        numbers = (int.from_bytes(part, "big") for part in (bond[:_HALF], bond[_HALF:]))
        signature = encode_dss_signature(*numbers)
        if not isinstance(key, ec.EllipticCurvePublicKey):
            return False
        key.verify(signature, _text(device), ec.ECDSA(SHA384()))
    except (ValueError, UnsupportedAlgorithm, InvalidSignature):
        return False
    return True


def _text(device: str) -> bytes:
    return json.dumps(["reticent", "bond", 1, device], separators=(",", ":")).encode()
