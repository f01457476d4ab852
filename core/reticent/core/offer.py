"""The offer of a model to a device, and the receipt that the device gives for it.

An offer is what a signed update description is to an updater: a version counter, what the bytes
that follow are (length and SHA-256), and how they are cut into files. It is at most
:data:`MOST_OFFER` bytes: 64 of an Ed25519 signature by the server's key of artifacts, and a JSON
object, which is parsed after the signature was found to fit. The files of an artifact follow one
another, sorted by name, with nothing between them, so that there is no archive whose parser could
be attacked.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from .decoding import parse_json
from .errors import ArtifactError, PayloadError
from .signing import SIGNATURE_BYTES, is_signed

MOST_OFFER = 8192
MOST_MODEL = 512 * 2**20
MOST_CHUNK = 2**20
"""Bytes of a model in one message, at most."""

MOST_FILES = 16
MOST_VERSION = 2**53
_TEXT = b"reticent model offer 1\n"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_RECEIPT = struct.Struct(">BQQ")
_RECEIPT_FORMAT = 1


@dataclass(frozen=True)
class Offer:
    """A model that a server offers.

    Attributes:
        version: Counts up over everything that the server ever offered, from 1.
        plan: Digest of the plan that the model was trained by.
        sha256: Of all the files' bytes, one after the other.
        files: Name and length of each file, by name.
    """

    version: int
    plan: str
    sha256: str
    files: tuple[tuple[str, int], ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(length for _, length in self.files)

    def cut(self, data: bytes) -> dict[str, bytes]:
        """Return the files that ``data`` consists of, by name.

        Raises:
            ArtifactError: If ``data`` is not what was offered.
        """
        if len(data) != self.size or hashlib.sha256(data).hexdigest() != self.sha256:
            raise ArtifactError("what was received is not the model that was offered")
        found, place = {}, 0
        for name, length in self.files:
            found[name] = data[place : place + length]
            place += length
        return found


def joined(files: Mapping[str, bytes]) -> bytes:
    """Return the bytes that are sent for an artifact's files."""
    return b"".join(files[name] for name in sorted(files))


def offer_of(version: int, plan: str, files: Mapping[str, bytes]) -> tuple[Offer, bytes]:
    """Return the offer of an artifact's files, and the bytes that are sent for it.

    Raises:
        ArtifactError: If an offer cannot hold them.
    """
    data = joined(files)
    sizes = tuple((name, len(files[name])) for name in sorted(files))
    offer = Offer(version, plan, hashlib.sha256(data).hexdigest(), sizes)
    try:
        return _checked(asdict(offer)), data
    except ValueError as error:
        raise ArtifactError(f"the artifact cannot be offered to devices: {error}") from error


def sign_offer(key: Ed25519PrivateKey, offer: Offer) -> bytes:
    """Return what is sent of an offer: its signature and its text."""
    text = json.dumps(asdict(offer), sort_keys=True, separators=(",", ":")).encode("ascii")
    return key.sign(_TEXT + text) + text


def open_offer(key: Ed25519PublicKey, data: bytes) -> Offer:
    """Return a signed offer; nothing of it is parsed before its signature fits.

    Raises:
        ArtifactError: If ``key`` did not sign it, or it is malformed.
    """
    signature, text = data[:SIGNATURE_BYTES], data[SIGNATURE_BYTES:]
    if len(data) > MOST_OFFER or not is_signed(key, signature, _TEXT + text):
        raise ArtifactError("the offer is not signed by the server's key of artifacts")
    return parse_offer(text)


def parse_offer(text: bytes) -> Offer:
    """Return the offer in the text behind a signature.

    Raises:
        ArtifactError: If it is malformed.
    """
    try:
        return _checked(parse_json(text))
    except ValueError as error:
        raise ArtifactError(f"the offer is malformed: {error}") from error


@dataclass(frozen=True)
class Receipt:
    """What a device says of an offer; always :data:`RECEIPT_BYTES` long.

    Attributes:
        version: Of the model that is installed; 0 for none.
        offset: How many of the offered bytes it holds, from the first one on.
    """

    version: int
    offset: int

    def encode(self) -> bytes:
        """Return the bytes to send."""
        return _RECEIPT.pack(_RECEIPT_FORMAT, self.version, self.offset)

    @staticmethod
    def decode(data: bytes) -> Receipt:
        """Parse a receipt.

        Raises:
            PayloadError: If it is not one.
        """
        if len(data) != _RECEIPT.size:
            raise PayloadError(f"a receipt has {_RECEIPT.size} bytes, not {len(data)}")
        form, version, offset = _RECEIPT.unpack(data)
        if form != _RECEIPT_FORMAT or version > MOST_VERSION or offset > MOST_MODEL:
            raise PayloadError(f"receipt of format {form}, version {version}, offset {offset}")
        return Receipt(version, offset)


RECEIPT_BYTES = _RECEIPT.size


def _checked(found: Any) -> Offer:
    """Return the offer that a JSON object is.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(found, dict) or set(found) != {"version", "plan", "sha256", "files"}:
        raise ValueError("must be an object with version, plan, sha256 and files")
    version, plan, digest = found["version"], found["plan"], found["sha256"]
    if type(version) is not int or not 1 <= version <= MOST_VERSION:
        raise ValueError(f"version={str(version)[:40]}: must be a number from 1 to 2^53")
    for name, value in (("plan", plan), ("sha256", digest)):
        if not isinstance(value, str) or not _DIGEST.fullmatch(value):
            raise ValueError(f"{name}: must be a SHA-256 in hexadecimal")
    return Offer(version, plan, digest, _files(found["files"]))


def _files(found: Any) -> tuple[tuple[str, int], ...]:
    if not isinstance(found, list | tuple) or not 1 <= len(found) <= MOST_FILES:
        raise ValueError(f"files: must be a list of 1 to {MOST_FILES}")
    files = tuple(_file(entry) for entry in found)
    names = [name for name, _ in files]
    if names != sorted(set(names)):
        raise ValueError("files: must be sorted by name, and no name be there twice")
    if not 1 <= sum(size for _, size in files) <= MOST_MODEL:
        raise ValueError(f"files: must have 1 to {MOST_MODEL} bytes together")
    return files


def _file(entry: Any) -> tuple[str, int]:
    if not isinstance(entry, list | tuple) or len(entry) != 2:
        raise ValueError("files: each must be a name and a length")
    name, size = entry
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"files: {str(name)[:80]!r} is no name of a file")
    if type(size) is not int or not 0 <= size <= MOST_MODEL:
        raise ValueError(f"files: {name}: must have 0 to {MOST_MODEL} bytes")
    return name, size
