"""Who is enrolled: the record of devices, their node keys and what became of them."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from reticent.core.errors import ProvisionError

from .home import write_private


@dataclass(frozen=True)
class NodeKey:
    """One node key of a device; the private half is in its bundle only.

    Attributes:
        public: One OpenSSH line.
        issued: When it was made (ISO 8601).
        expires: When it stops being admitted (ISO 8601).
        node: The SuperLink's id for it; None until it is registered.
        closed: When it was taken from the SuperLink for good (ISO 8601); None while it is good.
    """

    public: str
    issued: str
    expires: str
    node: int | None = None
    closed: str | None = None

    def expired(self, now: datetime) -> bool:
        """Return whether the key is no longer admitted."""
        return now >= datetime.fromisoformat(self.expires)


@dataclass(frozen=True)
class Device:
    """One enrolled device.

    Attributes:
        index: Which of the task's clients it is; never given to another device.
        enrolled: When (ISO 8601).
        revoked: When it was revoked (ISO 8601); None while it is welcome.
        keys: Its node keys, oldest first; more than one after a renewal.
        identity: The first node id that it had: its name in journals, over every renewal; None
            until it is registered.
    """

    index: int
    enrolled: str
    revoked: str | None
    keys: tuple[NodeKey, ...]
    identity: int | None = None

    @property
    def key(self) -> NodeKey:
        """The newest key."""
        return self.keys[-1]

    def with_key(self, changed: NodeKey) -> Device:
        """Return the device with one of its keys, found by its public half, replaced."""
        keys = tuple(changed if k.public == changed.public else k for k in self.keys)
        identity = changed.node if self.identity is None else self.identity
        return replace(self, keys=keys, identity=identity)


@dataclass
class Registry:
    """The devices of one server, by name.

    Attributes:
        devices: May be changed while :func:`changing` holds the file.
    """

    devices: dict[str, Device] = field(default_factory=dict)

    @property
    def next_index(self) -> int:
        """The lowest index that no device ever had."""
        return 1 + max((d.index for d in self.devices.values()), default=-1)

    def by_node(self) -> dict[int, str]:
        """Return device names by node id, closed keys included."""
        return {
            key.node: name
            for name, device in self.devices.items()
            for key in device.keys
            if key.node is not None
        }

    def node_keys(self) -> dict[int, str]:
        """Return the public halves of welcome devices' node keys, as OpenSSH lines, by node id."""
        return {
            key.node: key.public
            for device in self.devices.values()
            for key in device.keys
            if key.node is not None and device.revoked is None
        }

    def identities(self) -> dict[int, int]:
        """Return the identity of the device that each node id belongs to."""
        return {
            key.node: device.identity
            for device in self.devices.values()
            for key in device.keys
            if key.node is not None and device.identity is not None
        }

    def enrolled(self, name: str) -> Device:
        """Return a device, which may have been revoked.

        Raises:
            ProvisionError: If there is none of this name.
        """
        if name not in self.devices:
            known = ", ".join(sorted(self.devices)) or "no device"
            raise ProvisionError(f"{name}: is not enrolled: {known} is")
        return self.devices[name]

    def named(self, name: str) -> Device:
        """Return a device that is welcome.

        Raises:
            ProvisionError: If there is none of this name, or it was revoked.
        """
        device = self.enrolled(name)
        if device.revoked is not None:
            raise ProvisionError(
                f"{name}: was revoked on {device.revoked[:10]}: enroll it under a new name"
            )
        return device


def read_registry(path: Path) -> Registry:
    """Return the record in ``path``; an empty one if there is no file.

    Raises:
        ProvisionError: If it is damaged or cannot be read.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Registry({name: _device(entry) for name, entry in data["devices"].items()})
    except FileNotFoundError:
        return Registry()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ProvisionError(f"{path}: damaged: {error}") from error
    except OSError as error:
        raise ProvisionError(f"{path}: cannot be read: {error.strerror}") from error


def write_registry(path: Path, registry: Registry) -> None:
    """Replace the record in ``path``, whole; its mode is 0600.

    Raises:
        ProvisionError: If it cannot be written.
    """
    devices = {name: asdict(device) for name, device in sorted(registry.devices.items())}
    try:
        write_private(path, json.dumps({"devices": devices}, indent=1).encode() + b"\n")
    except OSError as error:
        raise ProvisionError(f"{path}: cannot be written: {error.strerror}") from error


@contextmanager
def changing(path: Path) -> Iterator[Registry]:
    """Hold the record alone, and write it on leaving, also when something was raised.

    What was done before an error must not be forgotten. What a crash must not make forgotten either
    is written with :func:`write_registry` meanwhile.
    """
    with path.with_name(f".{path.name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        registry = read_registry(path)
        try:
            yield registry
        finally:
            write_registry(path, registry)


def _device(entry: dict[str, Any]) -> Device:
    keys = tuple(NodeKey(**key) for key in entry["keys"])
    if not keys or any(not _fits(key) for key in keys):
        raise ValueError("a device has a key that is malformed, or none")
    if type(entry["index"]) is not int or entry["index"] < 0:
        raise ValueError(f"index={entry['index']!r}")
    if type(entry["identity"]) is not int and entry["identity"] is not None:
        raise ValueError(f"identity={entry['identity']!r}")
    if type(entry["enrolled"]) is not str or not isinstance(entry["revoked"], str | None):
        raise ValueError(f"enrolled={entry['enrolled']!r}, revoked={entry['revoked']!r}")
    return Device(entry["index"], entry["enrolled"], entry["revoked"], keys, entry["identity"])


def _fits(key: NodeKey) -> bool:
    texts = isinstance(key.public, str) and isinstance(key.issued, str)
    aware = datetime.fromisoformat(key.expires).tzinfo is not None
    closed = isinstance(key.closed, str | None)
    return texts and aware and closed and (key.node is None or type(key.node) is int)
