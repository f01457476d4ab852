"""Nobody introduces a device key for a node but who holds the node's key."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
)
from flwr.app import Context, RecordDict

from reticent.client import deployment
from reticent.client.folder import accept_policy, create_device
from reticent.core.bundle import read_bundle
from reticent.core.errors import PayloadError
from reticent.core.run import Run
from reticent.privacy.anchor import BYTES, public_hex, state
from reticent.privacy.bond import BYTES as BOND
from reticent.privacy.bond import is_bond, make_bond
from reticent.privacy.ledger import Head
from reticent.server import deployment as server
from reticent.server.certificates import make_node_key, utc_now
from reticent.server.countersign import Countersigner
from reticent.server.enrolment import POLICY, enroll, revoke
from reticent.server.home import create_home
from reticent.server.registry import changing

PRIVATE, PUBLIC = make_node_key()
DEVICE, STRANGER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
HEAD = Head(1, "ab" * 32)


def node_key(text: str = PRIVATE) -> ec.EllipticCurvePrivateKey:
    key = load_ssh_private_key(text.encode(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def name(key: Ed25519PrivateKey) -> str:
    return public_hex(key.public_key())


def test_a_bond_is_for_one_device_key_by_one_node_key() -> None:
    bond = make_bond(node_key(), name(DEVICE))
    assert len(bond) == BOND and is_bond(bond, PUBLIC, name(DEVICE))
    assert not is_bond(bond, PUBLIC, name(STRANGER))
    assert not is_bond(bond, make_node_key()[1], name(DEVICE))
    for place in (0, 47, 48, 95):
        changed = bond[:place] + bytes([bond[place] ^ 1]) + bond[place + 1 :]
        assert not is_bond(changed, PUBLIC, name(DEVICE))
    for odd in (b"", bond[:-1], bond + b"\0", bytes(BOND), b"\xff" * BOND):
        assert not is_bond(odd, PUBLIC, name(DEVICE))
    assert not is_bond(bond, "ssh-nothing", name(DEVICE))


def test_only_keys_of_the_right_curve_vouch() -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(ValueError, match="must be of secp384r1"):
        make_bond(other, name(DEVICE))
    public = other.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    assert not is_bond(make_bond(node_key(), name(DEVICE)), public, name(DEVICE))


def statement(key: Ed25519PrivateKey, bond: bytes) -> bytes:
    return state(key, HEAD, "run", 1, b"update").encode() + bond


def test_nobody_answers_for_a_device_before_its_first_update(tmp_path: Path) -> None:
    """Another device knows its own key and node key, whose node is 9, and answers as node 7."""
    countersigner = Countersigner.open(tmp_path, Ed25519PrivateKey.generate())
    other_private, other_public = make_node_key()
    countersigner.node_key = {7: PUBLIC, 9: other_public}.get
    refused = "the node's key does not vouch for the device's key"
    for bond in (b"", make_bond(node_key(other_private), name(STRANGER)), bytes(BOND)):
        with pytest.raises(PayloadError, match=refused):
            countersigner.accept(7, statement(STRANGER, bond), "run", 1, b"update")
    own = make_bond(node_key(), name(DEVICE))
    with pytest.raises(PayloadError, match=refused):  # a bond that it saw is for another key
        countersigner.accept(7, statement(STRANGER, own), "run", 1, b"update")
    countersigner.accept(7, statement(DEVICE, own), "run", 1, b"update")
    countersigner.commit()
    countersigner.close()


def test_without_bonds_whoever_comes_first_is_taken_for_the_device(tmp_path: Path) -> None:
    """The control: what the test above finds is what the bond is for."""
    countersigner = Countersigner.open(tmp_path, Ed25519PrivateKey.generate())
    countersigner.accept(7, statement(STRANGER, b""), "run", 1, b"update")
    countersigner.close()


def test_nothing_is_taken_from_a_node_that_is_not_enrolled_or_was_revoked(tmp_path: Path) -> None:
    home = create_home(tmp_path / "server", ["127.0.0.1"], 8000, utc_now())
    enroll(home, ["pi-1"], POLICY, utc_now())
    with changing(home.devices) as registry:
        key = replace(registry.devices["pi-1"].key, public=PUBLIC, node=7)
        registry.devices["pi-1"] = replace(registry.devices["pi-1"], keys=(key,), identity=7)
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    countersigner = server._countersigner(run, str(home.folder))
    sent = statement(DEVICE, make_bond(node_key(), name(DEVICE)))
    countersigner.accept(7, sent, "run", 1, b"update")
    countersigner.begin()
    with pytest.raises(PayloadError, match="no enrolled device's"):
        countersigner.accept(8, sent, "run", 1, b"update")
    revoke(home, ["pi-1"], utc_now())  # while the run goes on
    with pytest.raises(PayloadError, match="was revoked"):
        countersigner.accept(7, sent, "run", 1, b"update")
    countersigner.close()


def test_an_enrolled_device_vouches_for_itself_and_its_server_asks_for_it(tmp_path: Path) -> None:
    home = create_home(tmp_path / "server", ["127.0.0.1"], 8000, utc_now())
    bundle = read_bundle(enroll(home, ["pi-1"], POLICY, utc_now())[0])
    device = create_device(tmp_path / "pi-1", bundle)
    accept_policy(device, POLICY, "policy")
    with changing(home.devices) as registry:
        key = registry.devices["pi-1"].key
        registry.devices["pi-1"] = registry.devices["pi-1"].with_key(
            type(key)(key.public, key.issued, key.expires, node=7)
        )
    settings = {"device-dir": str(device.folder)}
    own = deployment._environment(Context(1, 7, settings, RecordDict(), {}))
    assert own.identity is not None
    sent = own.identity.statement(own.own_ledger, "run", 1, b"update").value
    assert len(sent) == BYTES + BOND
    (tmp_path / "run").mkdir()
    countersigner = server._countersigner(Run(tmp_path / "run"), str(home.folder))
    with pytest.raises(PayloadError, match="does not vouch"):
        countersigner.accept(7, sent[:BYTES], "run", 1, b"update")
    countersigner.accept(7, sent, "run", 1, b"update")
    countersigner.close()
