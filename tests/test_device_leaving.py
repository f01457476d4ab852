"""What an agent says in the place of a SuperNode that was killed, and to whom."""

from __future__ import annotations

import http.server
import ssl
import threading
import time
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

from reticent.client import leaving
from reticent.client.folder import Device, create_device
from reticent.client.leaving import leave
from reticent.core.bundle import read_bundle
from reticent.core.errors import ProvisionError
from reticent.server.certificates import Issued, make_server, utc_now
from reticent.server.enrolment import POLICY, enroll
from reticent.server.home import Home, create_home


class SuperLink:
    """An HTTPS server that notes what it is asked; ``drips`` an answer for ever if it has one."""

    def __init__(
        self,
        home: Home,
        issued: Issued,
        version: ssl.TLSVersion | None = None,
        drips: tuple[bytes, bytes] | None = None,
    ) -> None:
        self.asked: list[tuple[str, dict[str, str], bytes]] = []
        asked = self.asked

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                asked.append((self.path, dict(self.headers), body))
                if drips is not None:
                    return self.drip(*drips)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def drip(self, head: bytes, drop: bytes) -> None:
                self.wfile.write(head)
                while drop:
                    self.wfile.write(drop)
                    time.sleep(0.05)

            def log_message(self, *_: object) -> None: ...

        class Server(http.server.ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None: ...

        for name, data in (("c.pem", issued.certificate), ("k.pem", issued.key)):
            (home.folder / name).write_bytes(data)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(home.folder / "c.pem", home.folder / "k.pem")
        if version is not None:
            context.set_ciphers("ALL:@SECLEVEL=0")
            context.minimum_version = context.maximum_version = version
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.socket = context.wrap_socket(
            self.server.socket, server_side=True, do_handshake_on_connect=False
        )
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def end(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return create_home(tmp_path / "server", ["127.0.0.1"], 8000, utc_now())


@pytest.fixture
def device(tmp_path: Path, home: Home) -> Device:
    bundle = read_bundle(enroll(home, ["pi-1"], POLICY, utc_now())[0])
    return create_device(tmp_path / "pi-1", bundle)


@pytest.fixture
def authority(home: Home) -> Issued:
    return Issued((home.tls / "ca.crt").read_bytes(), (home.tls / "ca.key").read_bytes())


@pytest.fixture
def links() -> Iterator[list[SuperLink]]:
    started: list[SuperLink] = []
    yield started
    for link in started:
        link.end()


@pytest.mark.parametrize("node", [0, 127, 128, 300, 13641992901217082758, 2**64 - 1])
def test_an_agent_says_for_its_supernode_that_it_left(
    home: Home, device: Device, authority: Issued, links: list[SuperLink], node: int
) -> None:
    """Byte for byte what Flower's own client would send, and signed as its server wants it."""
    links.append(SuperLink(home, make_server(authority, ["127.0.0.1"], utc_now())))
    assert leave(replace(device, address=f"127.0.0.1:{links[0].port}"), node)
    ((path, headers, body),) = links[0].asked
    assert path == "/v1/fleet/deactivate-node"
    assert DeactivateNodeRequest.FromString(body).node_id == node
    key = bytes_to_public_key(b64decode(headers["flwr-public-key"]))
    signed = headers["flwr-timestamp"].encode()
    assert verify_signature(key, signed, b64decode(headers["flwr-signature"]))
    assert not verify_signature(key, signed + b"0", b64decode(headers["flwr-signature"]))


@pytest.mark.parametrize(
    ("head", "drop", "left"),
    [
        (b"HTTP/1.1 200 OK\r\n", b"x", True),
        (b"HTTP/1.1 503 Busy\r\n", b"x", False),
        (b"HTTP/1.1 ", b"2", False),
        (b"SSH-2.0\r\n", b"x", False),
        (b"x" * 10000, b"x" * 1000, False),
        (b"HTTP/1.1 2", b"", False),
    ],
)
def test_a_server_that_drips_does_not_hold_an_agent_up(
    home: Home,
    device: Device,
    authority: Issued,
    links: list[SuperLink],
    monkeypatch: pytest.MonkeyPatch,
    head: bytes,
    drop: bytes,
    left: bool,
) -> None:
    monkeypatch.setattr(leaving, "SECONDS", 2.0)
    issued = make_server(authority, ["127.0.0.1"], utc_now())
    links.append(SuperLink(home, issued, drips=(head, drop)))
    answers: list[bool] = []
    address = f"127.0.0.1:{links[0].port}"
    agent = threading.Thread(
        target=lambda: answers.append(leave(replace(device, address=address), 7)), daemon=True
    )
    agent.start()
    agent.join(10.0)
    assert answers == [left]


def test_a_server_that_the_bundle_does_not_vouch_for_is_told_nothing(
    tmp_path: Path, home: Home, device: Device, authority: Issued, links: list[SuperLink]
) -> None:
    """Not one of another authority, with another name, or whose certificate has expired."""
    other = create_home(tmp_path / "other", ["127.0.0.1"], 8000, utc_now())
    strange = Issued((other.tls / "ca.crt").read_bytes(), (other.tls / "ca.key").read_bytes())
    old = utc_now() - timedelta(days=400)
    for issued in (
        make_server(strange, ["127.0.0.1"], utc_now()),
        make_server(authority, ["server.example"], utc_now()),
        make_server(authority, ["127.0.0.1"], old),
    ):
        links.append(SuperLink(home, issued))
        assert not leave(replace(device, address=f"127.0.0.1:{links[-1].port}"), 7)
        assert links[-1].asked == []
    assert not leave(replace(device, address="127.0.0.1:1"), 7)  # nobody listens


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_a_device_does_not_speak_old_versions_of_tls(
    home: Home,
    device: Device,
    authority: Issued,
    links: list[SuperLink],
    version: ssl.TLSVersion,
) -> None:
    with pytest.warns(DeprecationWarning, match="TLSVersion"):
        links.append(SuperLink(home, make_server(authority, ["127.0.0.1"], utc_now()), version))
    assert not leave(replace(device, address=f"127.0.0.1:{links[0].port}"), 7)
    assert links[0].asked == []


def test_a_bundle_with_another_devices_node_key_makes_no_folder(tmp_path: Path, home: Home) -> None:
    paths = enroll(home, ["pi-2", "pi-3"], POLICY, utc_now())
    two, three = map(read_bundle, paths)
    with pytest.raises(ProvisionError, match="pi-3: the bundle's node key is another device's"):
        create_device(tmp_path / "mixed", replace(three, node_key=two.node_key))
    assert not (tmp_path / "mixed").exists()
