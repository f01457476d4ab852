"""A ledger that was rolled back, copied or deleted is found out, as far as that can be."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from reticent.client import identity as identity_module
from reticent.client.identity import Identity, RolledBack, open_identity, require_met
from reticent.core.errors import LedgerError, PayloadError
from reticent.privacy.anchor import (
    BYTES,
    Signed,
    check_anchor,
    check_statement,
    countersign,
    public_hex,
    state,
)
from reticent.privacy.events import PoissonGaussian
from reticent.privacy.ledger import Budget, Head, Ledger
from reticent.server.countersign import Countersigner

EVENT = PoissonGaussian(0.1, 1.0, 1)
UNLIMITED = Budget(math.inf, 1e-5)
SERVER, STRANGER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
PAYLOAD = b"an encoded update"


class Device:
    """A device's state folder, driven as the ClientApp drives it."""

    def __init__(self, folder: Path, pinned: Ed25519PrivateKey = SERVER) -> None:
        self.folder = folder
        self.pinned = pinned

    @property
    def identity(self) -> Identity:
        return open_identity(self.folder, [self.pinned.public_key()])

    def take_part(self, round: int, anchor: bytes, run: str = "run") -> bytes:
        """Check the anchor, charge, release, and return the statement."""
        with Ledger.open(self.folder) as ledger:
            self.identity.check(ledger, anchor)
            ledger.charge("device", run, round, EVENT, UNLIMITED)
            ledger.store_release("device", run, round, PAYLOAD)
            return self.identity.statement(ledger, run, round, PAYLOAD).value

    def copy_to(self, folder: Path) -> Device:
        shutil.copytree(self.folder, folder)
        return Device(folder, self.pinned)

    def put_back(self, older: Path) -> None:
        """Put an older copy of the ledger's files in the place of the newer ones."""
        for path in self.folder.glob("ledger*"):
            path.unlink()
        for path in older.glob("ledger*"):
            shutil.copy(path, self.folder)


@pytest.fixture
def server(tmp_path: Path) -> Countersigner:
    return Countersigner.open(tmp_path / "server", SERVER)


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path / "device")


def serve(server: Countersigner, device: Device, round: int, node: int = 1) -> None:
    """One committed round with one device."""
    server.begin()
    statement = device.take_part(round, server.anchor(node))
    server.accept(node, statement, "run", round, PAYLOAD)
    server.commit()


def test_an_honest_device_is_served_round_after_round(
    server: Countersigner, device: Device
) -> None:
    assert server.anchor(1) == b""
    for round in range(1, 6):
        serve(server, device, round)
    assert len(server.anchor(1)) == BYTES
    assert Signed.decode(server.anchor(1)).head.sequence == 10  # five charges, five releases


def test_a_device_that_worked_for_another_server_in_between_is_served(
    server: Countersigner, device: Device, tmp_path: Path
) -> None:
    other = Countersigner.open(tmp_path / "other", STRANGER)
    serve(server, device, 1)
    device.take_part(1, other.anchor(1), run="elsewhere")
    serve(server, device, 2)


def test_a_device_refuses_its_own_ledger_after_a_rollback(
    server: Countersigner, device: Device, tmp_path: Path
) -> None:
    serve(server, device, 1)
    older = device.copy_to(tmp_path / "older").folder
    serve(server, device, 2)
    device.put_back(older)
    with pytest.raises(RolledBack, match="does not hold entry 4"):
        device.take_part(3, server.anchor(1))


def test_a_rolled_back_device_serves_no_other_server_either(
    server: Countersigner, device: Device, tmp_path: Path
) -> None:
    serve(server, device, 1)
    older = device.copy_to(tmp_path / "older").folder
    serve(server, device, 2)
    serve(server, device, 3)
    device.put_back(older)
    # The anchor of round 2, met with the order of round 3, is remembered beside the ledger.
    with pytest.raises(RolledBack):
        device.take_part(1, b"", run="elsewhere")


def test_a_whole_state_folder_put_back_is_refused_and_stays_refused(
    server: Countersigner, device: Device, tmp_path: Path
) -> None:
    serve(server, device, 1)
    older = device.copy_to(tmp_path / "older")
    serve(server, device, 2)
    with pytest.raises(RolledBack):
        older.take_part(3, server.anchor(1))
    with pytest.raises(RolledBack):
        older.take_part(1, b"", run="elsewhere")


def test_the_server_refuses_a_lower_head(
    server: Countersigner, device: Device, tmp_path: Path
) -> None:
    """A device that pins no server does not look at anchors; the server still sees its head."""
    careless = Device(device.folder, pinned=STRANGER)
    serve(server, careless, 1)
    older = careless.copy_to(tmp_path / "older").folder
    serve(server, careless, 2)
    serve(server, careless, 3)
    careless.put_back(older)
    with pytest.raises(PayloadError, match="older state"):
        serve(server, careless, 4)


def test_the_server_refuses_a_fork(server: Countersigner, device: Device, tmp_path: Path) -> None:
    careless = Device(device.folder, pinned=STRANGER)
    serve(server, careless, 1)
    twin = careless.copy_to(tmp_path / "twin")
    serve(server, careless, 2)
    twin_statement = twin.take_part(3, b"")  # the same number of entries, another history
    with pytest.raises(PayloadError, match="forked"):
        server.accept(1, twin_statement, "run", 3, PAYLOAD)


def test_a_fork_meets_the_anchor_of_its_twin_and_stops(
    server: Countersigner, device: Device, tmp_path: Path
) -> None:
    serve(server, device, 1)
    twin = device.copy_to(tmp_path / "twin")
    serve(server, device, 2)
    for round in range(1, 5):
        twin.take_part(round, b"", run="elsewhere")  # far ahead of the device by now
    with pytest.raises(RolledBack):
        twin.take_part(3, server.anchor(1))


def test_two_nodes_cannot_speak_for_one_device_in_a_round(
    server: Countersigner, device: Device, tmp_path: Path
) -> None:
    serve(server, device, 1)
    twin = device.copy_to(tmp_path / "twin")
    server.begin()
    server.accept(1, device.take_part(2, server.anchor(1)), "run", 2, PAYLOAD)
    with pytest.raises(PayloadError, match="copied"):
        server.accept(2, twin.take_part(2, server.anchor(2)), "run", 2, PAYLOAD)


def test_a_deleted_ledger_is_a_changed_device_key(server: Countersigner, device: Device) -> None:
    serve(server, device, 1)
    shutil.rmtree(device.folder)
    with pytest.raises(PayloadError, match=r"another device"):
        serve(server, device, 2)


def test_the_server_refuses_a_fresh_start_under_a_known_node(
    server: Countersigner, device: Device, tmp_path: Path
) -> None:
    serve(server, device, 1)
    server.begin()
    with pytest.raises(PayloadError, match="device key changed"):
        server.accept(1, Device(tmp_path / "fresh").take_part(2, b""), "run", 2, PAYLOAD)
    server.accept(1, device.take_part(2, server.anchor(1)), "run", 2, PAYLOAD)


def test_an_anchor_that_the_ledger_lacks_is_kept_even_if_a_later_one_is_held(
    server: Countersigner, device: Device
) -> None:
    """The end of a fork's shorter branch: refused at once, and ever after."""
    for round in range(1, 4):
        serve(server, device, round)
    branch = countersign(SERVER, device.identity.name, Head(3, "ab" * 32)).encode()
    for anchor in (branch, b""):
        with pytest.raises(RolledBack, match="entry 3 "):
            device.take_part(4, anchor)


def test_a_key_deleted_beside_its_anchors_is_refused(server: Countersigner, device: Device) -> None:
    serve(server, device, 1)
    serve(server, device, 2)
    (device.folder / "device.key.pem").unlink()
    with pytest.raises(LedgerError, match="is missing beside"):
        device.take_part(3, b"")


def test_a_round_that_was_not_committed_leaves_no_anchor(
    server: Countersigner, device: Device
) -> None:
    serve(server, device, 1)
    before = server.anchor(1)
    server.begin()
    server.accept(1, device.take_part(2, before), "run", 2, PAYLOAD)
    assert server.anchor(1) == before
    server.begin()  # the round is asked again
    server.accept(1, device.take_part(2, before), "run", 2, PAYLOAD)
    server.commit()
    assert Signed.decode(server.anchor(1)).head.sequence == 4


def test_anchors_outlive_the_server_process(
    server: Countersigner, device: Device, tmp_path: Path
) -> None:
    serve(server, device, 1)
    anchor = server.anchor(1)
    server.close()
    again = Countersigner.open(tmp_path / "server", SERVER)
    assert again.anchor(1) == anchor


def test_an_anchor_of_a_server_that_is_not_pinned_is_ignored(device: Device) -> None:
    device.take_part(1, b"")
    forged = countersign(STRANGER, device.identity.name, Head(99, "ab" * 32)).encode()
    device.take_part(2, forged)
    assert not (device.folder / "anchors.json").exists()


def test_an_anchor_of_another_device_is_malformed(device: Device) -> None:
    other = countersign(SERVER, public_hex(STRANGER.public_key()), Head(1, "ab" * 32)).encode()
    with pytest.raises(PayloadError, match="another device"):
        device.take_part(1, other)


def meanwhile(work: Callable[[], object]) -> None:
    """Let another thread, as another process would, do ``work``, or wait until it may."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=0.3)


def test_two_processes_that_start_at_once_have_one_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, names = identity_module.write_new, []

    def start() -> None:
        names.append(open_identity(tmp_path, []).name)

    def slowly(path: Path, data: bytes, mode: int) -> None:
        monkeypatch.setattr(identity_module, "write_new", write)
        meanwhile(start)
        write(path, data, mode)

    monkeypatch.setattr(identity_module, "write_new", slowly)
    start()
    while len(names) < 2:  # the other one has what it waited for
        threading.Event().wait(0.01)
    assert names[0] == names[1] == open_identity(tmp_path, []).name


def test_a_new_key_outlives_a_loss_of_power(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the device would be another one afterwards, and its node be refused."""
    durable: list[bool] = []
    key = tmp_path / "device.key.pem"
    monkeypatch.setattr(identity_module, "sync_folder", lambda _: durable.append(key.exists()))
    open_identity(tmp_path, [])
    assert durable == [True]
    open_identity(tmp_path, [])
    assert durable == [True]


def test_the_later_of_two_anchors_met_at_once_is_kept(
    server: Countersigner, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(server, device, 1)
    earlier = server.anchor(1)
    serve(server, device, 2)
    later = server.anchor(1)
    (device.folder / "anchors.json").unlink(missing_ok=True)
    write, threads = identity_module.write_atomic, threading.active_count()

    def meet(anchor: bytes) -> None:
        with Ledger.open(device.folder) as ledger:
            device.identity.check(ledger, anchor)

    def slowly(path: Path, data: bytes) -> None:
        monkeypatch.setattr(identity_module, "write_atomic", write)
        meanwhile(lambda: meet(later))
        write(path, data)

    monkeypatch.setattr(identity_module, "write_atomic", slowly)
    meet(earlier)
    while threading.active_count() > threads:
        threading.Event().wait(0.01)
    [(sequence, _)] = json.loads((device.folder / "anchors.json").read_text()).values()
    assert sequence == Signed.decode(later).head.sequence


def test_kept_anchors_can_be_checked_without_an_order(
    server: Countersigner, device: Device, tmp_path: Path
) -> None:
    serve(server, device, 1)
    older = device.copy_to(tmp_path / "older").folder
    serve(server, device, 2)
    serve(server, device, 3)
    with Ledger.open(device.folder) as ledger:
        require_met(ledger, device.folder)
    device.put_back(older)
    with Ledger.open(device.folder) as ledger, pytest.raises(RolledBack):
        require_met(ledger, device.folder)


def test_a_later_head_outlives_an_earlier_one_that_another_run_commits(
    server: Countersigner, device: Device, tmp_path: Path
) -> None:
    """Two runs of one server at once: what one has seen is not forgotten by the other."""
    other = Countersigner.open(tmp_path / "server", SERVER)
    server.accept(1, device.take_part(1, b""), "run", 1, PAYLOAD)
    other.accept(1, device.take_part(1, b"", run="other"), "other", 1, PAYLOAD)
    other.commit()
    server.commit()
    assert Signed.decode(server.anchor(1)).head.sequence == 4


@pytest.mark.parametrize("sequence", [2**63, 2**64 - 1])
def test_an_entry_beyond_any_ledger_is_refused_on_either_side(
    server: Countersigner, device: Device, sequence: int
) -> None:
    head = Head(sequence, "ab" * 32)
    statement = state(STRANGER, head, "run", 1, PAYLOAD).encode()
    with pytest.raises(PayloadError, match="cannot be read"):
        server.accept(1, statement, "run", 1, PAYLOAD)
    with pytest.raises(PayloadError, match="must be at most"):
        device.take_part(1, countersign(SERVER, device.identity.name, head).encode())
    assert not (device.folder / "anchors.json").exists()
    with Ledger.open(device.folder) as ledger:
        assert not ledger.contains(head)
        assert not ledger.contains(Head(-1, "ab" * 32))


DAMAGED = ["", "[]", "{", '{"a": 1}', '{"a": ["x", "y"]}', '{"a": [1e999, "y"]}', "[" * 99_999]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_file_of_anchors_is_refused(device: Device, text: str) -> None:
    device.take_part(1, b"")
    (device.folder / "anchors.json").write_text(text)
    with pytest.raises(LedgerError, match=r"anchors\.json"):
        device.take_part(2, b"")


def test_a_damaged_key_is_refused(device: Device) -> None:
    device.take_part(1, b"")
    (device.folder / "device.key.pem").write_text("no key")
    with pytest.raises(LedgerError, match=r"device\.key\.pem"):
        device.take_part(2, b"")


ALTERED: list[Callable[[Signed], Signed]] = [
    lambda s: replace(s, head=Head(s.head.sequence + 1, s.head.mac)),
    lambda s: replace(s, head=Head(s.head.sequence, "00" * 32)),
    lambda s: replace(s, signature=bytes(64)),
    lambda s: replace(s, device=public_hex(STRANGER.public_key())),
]


@pytest.mark.parametrize("alter", ALTERED)
def test_an_altered_statement_or_anchor_does_not_pass(alter: Callable[[Signed], Signed]) -> None:
    key, head = Ed25519PrivateKey.generate(), Head(3, "cd" * 32)
    statement = state(key, head, "run", 1, PAYLOAD)
    anchor = countersign(SERVER, statement.device, head)
    assert check_statement(statement, "run", 1, PAYLOAD)
    assert check_anchor(anchor, SERVER.public_key())
    assert not check_statement(alter(statement), "run", 1, PAYLOAD)
    assert not check_anchor(alter(anchor), SERVER.public_key())


def test_a_statement_is_for_one_update_of_one_round() -> None:
    key, head = Ed25519PrivateKey.generate(), Head(3, "cd" * 32)
    signed = state(key, head, "run", 1, PAYLOAD)
    assert not check_statement(signed, "run", 2, PAYLOAD)
    assert not check_statement(signed, "other", 1, PAYLOAD)
    assert not check_statement(signed, "run", 1, PAYLOAD + b"!")


def test_a_statement_cannot_be_used_as_an_anchor() -> None:
    head = Head(3, "cd" * 32)
    statement = state(SERVER, head, "run", 1, PAYLOAD)
    assert not check_anchor(statement, SERVER.public_key())


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200) | st.binary(min_size=BYTES, max_size=BYTES))
def test_hostile_statements_are_refused(data: bytes) -> None:
    try:
        signed = Signed.decode(data)
    except PayloadError:
        return
    assert not check_statement(signed, "run", 1, PAYLOAD)
    assert signed.encode() == data
