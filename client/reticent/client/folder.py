"""A device's folder: what its bundle held, its owner's policy, and what it remembers."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import tomli_w
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
)

from reticent.core.bundle import NAME, Bundle, is_signed_policy, require_moment
from reticent.core.errors import ArtifactError, LedgerError, PolicyError, ProvisionError, RunError
from reticent.core.run import write_atomic
from reticent.core.signing import read_public_key, write_new

from .disk import mapped
from .policy import Policy, load_policy, parse_policy
from .unit import UNIT, device_unit

_KEYS = ("name", "index", "address", "created", "expires", "checksum")
_PATIENCE, _LOOK_SECONDS = 1.0, 0.05


@dataclass(frozen=True)
class Device:
    """Paths in a device's folder, which :func:`create_device` makes.

    Attributes:
        folder: An absolute path.
        name: What the server calls the device.
        index: Which of the task's clients it is.
        address: ``host:port`` of the server.
        expires: When the server stops admitting the node key (ISO 8601, UTC).
        checksum: Of the bundle.
    """

    folder: Path
    name: str
    index: int
    address: str
    expires: str
    checksum: str

    @property
    def state(self) -> Path:
        """Folder of the ledger, the diary and the device's own key."""
        return self.folder / "state"

    @property
    def models(self) -> Path:
        """Folder of the models that the server delivered."""
        return self.folder / "models"

    @property
    def policy(self) -> Path:
        """The policy that the owner accepted."""
        return self.folder / "policy.toml"

    @property
    def proposal(self) -> Path:
        """The policy that the operator proposes."""
        return self.folder / "proposed-policy.toml"

    @property
    def node_key(self) -> Path:
        """The private key of the device's SuperNode."""
        return self.folder / "node.key"

    @property
    def authority(self) -> Path:
        """The only certificate authority to trust for ``address``."""
        return self.folder / "ca.crt"

    @property
    def log(self) -> Path:
        """What the SuperNode prints under the agent."""
        return self.folder / "agent.log"

    @property
    def report(self) -> Path:
        """What the agent says of itself."""
        return self.folder / "agent.json"

    @property
    def flower(self) -> Path:
        """Flower's home (``FLWR_HOME``)."""
        return self.folder / "flower"

    @property
    def programs(self) -> Path:
        """Folder that comes first in the SuperNode's PATH."""
        return self.folder / "bin"

    @property
    def unit(self) -> Path:
        """The systemd unit."""
        return self.folder / UNIT

    def key(self, purpose: str) -> Ed25519PublicKey:
        """Return a key of the server's: ``countersign``, ``plans`` or ``artifacts``."""
        return read_public_key(self.key_file(purpose))

    def key_file(self, purpose: str) -> Path:
        """Return the file of such a key."""
        return self.folder / f"{purpose}.pub.pem"

    def owners_policy(self) -> Policy:
        """Return the accepted policy.

        Raises:
            PolicyError: If none was accepted, or it is not one.
        """
        if not self.policy.is_file():
            raise PolicyError(
                f"{self.policy}: the device's owner has accepted no policy: read {self.proposal}, "
                "then `reticent device policy accept`"
            )
        return load_policy(self.policy)

    def signers(self, policy: Policy) -> list[Ed25519PublicKey]:
        """Return the keys that may sign plans.

        Raises:
            ArtifactError: If the bundle's key is damaged.
        """
        if policy.allow.signers is None:
            return [self.key("plans")]
        return [Ed25519PublicKey.from_public_bytes(bytes.fromhex(k)) for k in policy.allow.signers]


def create_device(folder: Path, bundle: Bundle) -> Device:
    """Make a device's folder from its bundle, whole or not at all; no policy is accepted yet.

    The folder gets mode 0700 and keys 0600. Nothing that exists is overwritten.

    Raises:
        ProvisionError: If the bundle's keys or signature are wrong, the folder exists and is not
            empty, or it cannot be written.
    """
    folder = folder.expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ProvisionError(
            f"{folder}: already exists and is not empty; nothing was overwritten. `reticent device "
            "renew` takes a new bundle for a device; its ledger must stay"
        )
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        part.mkdir(mode=0o700, parents=True)
        for name in ("state", "flower"):
            (part / name).mkdir(mode=0o700)
        _unpack(part, bundle)
        command = Path(sys.executable).absolute().parent / "reticent"
        (part / UNIT).write_text(device_unit(folder, command))
        part.replace(folder)
    except OSError as error:
        raise ProvisionError(f"{folder}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return open_device(folder)


def renew_device(device: Device, bundle: Bundle) -> Device:
    """Take over what a newer bundle of the same device holds; ledger and policy stay.

    No agent may run: its SuperNode stays connected by the old key, and each round would be vouched
    for by the new one, so that it is charged and the server refuses it.

    Raises:
        ProvisionError: If the bundle is another device's or another server's.
        RunError: If an agent runs for the folder.
    """
    part = device.folder / ".renewal"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(mode=0o700)
        _unpack(part, bundle)
        if (bundle.name, bundle.index) != (device.name, device.index):
            raise ProvisionError(
                f"the bundle is of {bundle.name}, index {bundle.index}, and this is the folder of "
                f"{device.name}, index {device.index}"
            )
        if _bytes_of(part / "plans.pub.pem") != _bytes_of(device.folder / "plans.pub.pem"):
            raise ProvisionError(
                f"the bundle is of another server, whose key of plans is not the one that "
                f"{device.folder} has; `reticent device init` makes a folder for it"
            )
        with held(device, ": stop it, renew, and start it again"):
            for path in sorted(part.iterdir()):
                path.replace(device.folder / path.name)
    except OSError as error:
        raise ProvisionError(f"{device.folder}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return open_device(device.folder)


def open_device(folder: Path) -> Device:
    """Open what :func:`create_device` made.

    Raises:
        ProvisionError: If it is not there, or damaged.
        LedgerError: If the folder of its ledger is gone: a new one would know of nothing spent.
    """
    folder = folder.expanduser().absolute()
    path = folder / "device.toml"
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProvisionError(
            f"{path}: cannot be read: {error.strerror}; `reticent device init` makes it"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ProvisionError(f"{path}: damaged: {error}") from error
    kinds = {key: int if key == "index" else str for key in _KEYS}
    if set(found) != set(kinds) or any(type(found[k]) is not kind for k, kind in kinds.items()):
        raise ProvisionError(f"{path}: must hold {', '.join(_KEYS)}, and nothing else")
    if not NAME.fullmatch(found["name"]):
        raise ProvisionError(f"{path}: name={found['name']!r}: must match {NAME.pattern}")
    for key in ("created", "expires"):
        require_moment(found[key], f"{path}: {key}")
    if not (folder / "state").is_dir():
        raise LedgerError(
            f"{folder / 'state'}: is gone, and with it the record of what the device has spent: "
            "put it back (a device whose spending is unknown must not spend more)"
        )
    wanted: dict[str, Any] = {k: found[k] for k in _KEYS if k != "created"}
    return Device(folder, **wanted)


def read_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return a SuperNode's private key.

    Raises:
        ProvisionError: If the file cannot be read or holds anything else.
    """
    try:
        return _node_key(path.read_bytes(), str(path))
    except OSError as error:
        raise ProvisionError(f"{path}: cannot be read: {error.strerror}") from error


def accept_policy(device: Device, text: str, where: str) -> Policy:
    """Make ``text`` the owner's policy; it holds from the next order on.

    Raises:
        PolicyError: If it is not a policy: the one before stays.
        StorageError: If it cannot be written: the one before stays.
    """
    policy = parse_policy(text, where)
    with mapped(device.policy):
        write_atomic(device.policy, text.encode())
    return policy


@contextmanager
def held(device: Device, advice: str = "") -> Iterator[None]:
    """Hold the folder: one agent runs for it at a time.

    Args:
        device: The device.
        advice: Words for the error, where its reader should know more.

    Raises:
        RunError: If another process holds it, for a second.
        StorageError: If the lock cannot be opened.
    """
    path = device.folder / "agent.lock"
    with mapped(path):
        file = path.open("ab")
    with file:
        if not _lock(file, path):
            raise RunError(f"{device.folder}: an agent runs for this folder already{advice}")
        yield


def _lock(file: BinaryIO, path: Path) -> bool:
    """Lock a file for this process alone; return whether it could be within :data:`_PATIENCE`.

    Who only looks (:func:`is_held`) has it for a moment, and must not keep an agent from starting:
    systemd does not try that again.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        with mapped(path), suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_SECONDS)


def is_held(device: Device) -> bool:
    """Return whether an agent runs for the folder; nothing is written, so it may be read-only."""
    try:
        # Shared: two who look at once do not take each other for an agent.
        with (device.folder / "agent.lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # most of all: there is none, since no agent ever ran
        return False
    return False


def _unpack(folder: Path, bundle: Bundle) -> None:
    """Write the bundle's members, and check what it says of itself.

    Raises:
        ProvisionError: If a key cannot be parsed or is expired, or the policy is not signed.
    """
    _check_node_key(bundle)
    write_new(folder / "node.key", bundle.node_key.encode(), 0o600)
    texts = {
        "ca.crt": bundle.ca_certificate,
        "countersign.pub.pem": bundle.countersign_key,
        "plans.pub.pem": bundle.plan_key,
        "artifacts.pub.pem": bundle.artifact_key,
        "proposed-policy.toml": bundle.policy,
        "device.toml": tomli_w.dumps({key: getattr(bundle, key) for key in _KEYS}),
    }
    for name, text in texts.items():
        write_new(folder / name, text.encode(), 0o644)
    try:
        keys = [read_public_key(p) for p in sorted(folder.glob("*.pub.pem"))]
        plans = read_public_key(folder / "plans.pub.pem")
    except ArtifactError as error:
        raise ProvisionError(f"{bundle.name}: the bundle holds no usable keys: {error}") from error
    if len(keys) != 3 or not is_signed_policy(plans, bundle.policy_signature, bundle.policy):
        raise ProvisionError(f"{bundle.name}: the proposed policy is not signed by the server")


def _check_node_key(bundle: Bundle) -> None:
    key = _node_key(bundle.node_key.encode(), bundle.name)
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    if public.split() != bundle.node_public.split()[:2]:
        raise ProvisionError(f"{bundle.name}: the bundle's node key is another device's")
    if datetime.fromisoformat(bundle.expires) <= datetime.now().astimezone():
        raise ProvisionError(
            f"{bundle.name}: the bundle expired on {bundle.expires[:10]}: ask for a new one "
            "(`reticent server renew`)"
        )


def _node_key(data: bytes, where: str) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_ssh_private_key(data, None)
    except (ValueError, TypeError, NotImplementedError, UnsupportedAlgorithm) as error:
        raise ProvisionError(f"{where}: holds no usable node key") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ProvisionError(f"{where}: the node key is not an elliptic curve key of P-384")
    return key


def _bytes_of(path: Path) -> bytes:
    return path.read_bytes() if os.path.lexists(path) else b""
