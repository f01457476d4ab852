"""Enrolling, renewing and revoking devices, and telling the SuperLink about it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

from reticent.core.bundle import NAME, Bundle, sign_policy, write_bundle
from reticent.core.errors import NetworkError, ProvisionError
from reticent.core.signing import PRIVATE_KEY, read_private_key

from .certificates import make_node_key
from .flower import Flower, Node
from .home import Home
from .registry import Device, NodeKey, Registry, changing, write_registry

KEY_DAYS = 365
POLICY = """\
# What the operator proposes to the owner of this device. The owner decides.
[budget]
epsilon = 10.0
delta = 1e-5
# window_days = 365
# lifetime_epsilon = 30.0

[limits]
# least_noise_multiplier = 0.5
# largest_rounds = 1000

[allow]
# tasks = ["digits"]
trust = ["local", "aggregator"]

[when]
# hours = ["22:00-06:00"]
# charging = true
# unmetered = true

[delivery]
# accept = false
"""


def enroll(home: Home, names: list[str], policy: str, now: datetime) -> list[Path]:
    """Make a bundle for each device and record it; return the bundles' paths.

    The SuperLink is told by :func:`synchronize`.

    Raises:
        ProvisionError: If a name is malformed or taken, a file is where its bundle belongs, or the
            authority's certificate cannot be read: then none is enrolled.
        ArtifactError: If a key of the server cannot be read: likewise.
    """
    with changing(home.devices) as registry:
        for name in names:
            _require_free(registry, name, names)
            _require_no_file(_bundle(home, name))
        return [_enroll(home, registry, name, policy, now) for name in names]


def renew(home: Home, name: str, policy: str, now: datetime) -> Path:
    """Make a new node key for a device, in a new bundle; return its path.

    The old key is admitted until the device is seen with the new one. What was counted for the
    device, and its index, stay.

    Raises:
        ProvisionError: If there is no such device, or it was revoked.
    """
    with changing(home.devices) as registry:
        device = registry.named(name)
        private, key = _new_key(now)
        path = _bundle(home, name, len(device.keys) + 1)
        _write(home, path, name, device.index, private, key, policy)
        registry.devices[name] = replace(device, keys=(*device.keys, key))
    return path


def revoke(home: Home, names: list[str], now: datetime) -> None:
    """Record that devices are no longer welcome, for good; on disk when this returns.

    May be repeated: the first time stays. Runs ask a revoked device for nothing more, and take
    nothing more of it, from their next look at the record on; the SuperLink is told by
    :func:`synchronize`.

    Raises:
        ProvisionError: If one is not enrolled: then none is revoked.
    """
    with changing(home.devices) as registry:
        devices = {name: registry.enrolled(name) for name in names}
        for name, device in devices.items():
            when = device.revoked or now.isoformat()
            registry.devices[name] = replace(device, revoked=when)


def synchronize(
    home: Home, flower: Flower, now: datetime, say: Callable[[str], None]
) -> list[Node]:
    """Make the SuperLink admit exactly the devices that are welcome; return its nodes.

    Keys that it does not know are registered; those of revoked devices, expired ones, and old ones
    whose device came back with a newer one, are unregistered. So is every node that the record
    lacks, unless that names no device at all. What was done is recorded after each step, so that
    this may be cut short at any moment and repeated at any time: a key that was registered and not
    recorded is found again.

    Raises:
        NetworkError: If the SuperLink does not do what it is told.
    """
    with changing(home.devices) as registry:
        nodes = flower.nodes()
        known = {node.id: node for node in nodes if node.status != "unregistered"}
        telling = _Telling(home.devices, registry, flower, known, now, say)
        for name in registry.devices:
            telling.close(name)
        for name in registry.devices:
            telling.open(name)
        telling.expel()
    return nodes


@dataclass(frozen=True)
class _Telling:
    """One time that the SuperLink is told.

    Attributes:
        path: The record's file, which is held.
        registry: The record.
        flower: The SuperLink.
        known: The nodes that it admitted at first, by id, but for those unregistered since.
        now: The time.
        say: Takes a line for a person.
    """

    path: Path
    registry: Registry
    flower: Flower
    known: dict[int, Node]
    now: datetime
    say: Callable[[str], None]

    def close(self, name: str) -> None:
        """Unregister the keys of a device that are no longer good."""
        for key in self.registry.devices[name].keys:
            why = _reason_to_close(self.registry.devices[name], key, self.known, self.now)
            if key.closed is not None or why is None:
                continue
            if key.node in self.known:
                self._unregister(key.node)
                self.say(f"{name}: node {key.node} is refused from now on: {why}")
            self._record(name, replace(key, closed=self.now.isoformat()))

    def open(self, name: str) -> None:
        """Register the keys of a device that the SuperLink does not know."""
        for key in self.registry.devices[name].keys:
            if key.closed is not None or key.node in self.known:
                continue
            # A SuperLink that lost its database gives new ids; what was counted goes by the first.
            node = self._registered(key)
            if node.status == "unregistered":
                # Flower (1.41) takes a key once, and does not take it back.
                self.say(
                    f"{name}: its key was unregistered at the SuperLink, for good: give it a new "
                    f"one with `reticent server renew {name}`"
                )
                self._record(name, replace(key, node=node.id, closed=self.now.isoformat()))
                continue
            self._record(name, replace(key, node=node.id))
            self.say(f"{name}: registered as node {node.id}")

    def expel(self) -> None:
        """Unregister the nodes of no device that is welcome, such as those that others registered.

        After :meth:`open`, which finds the nodes of keys that a crash left unrecorded. Not without
        any record: one that was lost would cost every device its key, which Flower takes but once.
        """
        if not self.registry.devices:
            return
        keys = (key for device in self.registry.devices.values() for key in device.keys)
        welcome = {key.node for key in keys if key.closed is None}
        for node in sorted(self.known.keys() - welcome):
            self._unregister(node)
            self.say(f"node {node} is refused from now on: no device that is welcome has it")

    def _registered(self, key: NodeKey) -> Node:
        """Return the node of a key, which is registered now or was before.

        Raises:
            NetworkError: If there is none.
        """
        with tempfile.TemporaryDirectory() as folder:
            public = Path(folder) / "key.pub"
            public.write_text(key.public + "\n")
            try:
                return Node(self.flower.register(public), "registered", None)
            except NetworkError as error:
                if "already in use" not in str(error).lower():
                    raise
                return self.flower.node_of(key.public)

    def _unregister(self, node: int) -> None:
        self.flower.unregister(node)
        del self.known[node]

    def _record(self, name: str, key: NodeKey) -> None:
        """Write at once what was done: a crash must not leave a node that nobody knows."""
        self.registry.devices[name] = self.registry.devices[name].with_key(key)
        write_registry(self.path, self.registry)


def _reason_to_close(
    device: Device, key: NodeKey, known: dict[int, Node], now: datetime
) -> str | None:
    if device.revoked is not None:
        return "the device was revoked"
    if key.expired(now):
        return f"its key expired on {key.expires[:10]}"
    newest = known.get(device.key.node) if device.key.node is not None else None
    seen = newest is not None and newest.changed is not None
    return "it came back with its new key" if key is not device.key and seen else None


def _require_free(registry: Registry, name: str, names: list[str]) -> None:
    if not NAME.fullmatch(name):
        raise ProvisionError(
            f"{name!r}: is no name for a device: must be 1 to 63 characters of a-z, 0-9, . _ -, "
            "the first a letter or digit"
        )
    if name in registry.devices or names.count(name) > 1:
        raise ProvisionError(
            f"{name}: is enrolled already; `reticent server renew {name}` gives it a new key"
        )


def _bundle(home: Home, name: str, number: int = 1) -> Path:
    """Return where the bundle of a device's key of this number belongs.

    No name holds the ``~``: a renewal's file is never that of another device.
    """
    return home.bundles / (f"{name}.bundle" if number == 1 else f"{name}~{number}.bundle")


def _require_no_file(path: Path) -> None:
    # Found only when it is written, the devices before it would be enrolled and not shown.
    if os.path.lexists(path):
        raise ProvisionError(f"{path}: is already there; keep or move it")


def _enroll(home: Home, registry: Registry, name: str, policy: str, now: datetime) -> Path:
    private, key = _new_key(now)
    index = registry.next_index
    path = _bundle(home, name)
    _write(home, path, name, index, private, key, policy)
    registry.devices[name] = Device(index, now.isoformat(), None, (key,))
    return path


def _new_key(now: datetime) -> tuple[str, NodeKey]:
    private, public = make_node_key()
    expires = now + timedelta(days=KEY_DAYS)
    return private, NodeKey(public, now.isoformat(), expires.isoformat())


def _write(
    home: Home, path: Path, name: str, index: int, private: str, key: NodeKey, policy: str
) -> None:
    signer = read_private_key(home.keys / "plans" / PRIVATE_KEY)
    bundle = Bundle(
        name=name,
        index=index,
        address=home.address,
        created=key.issued,
        expires=key.expires,
        ca_certificate=home.authority(),
        node_key=private,
        node_public=key.public,
        policy=policy,
        policy_signature=sign_policy(signer, policy),
        countersign_key=home.public_key(),
        plan_key=home.public_key("plans"),
        artifact_key=home.public_key("artifacts"),
    )
    write_bundle(path, bundle)
