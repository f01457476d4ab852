"""Ed25519 keys (RFC 8032) in PEM files, as a run keeps them in ``keys/``."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from .errors import ArtifactError

PRIVATE_KEY = "signing_key.pem"
PUBLIC_KEY = "signing_key.pub.pem"
ELSEWHERE = "signing_key.path"
"""In a folder without the private key: the path of the folder that has it."""

SIGNATURE_BYTES = 64
_MOST_BYTES = 10_000


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """Return the unencrypted private key in ``path``.

    Raises:
        ArtifactError: If the file cannot be read or holds anything else.
    """
    try:
        key = load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ArtifactError(f"{path}: must be an unencrypted Ed25519 key in PEM") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ArtifactError(f"{path}: holds a {type(key).__name__}: must be an Ed25519 key")
    return key


def private_key_file(folder: Path) -> Path:
    """Return where the private key of a run's ``keys`` is: there, or where it says; it may be gone.

    A run of a server refers to the server's key, which must not travel with the run's directory.

    Raises:
        ArtifactError: If what it says cannot be read.
    """
    if not (folder / ELSEWHERE).is_file():
        return folder / PRIVATE_KEY
    try:
        return Path(_read(folder / ELSEWHERE).decode().strip()) / PRIVATE_KEY
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{folder / ELSEWHERE}: must hold the path of a folder") from error


def refer_to_key(folder: Path, where: Path) -> None:
    """Make ``folder`` with the public key of ``where``, and where the private one is.

    May be repeated, and is where it was cut short: a folder without this would get a key of its
    own, which no device knows.

    Raises:
        ArtifactError: If ``where`` holds no key, or ``folder`` cannot be written.
    """
    public = public_pem(read_public_key(where / PUBLIC_KEY))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in ((ELSEWHERE, f"{where.absolute()}\n".encode()), (PUBLIC_KEY, public)):
            (folder / name).unlink(missing_ok=True)
            write_new(folder / name, data, 0o644)
    except OSError as error:
        raise ArtifactError(f"{folder}: cannot be written: {error.strerror}") from error


def read_public_key(path: Path) -> Ed25519PublicKey:
    """Return the public key in ``path``.

    Raises:
        ArtifactError: If the file cannot be read or holds anything else.
    """
    try:
        key = load_pem_public_key(_read(path))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ArtifactError(f"{path}: must be an Ed25519 public key in PEM") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ArtifactError(f"{path}: holds a {type(key).__name__}: must be an Ed25519 key")
    return key


def make_signing_key(folder: Path) -> Ed25519PrivateKey:
    """Make an Ed25519 key; write ``signing_key.pem`` (mode 0600) and ``signing_key.pub.pem``.

    Raises:
        ArtifactError: If a key is already there (it is never overwritten) or cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    public = public_pem(key.public_key())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (PRIVATE_KEY, PUBLIC_KEY):
            # Before one is written: a pair that does not fit would sign what nobody verifies.
            if (folder / name).exists():
                raise FileExistsError(None, None, str(folder / name))
        write_new(folder / PRIVATE_KEY, private_pem(key), 0o600)
        write_new(folder / PUBLIC_KEY, public, 0o644)
    except FileExistsError as error:
        raise ArtifactError(f"{error.filename}: a key is already there; keep or move it") from error
    except OSError as error:
        raise ArtifactError(f"{folder}: no key written: {error.strerror or error}") from error
    return key


def private_pem(key: Ed25519PrivateKey) -> bytes:
    """Return an unencrypted PKCS8 PEM text of ``key``."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def public_pem(key: Ed25519PublicKey) -> bytes:
    """Return a PEM text of ``key``."""
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def write_new(path: Path, data: bytes, mode: int) -> None:
    """Write a file that must not exist yet, with these permissions from its first byte on.

    Raises:
        OSError: If it exists, or cannot be written.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def is_signed(key: Ed25519PublicKey, signature: bytes, text: bytes) -> bool:
    """Return whether ``signature`` is the key's over exactly ``text``."""
    try:
        key.verify(signature, text)
    except InvalidSignature:
        return False
    return True


def _read(path: Path) -> bytes:
    try:
        # More than any key has, and not a whole disk.
        with path.open("rb") as file:
            return file.read(_MOST_BYTES)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error
