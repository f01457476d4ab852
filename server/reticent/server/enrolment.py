"""Enrolling, renewing and revoking devices, and telling the SuperLink about it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

from reticent.core.bundle import NAME, Bundle, sign_policy, write_bundle
from reticent.core.errors import NetworkError, ProvisionError
from reticent.core.signing import PRIVATE_KEY, read_private_key

from .certificates import make_node_key
from .flower import Flower, Node
from .home import Home
from .registry import Device, NodeKey, Registry, changing

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
    """Record that devices are no longer welcome, for good.

    Raises:
        ProvisionError: If one is not enrolled or was revoked before: then none is revoked.
    """
    with changing(home.devices) as registry:
        devices = {name: registry.named(name) for name in names}
        for name, device in devices.items():
            registry.devices[name] = replace(device, revoked=now.isoformat())


def synchronize(
    home: Home, flower: Flower, now: datetime, say: Callable[[str], None]
) -> list[Node]:
    """Make the SuperLink admit exactly the devices that are welcome; return its nodes.

    Keys that it does not know are registered; those of revoked devices, expired ones, and old ones
    whose device came back with a newer one, are unregistered. May be repeated at any time.

    Raises:
        NetworkError: If the SuperLink does not do what it is told.
    """
    with changing(home.devices) as registry:
        nodes = flower.nodes()
        known = {node.id: node for node in nodes if node.status != "unregistered"}
        for name in registry.devices:
            _close(registry, name, flower, known, now, say)
            _open(registry, name, flower, known, now, say)
    return nodes


def _close(
    registry: Registry,
    name: str,
    flower: Flower,
    known: dict[int, Node],
    now: datetime,
    say: Callable[[str], None],
) -> None:
    """Unregister the keys of a device that are no longer good."""
    for key in registry.devices[name].keys:
        why = _reason_to_close(registry.devices[name], key, known, now)
        if key.closed is not None or why is None:
            continue
        if key.node in known:
            flower.unregister(key.node)
            say(f"{name}: node {key.node} is refused from now on: {why}")
        closed = replace(key, closed=now.isoformat())
        registry.devices[name] = registry.devices[name].with_key(closed)


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


def _open(
    registry: Registry,
    name: str,
    flower: Flower,
    known: dict[int, Node],
    now: datetime,
    say: Callable[[str], None],
) -> None:
    """Register the keys of a device that the SuperLink does not know."""
    for key in registry.devices[name].keys:
        if key.closed is not None or key.node in known:
            continue
        node = _register(flower, name, key)
        # A SuperLink that lost its database gives new ids; what was counted goes by the first.
        registry.devices[name] = registry.devices[name].with_key(replace(key, node=node))
        say(f"{name}: registered as node {node}")


def _register(flower: Flower, name: str, key: NodeKey) -> int:
    with tempfile.TemporaryDirectory() as folder:
        public = Path(folder) / "key.pub"
        public.write_text(key.public + "\n")
        try:
            return flower.register(public)
        except NetworkError as error:
            if "already in use" not in str(error).lower():
                raise
            raise NetworkError(
                f"{name}: the SuperLink knows the key already, but it was not recorded under which "
                f"node (a crash?): give the device a new one with `reticent server renew {name}`"
            ) from error


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
