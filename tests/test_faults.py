"""Kills and damaged networks in short; ``benchmarks/faults.py`` does the same at length."""

from __future__ import annotations

import socket
import threading
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import faults
import pytest
from faulty_network import KINDS, Proxy
from kills import DEVICE, SERVER, points
from storms import gusts


@pytest.mark.faults
def test_processes_that_are_killed_at_random_change_nothing(tmp_path: Path) -> None:
    found = faults.kills(tmp_path / "all", Namespace(seed=1, kills=12, rounds=5, span=5.0))
    faults.show(found)
    assert all(found["holds"].values())


@pytest.mark.faults
def test_a_network_that_fails_all_the_time_changes_no_value(tmp_path: Path) -> None:
    settings = {"faults": 18, "rounds": 4, "devices": 3, "quorum": 2, "flapping": 0.4}
    given = Namespace(seed=1, timeout=60.0, span=4.0, **settings)
    found = faults.network(tmp_path / "all", given)
    faults.show(found)
    assert all(found["holds"].values())


@pytest.mark.faults
def test_many_nodes_at_once_are_all_served(tmp_path: Path) -> None:
    given = Namespace(nodes=30, rounds=2, idle=5.0, up=5200, down=6800)
    found = faults.nodes(tmp_path / "all", given)
    faults.show(found)
    assert all(found["holds"].values())


def test_kills_and_faults_are_those_of_their_seed_and_spread_over_the_run() -> None:
    plan = points(7, 60, 30, 2, 5.0)
    assert plan == points(7, 60, 30, 2, 5.0) != points(8, 60, 30, 2, 5.0)
    assert len(plan) == 60 and {p.target for p in plan} == {*SERVER, *DEVICE}
    assert all(sum(p.target == target for p in plan) == 20 for target in SERVER)
    assert sorted({p.round for p in plan}) == list(range(1, 30))
    storm = gusts(7, 300, 50, 5, 4.0)
    assert storm == gusts(7, 300, 50, 5, 4.0) != gusts(8, 300, 50, 5, 4.0)
    assert all(sum(g.kind == kind for g in storm) == 50 for kind in KINDS)
    assert sorted({g.round for g in storm}) == list(range(49))


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that returns what it is sent."""
    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            with listener.accept()[0] as link:
                try:
                    while data := link.recv(1000):
                        link.sendall(data)
                except OSError:
                    continue

    thread = threading.Thread(target=serve)
    thread.start()
    yield listener.getsockname()[1]
    over.set()
    with socket.create_connection(("127.0.0.1", listener.getsockname()[1])):
        pass
    thread.join()
    listener.close()


def returned(port: int, length: int = 40, wait: float = 5.0) -> bytes | None:
    """Send zeros and return what comes back until so much came; None when nothing does."""
    got = b""
    try:
        with socket.create_connection(("127.0.0.1", port), wait) as link:
            link.sendall(bytes(40))
            while len(got) < length and (data := link.recv(1000)):
                got += data
    except TimeoutError:
        return None
    except OSError:
        return b""
    return got


def ended(link: socket.socket) -> bool:
    try:
        return link.recv(10) == b""
    except ConnectionError:
        return True


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_the_proxy_does_to_a_connection_what_it_says(echo: int, kind: str | None) -> None:
    with Proxy(echo, stall=0.3, slow=0.2) as proxy:
        if kind:
            proxy.inject(kind)
        wait = 1.0 if kind == "half-open" else 5.0
        got = returned(proxy.port, 80 if kind == "duplicate" else 40, wait)
        assert proxy.befell == ({kind: 1} if kind else {})
        flipped = None if not got else sum(byte.bit_count() for byte in got)
        expected = {"cut": b"", "half-open": None, "duplicate": bytes(80)}
        if kind == "bit-flip":
            assert got is not None and len(got) == 40 and flipped == 1
        else:
            assert got == expected.get(str(kind), bytes(40))


def test_while_the_network_is_down_no_connection_lives(echo: int) -> None:
    with Proxy(echo) as proxy:
        with socket.create_connection(("127.0.0.1", proxy.port), 5) as link:
            link.sendall(b"x")
            assert link.recv(10) == b"x"
            proxy.down(True)
            assert ended(link)
        assert returned(proxy.port) == b""
        proxy.down(False)
        assert returned(proxy.port) == bytes(40)
