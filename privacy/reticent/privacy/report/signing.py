"""The signature of a report: one text that names the digest of each of its files.

Guarantee: whoever holds the public key and finds :func:`read_signature` content with the files'
digests knows that the holder of the private key signed exactly these bytes, for exactly this plan
and model (Ed25519, RFC 8032, is unforgeable under chosen messages; SHA-256 is collision-resistant).
The first line keeps the text apart from everything else that the same key signs. A key that lies
beside the report shows that nothing was damaged, not who wrote it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from reticent.core.errors import ArtifactError
from reticent.core.signing import SIGNATURE_BYTES, is_signed

SIGNATURE = "report.sig"
FIRST_LINE = "reticent privacy report, signature 1"
LARGEST = 4096
_LINE = re.compile(r"(plan|model|signature|report\.[a-z]+) ([0-9a-f]+)")


@dataclass(frozen=True)
class Signature:
    """What was signed.

    Attributes:
        plan: SHA-256 of the plan, as hex.
        model: Digest of the final model, as hex.
        digests: SHA-256 of each file, as hex, by its name.
        signature: 64 bytes over :meth:`text`.
    """

    plan: str
    model: str
    digests: Mapping[str, str]
    signature: bytes = b""

    def text(self) -> str:
        """Return the signed text: one line a fact, files in order of their names."""
        files = [f"{name} {self.digests[name]}" for name in sorted(self.digests)]
        return "\n".join([FIRST_LINE, f"plan {self.plan}", f"model {self.model}", *files, ""])

    def encode(self) -> bytes:
        """Return the content of ``report.sig``: the signed text and the signature as hex."""
        return f"{self.text()}signature {self.signature.hex()}\n".encode()


def digest(content: bytes) -> str:
    """Return SHA-256 as hex."""
    return hashlib.sha256(content).hexdigest()


def sign(key: Ed25519PrivateKey, plan: str, model: str, files: Mapping[str, bytes]) -> Signature:
    """Sign the content of ``files``."""
    unsigned = Signature(plan, model, {name: digest(data) for name, data in files.items()})
    text = unsigned.text().encode()
    return Signature(plan, model, unsigned.digests, key.sign(text))


def read_signature(content: bytes, key: Ed25519PublicKey, where: str) -> Signature:
    """Parse ``report.sig`` and check its signature; ``where`` names the file in errors.

    Raises:
        ArtifactError: If a byte differs from what :func:`sign` wrote, or another key signed it.
    """
    signature = _parse(content)
    # Only one spelling is accepted: hex has two cases, and lines could be ended in several ways.
    if signature is None or signature.encode() != content:
        raise ArtifactError(
            f"{where}: is not a report's signature: it is damaged or of another kind"
        )
    if not is_signed(key, signature.signature, signature.text().encode()):
        raise ArtifactError(f"{where}: the signature does not hold: altered, or of another key")
    return signature


def _parse(content: bytes) -> Signature | None:
    try:
        first, *lines = content[:LARGEST].decode("ascii").splitlines()
    except (UnicodeDecodeError, ValueError):
        return None
    matches = [_LINE.fullmatch(line) for line in lines]
    facts: dict[str, str] = {match[1]: match[2] for match in matches if match}
    if first != FIRST_LINE or len(facts) != len(lines):
        return None
    named = [facts.pop(name, "") for name in ("plan", "model", "signature")]
    if not all(named) or len(named[2]) != 2 * SIGNATURE_BYTES:
        return None
    return Signature(named[0], named[1], facts, bytes.fromhex(named[2]))
