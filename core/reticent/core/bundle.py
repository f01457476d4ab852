"""The bundle: everything that one device needs to join a server, in one file.

A bundle is one JSON object in UTF-8, at most :data:`MOST_BYTES` long, with exactly the keys
``format``, ``version``, ``checksum`` and the fields of :class:`Bundle`. Keys and certificates are
PEM or OpenSSH texts. ``checksum`` is the SHA-256, in hexadecimal, of the object without it, written
with sorted keys and no spaces: it finds damage. Against an attacker on the way only its comparison
over another channel helps, which is why the commands print it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from .durable import sync_folder
from .errors import ProvisionError
from .signing import SIGNATURE_BYTES, is_signed, write_new

FORMAT = "reticent-bundle"
VERSION = 1
MOST_BYTES = 256 * 1024
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_POLICY = b"reticent owner policy 1\n"
_PLAN = b"reticent plan 1\n"


@dataclass(frozen=True)
class Bundle:
    """What :func:`read_bundle` returns; it holds the device's private key and must stay secret.

    Attributes:
        name: The device's name at the server.
        index: Which of the task's clients the device is.
        address: ``host:port`` at which the device reaches the server.
        created: When the bundle was made (ISO 8601, UTC).
        expires: When the server stops admitting the node key (ISO 8601, UTC).
        ca_certificate: PEM; whoever the device talks to must show a certificate of this authority.
        node_key: Unencrypted OpenSSH text of an ECDSA P-384 private key.
        node_public: Its public half, one OpenSSH line.
        policy: TOML text: what the operator proposes to the device's owner.
        policy_signature: Hexadecimal Ed25519 signature of the policy by ``plan_key``.
        countersign_key: PEM of the Ed25519 key that countersigns ledger heads.
        plan_key: PEM of the Ed25519 key that signs plans.
        artifact_key: PEM of the Ed25519 key that signs artifacts.
    """

    name: str
    index: int
    address: str
    created: str
    expires: str
    ca_certificate: str
    node_key: str
    node_public: str
    policy: str
    policy_signature: str
    countersign_key: str
    plan_key: str
    artifact_key: str

    def __repr__(self) -> str:
        """Name the device only: a bundle in a log must not show its key."""
        return f"Bundle({self.name!r})"

    @property
    def checksum(self) -> str:
        """SHA-256 of the content."""
        return hashlib.sha256(_canonical(_content(self))).hexdigest()

    def encode(self) -> bytes:
        """Return the file's bytes."""
        content = {**_content(self), "checksum": self.checksum}
        return json.dumps(content, indent=1, sort_keys=True).encode("ascii") + b"\n"

    @staticmethod
    def decode(data: bytes, where: str = "bundle") -> Bundle:
        """Parse and check a bundle; the keys in it are not parsed.

        Raises:
            ProvisionError: If it is not one, was altered, or is of another version.
        """
        content = _parse(data, where)
        given = content.pop("checksum", None)
        if content.pop("format", None) != FORMAT:
            raise ProvisionError(f"{where}: is not a {FORMAT}")
        version = content.pop("version", None)
        if type(version) is not int or version != VERSION:
            raise ProvisionError(f"{where}: version {version!r}: must be {VERSION}")
        bundle = _checked(content, where)
        if given != bundle.checksum:
            raise ProvisionError(
                f"{where}: was altered or damaged (its SHA-256 is not its checksum)"
            )
        return bundle


def write_bundle(path: Path, bundle: Bundle) -> None:
    """Write a bundle that must not exist yet, mode 0600.

    After a crash it is whole or absent; once this has returned it is there, also after a power cut.

    Raises:
        ProvisionError: If a file is there, or it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        write_new(temporary, bundle.encode(), 0o600)
        os.link(temporary, path)  # unlike a rename this never replaces a file
        temporary.unlink()
        sync_folder(path.parent)
    except FileExistsError as error:
        raise ProvisionError(f"{path}: is already there; keep or move it") from error
    except OSError as error:
        raise ProvisionError(f"{path}: cannot be written: {error.strerror}") from error


def read_bundle(path: Path) -> Bundle:
    """Return the bundle in ``path``.

    Raises:
        ProvisionError: If it cannot be read or is not one.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ProvisionError(f"{path}: cannot be read: {error.strerror}") from error
    return Bundle.decode(data, str(path))


def sign_policy(key: Ed25519PrivateKey, policy: str) -> str:
    """Return the signature that :func:`is_signed_policy` checks, in hexadecimal."""
    return key.sign(_POLICY + policy.encode()).hex()


def is_signed_policy(key: Ed25519PublicKey, signature: str, policy: str) -> bool:
    """Return whether ``key`` signed exactly this policy."""
    return _is_signed(key, signature, _POLICY + policy.encode())


def sign_plan(key: Ed25519PrivateKey, digest: str) -> str:
    """Return the signature of a plan, named by its digest, in hexadecimal."""
    return key.sign(_PLAN + digest.encode()).hex()


def is_signed_plan(key: Ed25519PublicKey, signature: str, digest: str) -> bool:
    """Return whether ``key`` signed the plan of this digest."""
    return _is_signed(key, signature, _PLAN + digest.encode())


def _is_signed(key: Ed25519PublicKey, signature: str, text: bytes) -> bool:
    if not re.fullmatch(f"[0-9a-f]{{{2 * SIGNATURE_BYTES}}}", signature):
        return False
    return is_signed(key, bytes.fromhex(signature), text)


def _content(bundle: Bundle) -> dict[str, Any]:
    return {"format": FORMAT, "version": VERSION, **asdict(bundle)}


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii")


def _parse(data: bytes, where: str) -> dict[str, Any]:
    if len(data) > MOST_BYTES:
        raise ProvisionError(f"{where}: must have at most {MOST_BYTES} bytes")
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ProvisionError(f"{where}: is not JSON text: was it damaged on the way?") from error
    if not isinstance(content, dict):
        raise ProvisionError(f"{where}: is not a {FORMAT}")
    return content


def _checked(content: dict[str, Any], where: str) -> Bundle:
    kinds = {f.name: int if f.name == "index" else str for f in fields(Bundle)}
    if set(content) != set(kinds):
        odd = ", ".join(sorted(set(content) ^ set(kinds)))
        raise ProvisionError(f"{where}: keys are missing or unknown: {odd}")
    for key, kind in kinds.items():
        if type(content[key]) is not kind:
            raise ProvisionError(f"{where}: {key}: must be {kind.__name__}")
        if kind is str and not _is_text(content[key]):
            raise ProvisionError(f"{where}: {key}: holds half a surrogate pair")
    if content["index"] < 0:
        raise ProvisionError(f"{where}: index={content['index']}: must be at least 0")
    if not NAME.fullmatch(content["name"]):
        raise ProvisionError(f"{where}: name={content['name']!r}: must match {NAME.pattern}")
    for key in ("created", "expires"):
        require_moment(content[key], f"{where}: {key}")
    return Bundle(**content)


def _is_text(value: str) -> bool:
    return not any(0xD800 <= ord(character) <= 0xDFFF for character in value)


def require_moment(text: str, where: str) -> None:
    """Refuse what is no time with its zone.

    Raises:
        ProvisionError: Naming ``where``, what was given and what is allowed.
    """
    try:
        aware = datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        aware = False
    if not aware:
        raise ProvisionError(f"{where}={text!r}: must be an ISO 8601 time with its zone")
