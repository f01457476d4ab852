"""Whom a real SuperLink believes, over real sockets: keys, certificates, versions of TLS, authors.

One SuperLink with TLS and node keys serves all tests of this file; devices speak to it through
Flower's own client (:mod:`swarm`). What devices believe is in ``test_device_leaving``.
"""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Error, Message
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from swarm import FleetNode, app, new_key, register

from reticent.client.agent import free_port
from reticent.client.folder import create_device
from reticent.client.leaving import leave
from reticent.core.bundle import read_bundle
from reticent.core.errors import NetworkError
from reticent.server.certificates import utc_now
from reticent.server.enrolment import POLICY, enroll, revoke, synchronize
from reticent.server.flower import Flower, SuperLink
from reticent.server.home import Home, create_home
from reticent.server.registry import read_registry
from reticent.simulations.grid import enter_task

pytestmark = pytest.mark.deployment
NAMES = ("ann", "bob", "cleo")


@dataclass
class Server:
    home: Home
    flower: Flower
    folder: Path
    nodes: list[FleetNode] = field(default_factory=list)

    def key(self, name: str) -> ec.EllipticCurvePrivateKey:
        text = read_bundle(self.home.bundles / f"{name}.bundle").node_key
        key = load_ssh_private_key(text.encode(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key

    def node(self, key: ec.EllipticCurvePrivateKey, insecure: bool = False) -> FleetNode:
        return self.opened(self.home.tls / "ca.crt", key, insecure)

    def opened(
        self, authority: Path, key: ec.EllipticCurvePrivateKey, insecure: bool = False
    ) -> FleetNode:
        self.nodes.append(FleetNode(self.home.address, authority, key, insecure))
        return self.nodes[-1]

    def states(self) -> dict[int, str]:
        return {node.id: node.status for node in self.flower.nodes()}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("trust")
    home = create_home(folder / "server", ["127.0.0.1"], free_port(), utc_now())
    enroll(home, list(NAMES), POLICY, utc_now())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # for `swarm_server`
        flower = Flower(home)
        link = SuperLink(home, home.log)
        try:
            link.wait_until_ready()
            synchronize(home, flower, utc_now(), print)
            yield Server(home, flower, folder)
        finally:
            link.stop()


@pytest.fixture(autouse=True)
def _closed(server: Server) -> Iterator[None]:
    yield
    for node in server.nodes:
        node.close()
    server.nodes.clear()


def refused(call: object, *codes: int) -> bool:
    """Return whether a request is answered with one of these statuses."""
    with pytest.raises(httpx.HTTPStatusError) as error:
        call()  # type: ignore[operator]
    return error.value.response.status_code in codes


def test_a_key_that_was_not_enrolled_is_refused(server: Server) -> None:
    assert refused(server.node(new_key()).activate, 401, 412)


def test_a_device_of_another_authority_does_not_speak_to_the_server(
    server: Server, tmp_path: Path
) -> None:
    other = create_home(tmp_path / "other", ["127.0.0.1"], 8000, utc_now())
    stranger = server.opened(other.tls / "ca.crt", server.key("ann"))
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        stranger.activate()


def test_a_node_key_speaks_for_its_own_node_alone(server: Server) -> None:
    """Device A's key in device B's folder: swapped files, or a thief of one of them."""
    bob = server.node(server.key("bob"))
    bob.activate()
    swapped = server.node(server.key("ann"))
    swapped.id = bob.id
    assert refused(swapped.look, 401)
    assert refused(swapped.heartbeat, 401)
    assert refused(swapped.leave, 401)
    public = public_key_to_bytes(server.key("bob").public_key())
    asked = ActivateNodeRequest(public_key=public, heartbeat_interval=30)
    assert refused(lambda: swapped.client.ActivateNode(asked), 401)
    assert server.states()[bob.id] == "online"
    bob.leave()


def context(version: ssl.TLSVersion, server: Server) -> ssl.SSLContext:
    trusting = ssl.create_default_context(cafile=str(server.home.tls / "ca.crt"))
    trusting.set_ciphers("ALL:@SECLEVEL=0")  # this client would rather not
    trusting.minimum_version = trusting.maximum_version = version
    return trusting


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
@pytest.mark.parametrize(
    ("version", "spoken"),
    [
        (ssl.TLSVersion.TLSv1, False),
        (ssl.TLSVersion.TLSv1_1, False),
        (ssl.TLSVersion.TLSv1_2, True),
        (ssl.TLSVersion.TLSv1_3, True),
    ],
)
def test_old_versions_of_tls_are_not_spoken(
    server: Server, version: ssl.TLSVersion, spoken: bool
) -> None:
    client = context(version, server)
    with socket.create_connection(("127.0.0.1", server.home.port), 30) as raw:
        if spoken:
            with client.wrap_socket(raw, server_hostname="127.0.0.1") as link:
                assert link.version() == version.name.replace("_", ".")
        else:
            with pytest.raises(ssl.SSLError, match=r"EOF|ALERT_PROTOCOL_VERSION"):
                client.wrap_socket(raw, server_hostname="127.0.0.1")


def test_nothing_is_answered_in_the_clear(server: Server) -> None:
    with pytest.raises(httpx.TransportError):
        server.node(server.key("ann"), insecure=True).activate()
    with socket.create_connection(("127.0.0.1", server.home.port), 30) as raw:
        raw.sendall(b"POST /v1/control/list-nodes HTTP/1.1\r\ncontent-length: 0\r\n\r\n")
        assert not raw.recv(100).startswith(b"HTTP")


def test_an_agent_speaks_for_its_own_supernode(server: Server, tmp_path: Path) -> None:
    """After a SuperNode was killed: what the SuperLink thinks, and whom it does not believe."""
    bundle = read_bundle(server.home.bundles / "cleo.bundle")
    device = create_device(tmp_path / "cleo", bundle)
    bob, cleo = server.node(server.key("bob")), server.node(server.key("cleo"))
    for node in (bob, cleo):
        node.activate()
    assert refused(server.node(server.key("cleo")).activate, 412)  # its successor is turned away
    assert leave(device, bob.id)  # answered, and refused
    assert leave(device, cleo.id)
    states = server.states()
    assert (states[bob.id], states[cleo.id]) == ("online", "offline")
    assert server.node(server.key("cleo")).activate() == cleo.id
    assert leave(device, cleo.id) and leave(device, cleo.id)
    bob.leave()


def awaited(node: FleetNode, seconds: float = 120.0) -> Message:
    deadline = time.monotonic() + seconds
    while (message := node.look()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.3)
    return message


def test_flower_takes_a_reply_for_another_device_which_is_why_there_are_bonds(
    server: Server,
) -> None:
    """Ann answers in Bob's place, whose node id and message she knows; Bob then cannot.

    What an update of hers comes to is in ``test_bond``. If this fails because Flower checks authors
    now, docs/threat-model.md has a row to change.
    """
    enter_task()
    out = server.folder / "rounds.jsonl"
    ann, bob = server.node(server.key("ann")), server.node(server.key("bob"))
    for node in (ann, bob):
        node.activate()
    config = {"nodes": 2, "rounds": 1, "size": 100, "out": out}
    run = server.flower.submit(app(server.folder / "app", config), {})
    to_ann, to_bob = awaited(ann), awaited(bob)
    assert ann.push(Message(Error(1000, "no"), reply_to=to_ann))
    assert ann.answer(to_bob, b"not Bob's")
    assert not bob.answer(to_bob, b"Bob's")
    deadline = time.monotonic() + 120
    while not out.is_file():
        assert time.monotonic() < deadline
        time.sleep(0.3)
    told = json.loads(out.read_text())
    assert told["replies"] == 1 and told["authors"] == [bob.id]  # Ann's own was the error
    server.flower.stop(run)
    ann.leave()
    bob.leave()


def test_a_key_that_was_registered_and_not_recorded_is_found_again(server: Server) -> None:
    """As after a kill between the SuperLink's answer and the record of it."""
    enroll(server.home, ["dora"], POLICY, utc_now())
    public = server.folder / "dora.pub"
    public.write_text(read_registry(server.home.devices).devices["dora"].key.public + "\n")
    node, said = server.flower.register(public), list[str]()
    with pytest.raises(NetworkError, match="already in use"):
        server.flower.register(public)
    synchronize(server.home, server.flower, utc_now(), said.append)
    assert said == [f"dora: registered as node {node}"]
    dora = server.node(server.key("dora"))
    assert dora.activate() == node
    dora.leave()


def test_a_key_that_was_unregistered_is_not_taken_back(server: Server) -> None:
    """If this fails because Flower takes it now, ``enrolment`` can register it instead."""
    (bundle,) = enroll(server.home, ["emil"], POLICY, utc_now())
    public = server.folder / "emil.pub"
    public.write_text(read_bundle(bundle).node_public + "\n")
    server.flower.unregister(server.flower.register(public))
    said = list[str]()
    synchronize(server.home, server.flower, utc_now(), said.append)
    assert len(said) == 1 and "server renew emil" in said[0]


def test_a_node_that_nobody_enrolled_is_turned_away_when_the_superlink_is_told(
    server: Server,
) -> None:
    key = new_key()
    register(server.home.address, server.home.tls / "ca.crt", [key])
    stranger = server.node(key)
    node = stranger.activate()
    assert stranger.look() is None
    synchronize(server.home, server.flower, utc_now(), print)
    assert refused(stranger.look, 401)
    assert server.states()[node] == "unregistered"


def test_a_revoked_device_is_refused_at_its_next_request(server: Server) -> None:
    cleo = server.node(server.key("cleo"))
    cleo.activate()
    assert cleo.look() is None
    revoke(server.home, ["cleo"], utc_now())
    synchronize(server.home, server.flower, utc_now(), print)
    assert refused(cleo.look, 401)
    assert refused(cleo.heartbeat, 401)
    assert refused(server.node(server.key("cleo")).activate, 401, 412)
