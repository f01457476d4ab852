from __future__ import annotations

import errno
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from reticent.core.bundle import is_signed_policy, read_bundle
from reticent.core.errors import NetworkError, ProvisionError, RunError
from reticent.core.plan import parse_plan
from reticent.core.run import create_run
from reticent.core.signing import read_public_key
from reticent.server.attempt import Attempt, Teller, error_of, read_attempt
from reticent.server.deployment import _nodes, missing_devices
from reticent.server.enrolment import KEY_DAYS, POLICY, enroll, renew, revoke, synchronize
from reticent.server.exposition import exposition
from reticent.server.flower import Flower, Node
from reticent.server.home import Home, create_home
from reticent.server.registry import changing, read_registry
from reticent.server.status import devices_status, run_status, server_status, warnings

NOW = datetime(2026, 6, 1, tzinfo=UTC)


class Link(Flower):
    """Flower's rules about nodes, without its processes."""

    def __init__(self, first: int = 100) -> None:
        self.first = first
        self.keys: dict[str, int] = {}
        self.status: dict[int, tuple[str, str | None]] = {}
        self.down = False

    def register(self, public: Path) -> int:
        if self.down:
            raise NetworkError("down")
        key = public.read_text().strip()
        if key in self.keys:
            raise NetworkError("Public key already in use")
        self.keys[key] = self.first + len(self.status)
        self.status[self.keys[key]] = ("registered", None)
        return self.keys[key]

    def unregister(self, node: int) -> None:
        if self.status[node][0] == "unregistered":
            raise NetworkError("already deleted")
        self.status[node] = ("unregistered", None)

    def node_of(self, public: str) -> Node:
        return Node(self.keys[public], *self.status[self.keys[public]])

    def nodes(self) -> list[Node]:
        return [Node(node, *state) for node, state in self.status.items()]

    def comes_online(self, node: int) -> None:
        self.status[node] = ("online", "2026-06-01 00:00:00Z")

    def admitted(self) -> set[int]:
        return {node for node, (status, _) in self.status.items() if status != "unregistered"}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return create_home(tmp_path / "server", ["127.0.0.1"], 8000, NOW)


@pytest.fixture
def link() -> Link:
    return Link()


def told(home: Home, link: Link, now: datetime = NOW) -> list[str]:
    said: list[str] = []
    synchronize(home, link, now, said.append)
    return said


def node_of(home: Home, name: str) -> int:
    node = read_registry(home.devices).devices[name].key.node
    assert node is not None
    return node


def test_a_bundle_holds_what_the_device_needs_and_the_server_keeps_no_private_half(
    home: Home,
) -> None:
    paths = enroll(home, ["a", "b"], POLICY, NOW)
    bundles = [read_bundle(path) for path in paths]
    assert [(b.name, b.index) for b in bundles] == [("a", 0), ("b", 1)]
    for bundle in bundles:
        assert bundle.address == "127.0.0.1:8000"
        assert bundle.ca_certificate == (home.tls / "ca.crt").read_text()
        assert bundle.expires == (NOW + timedelta(days=KEY_DAYS)).isoformat()
        key = serialization.load_ssh_private_key(bundle.node_key.encode(), None)
        assert key.public_key() == serialization.load_ssh_public_key(bundle.node_public.encode())
        plans = read_public_key(home.keys / "plans" / "signing_key.pub.pem")
        assert is_signed_policy(plans, bundle.policy_signature, bundle.policy)
        assert bundle.countersign_key == home.public_key()
        assert bundle.artifact_key == home.public_key("artifacts")
    assert bundles[0].node_key != bundles[1].node_key
    assert "PRIVATE" not in home.devices.read_text()
    assert home.devices.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a"], "enrolled already"),
        (["b", "b"], "enrolled already"),
        (["b", "A"], "no name for a device"),
        (["b", "../x"], "no name for a device"),
    ],
)
def test_if_one_name_cannot_be_enrolled_none_is(home: Home, names: list[str], said: str) -> None:
    enroll(home, ["a"], POLICY, NOW)
    with pytest.raises(ProvisionError, match=said):
        enroll(home, names, POLICY, NOW)
    assert list(read_registry(home.devices).devices) == ["a"]
    assert [p.name for p in home.bundles.iterdir()] == ["a.bundle"]


def test_a_file_where_a_bundle_belongs_keeps_every_name_from_being_enrolled(home: Home) -> None:
    (home.bundles / "b.bundle").write_text("of a server before")
    with pytest.raises(ProvisionError, match=r"b\.bundle: is already there"):
        enroll(home, ["a", "b"], POLICY, NOW)
    assert read_registry(home.devices).devices == {}
    assert [p.name for p in home.bundles.iterdir()] == ["b.bundle"]


def test_a_renewal_is_never_taken_for_another_devices_bundle(home: Home) -> None:
    enroll(home, ["pi", "pi-2", "pi.2"], POLICY, NOW)
    path = renew(home, "pi", POLICY, NOW)
    assert read_bundle(path).name == "pi"
    with pytest.raises(ProvisionError, match="no name for a device"):
        enroll(home, [path.stem], POLICY, NOW)


def test_the_superlink_is_told_once_and_may_have_been_down(home: Home, link: Link) -> None:
    enroll(home, ["a", "b"], POLICY, NOW)
    link.down = True
    with pytest.raises(NetworkError):
        told(home, link)
    link.down = False
    assert told(home, link) == ["a: registered as node 100", "b: registered as node 101"]
    assert told(home, link) == []
    assert link.admitted() == {100, 101}


def test_what_was_done_before_the_superlink_failed_is_not_forgotten(
    home: Home, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    enroll(home, ["a", "b"], POLICY, NOW)
    real, calls = link.register, []

    def once(public: Path) -> int:
        calls.append(public)
        if len(calls) > 1:
            raise NetworkError("gone")
        return real(public)

    monkeypatch.setattr(link, "register", once)
    with pytest.raises(NetworkError, match="gone"):
        told(home, link)
    monkeypatch.undo()
    assert told(home, link) == ["b: registered as node 101"]


def test_a_revoked_device_is_refused_for_good(home: Home, link: Link) -> None:
    enroll(home, ["a", "b"], POLICY, NOW)
    told(home, link)
    revoke(home, ["a"], NOW)
    assert "refused from now on: the device was revoked" in told(home, link)[0]
    assert link.admitted() == {101}
    assert told(home, link) == []
    with pytest.raises(ProvisionError, match="was revoked on 2026-06-01"):
        renew(home, "a", POLICY, NOW)
    with pytest.raises(ProvisionError, match="enrolled already"):
        enroll(home, ["a"], POLICY, NOW)
    with pytest.raises(ProvisionError, match="is not enrolled: a, b is"):
        revoke(home, ["c"], NOW)


def test_a_revocation_may_be_repeated_until_the_superlink_was_told(home: Home, link: Link) -> None:
    enroll(home, ["a"], POLICY, NOW)
    told(home, link)
    for days in range(3):  # the first two times it was not told
        revoke(home, ["a"], NOW + timedelta(days=days))
        assert read_registry(home.devices).devices["a"].revoked == NOW.isoformat()
    assert link.admitted() == {100}
    assert "the device was revoked" in told(home, link)[0]
    assert link.admitted() == set()


def test_an_old_key_is_admitted_until_the_device_comes_back_with_the_new_one(
    home: Home, link: Link
) -> None:
    enroll(home, ["a"], POLICY, NOW)
    told(home, link)
    link.comes_online(100)
    path = renew(home, "a", POLICY, NOW + timedelta(days=1))
    assert path.name == "a~2.bundle" and read_bundle(path).index == 0
    assert told(home, link) == ["a: registered as node 101"]
    assert link.admitted() == {100, 101}
    link.comes_online(101)
    assert "came back with its new key" in told(home, link)[0]
    assert link.admitted() == {101}
    # What was counted for the device is still counted, under its first id.
    assert read_registry(home.devices).identities() == {100: 100, 101: 100}


def test_an_expired_key_is_refused(home: Home, link: Link) -> None:
    enroll(home, ["a"], POLICY, NOW)
    told(home, link)
    end = NOW + timedelta(days=KEY_DAYS)
    assert told(home, link, end - timedelta(seconds=1)) == []
    assert "its key expired on 2027-06-01" in told(home, link, end)[0]
    assert link.admitted() == set()
    renew(home, "a", POLICY, end)
    assert told(home, link, end) == ["a: registered as node 101"]


def test_a_superlink_that_lost_its_database_is_told_again(home: Home) -> None:
    enroll(home, ["a", "b", "c"], POLICY, NOW)
    told(home, Link())
    revoke(home, ["b"], NOW)
    assert told(home, Link(200)) == ["a: registered as node 200", "c: registered as node 201"]
    assert read_registry(home.devices).identities() == {200: 100, 101: 101, 201: 102}


def unrecorded(home: Home, link: Link, name: str, status: str = "registered") -> int:
    """Register a device's key as a command does that is killed before it writes down the node."""
    node = 7 + len(link.keys)
    link.keys[read_registry(home.devices).devices[name].key.public] = node
    link.status[node] = (status, None)
    return node


def test_each_node_is_recorded_before_the_next_key_is_registered(
    home: Home, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    enroll(home, ["a", "b", "c"], POLICY, NOW)
    real, recorded = link.register, list[int]()

    def register(public: Path) -> int:
        recorded.append(len(read_registry(home.devices).by_node()))
        return real(public)

    monkeypatch.setattr(link, "register", register)
    told(home, link)
    assert recorded == [0, 1, 2]


def test_a_node_that_was_registered_and_not_recorded_is_found_again(home: Home, link: Link) -> None:
    enroll(home, ["a", "b", "c"], POLICY, NOW)
    nodes = [unrecorded(home, link, name) for name in ("a", "b")]
    assert told(home, link) == [
        f"a: registered as node {nodes[0]}",
        f"b: registered as node {nodes[1]}",
        "c: registered as node 102",
    ]
    assert [node_of(home, name) for name in ("a", "b", "c")] == [*nodes, 102]
    assert told(home, link) == [] and link.admitted() == {*nodes, 102}


def test_a_key_that_the_superlink_does_not_take_back_is_said_once_and_the_others_go_on(
    home: Home, link: Link
) -> None:
    enroll(home, ["a", "b"], POLICY, NOW)
    unrecorded(home, link, "a", "unregistered")
    said = told(home, link)
    assert "server renew a" in said[0] and said[1] == "b: registered as node 101"
    assert told(home, link) == []
    renew(home, "a", POLICY, NOW)
    assert told(home, link) == ["a: registered as node 102"]
    assert link.admitted() == {101, 102}


def test_a_device_is_revoked_also_if_its_node_was_not_recorded(home: Home, link: Link) -> None:
    enroll(home, ["a", "b"], POLICY, NOW)
    node = unrecorded(home, link, "a")
    revoke(home, ["a"], NOW)
    assert f"node {node} is refused from now on: no device" in told(home, link)[-1]
    assert link.admitted() == {node_of(home, "b")}


def test_nodes_that_nobody_enrolled_are_refused(home: Home, link: Link) -> None:
    enroll(home, ["a"], POLICY, NOW)
    told(home, link)
    link.status |= {7: ("online", "now"), 8: ("unregistered", None)}
    assert told(home, link) == ["node 7 is refused from now on: no device that is welcome has it"]
    assert link.admitted() == {100} and told(home, link) == []


def test_a_record_that_was_lost_costs_no_device_its_key(home: Home, link: Link) -> None:
    enroll(home, ["a"], POLICY, NOW)
    told(home, link)
    home.devices.rename(home.devices.with_name("kept"))
    assert told(home, link) == [] and link.admitted() == {100}
    home.devices.with_name("kept").rename(home.devices)
    assert told(home, link) == []


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"devices": {"a": {}}}', '{"devices": {"a": {"index": 0, "keys": []}}}'],
)
def test_a_damaged_record_of_devices_is_an_error_and_is_kept(home: Home, text: str) -> None:
    home.devices.write_text(text)
    with pytest.raises(ProvisionError, match="damaged"), changing(home.devices):
        pass
    assert home.devices.read_text() == text


def test_warnings_name_what_ends_soon_and_how_to_renew_it(home: Home) -> None:
    enroll(home, ["a", "b"], POLICY, NOW)
    revoke(home, ["b"], NOW)
    assert warnings(home, NOW) == []
    found = warnings(home, NOW + timedelta(days=KEY_DAYS - 10))
    assert len(found) == 2
    assert "server's certificate expires in 10 days" in found[0] and "server rotate" in found[0]
    assert "key of a expires in 10 days" in found[1] and "server renew a" in found[1]
    assert any("authority expired" in w for w in warnings(home, NOW + timedelta(days=4000)))


def test_the_status_says_where_every_device_stands(home: Home, link: Link) -> None:
    enroll(home, ["a", "b", "c", "d"], POLICY, NOW)
    told(home, link)
    link.comes_online(node_of(home, "a"))
    link.status[node_of(home, "b")] = ("offline", "2026-05-31 10:00:00Z")
    revoke(home, ["d"], NOW)
    enroll(home, ["e"], POLICY, NOW)
    found = {d["name"]: d for d in devices_status(home, link.nodes(), NOW)}
    states = {name: d["state"] for name, d in found.items()}
    assert states == {
        "a": "online",
        "b": "offline",
        "c": "never seen",
        "d": "revoked",
        "e": "not registered",
    }
    assert found["b"]["last_seen"] == "2026-05-31 10:00:00Z"
    later = NOW + timedelta(days=KEY_DAYS)
    assert {d["state"] for d in devices_status(home, link.nodes(), later)} == {"expired", "revoked"}
    assert devices_status(home, None, NOW)[0]["state"] == "unknown"
    whole = server_status(home, link.nodes(), NOW)
    json.dumps(whole)
    assert whole["superlink"] == "up" and server_status(home, None, NOW)["superlink"] == "down"
    assert [c["days"] for c in whole["certificates"]] == [3650, 365]


def test_who_is_missing_is_named(home: Home, link: Link) -> None:
    enroll(home, ["a", "b", "c"], POLICY, NOW)
    told(home, link)
    revoke(home, ["c"], NOW)
    registry = read_registry(home.devices)
    assert missing_devices(registry, [node_of(home, "a")]) == ["b"]
    assert missing_devices(registry, [node_of(home, "a"), node_of(home, "b"), 7]) == []


def test_a_run_asks_the_devices_that_are_welcome_and_no_others(
    home: Home, link: Link, tmp_path: Path
) -> None:
    enroll(home, ["a", "b", "c"], POLICY, NOW)
    told(home, link)
    a, b, c = (node_of(home, name) for name in ("a", "b", "c"))
    run = create_run(tmp_path / "run", parse_plan(""))
    nodes = _nodes(home.folder, Teller(run, "token"))
    assert nodes.welcome([7, a, b]) == [a, b]  # 7 registered itself
    assert nodes.seen([a, b]) == "; not connected: c"
    revoke(home, ["b"], NOW)  # whoever was told: nobody had to be
    assert nodes.welcome([7, a, b, c]) == [a, c]
    assert nodes.seen([a]) == "; not connected: c"
    enroll(home, ["d"], POLICY, NOW)
    told(home, link)
    assert nodes.welcome([a, node_of(home, "d")]) == [a, node_of(home, "d")]
    assert _nodes(None, Teller(run, "token")).welcome([7]) == [7]  # there is no record


METRICS: dict[str, Any] = {
    "round": 1,
    "replies": 2,
    "asked": 3,
    "dropped": {"the client failed": 1},
    "bytes_up": 10,
    "bytes_down": 20,
    "bytes_constants": 5,
    "seconds": 1.0,
    "accuracy": 0.5,
    "epsilon": 1.25,
}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"round": 1}, "dropped is absent"),
        ({**METRICS, "replies": None}, "replies=None"),
        ({**METRICS, "dropped": {"the client failed": "1"}}, "dropped={"),
        ({**METRICS, "accuracy": "most"}, "accuracy='most'"),
    ],
)
def test_a_damaged_line_of_metrics_is_named(
    tmp_path: Path, line: dict[str, Any], said: str
) -> None:
    run = create_run(tmp_path / "run", parse_plan(""))
    run.metrics.write_text(json.dumps(METRICS) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl: line 2: damaged: ") as caught:
        run_status(run)
    assert said in str(caught.value)


def test_the_status_of_a_run_adds_up_its_rounds(tmp_path: Path) -> None:
    run = create_run(tmp_path / "run", parse_plan(""))
    assert run_status(run)["state"] == "not begun"
    second = {**METRICS, "round": 2, "epsilon": None, "accuracy": None}
    run.metrics.write_text(json.dumps(METRICS) + "\n" + json.dumps(second) + "\n")
    teller = Teller(run, "token")
    teller.seen(1, "b")
    found = run_status(run)
    assert found["state"] == "running" and found["online"] == 1 and found["missing"] == "b"
    assert (found["round"], found["rounds"]) == (2, 60)
    assert (found["replies"], found["asked"], found["dropped"]) == (4, 6, {"the client failed": 2})
    assert (found["bytes_up"], found["bytes_down"]) == (20, 50)
    assert (found["epsilon"], found["accuracy"]) == (1.25, 0.5)
    teller.failed(NetworkError("too few"))
    assert run_status(run)["state"] == "failed" and run_status(run)["reason"] == "too few"


ENDED = {"rounds": 1, "stopped": {"round": 2}}


def test_a_run_that_budgets_ended_says_so_whatever_died(tmp_path: Path) -> None:
    run = create_run(tmp_path / "run", parse_plan(""))
    run.metrics.write_text(json.dumps(METRICS) + "\n")
    run.summary.write_text(json.dumps(ENDED))
    found = run_status(run)  # its ServerApp died before it could say why
    assert found["state"] == "stopped" and "ended the training after round 1" in found["reason"]
    teller = Teller(run, "token")
    assert run_status(run)["state"] == "running"  # taken up again
    teller.failed(NetworkError("round 2: too few"))
    assert (run_status(run)["state"], run_status(run)["reason"]) == ("failed", "round 2: too few")
    run.summary.write_text('{"rounds": 60}')
    assert run_status(run)["state"] == "finished"


@pytest.mark.parametrize(("trust", "up"), [("local", 12345), ("aggregator", 13000)])
def test_bytes_of_updates_are_as_coarse_as_in_the_report(
    tmp_path: Path, trust: str, up: int
) -> None:
    run = create_run(tmp_path / "run", parse_plan("", [f"privacy.trust={trust}"]))
    run.metrics.write_text(json.dumps({**METRICS, "bytes_up": 12345}) + "\n")
    assert run_status(run)["bytes_up"] == up
    assert f"reticent_bytes_up_total {up}" in exposition(run_status(run)).splitlines()


def test_the_exposition_is_what_prometheus_reads(tmp_path: Path) -> None:
    run = create_run(tmp_path / "run", parse_plan(""))
    odd = {**METRICS, "dropped": {'a "quoted" \\ reason': 1}}
    run.metrics.write_text(json.dumps(odd) + "\n")
    lines = exposition(run_status(run)).splitlines()
    assert "reticent_rounds_total 1" in lines
    assert "reticent_bytes_down_total 25" in lines
    assert "reticent_epsilon 1.25" in lines
    assert r'reticent_drops_total{reason="a \"quoted\" \\ reason"} 1' in lines
    assert not any(line.startswith("reticent_nodes_online") for line in lines)  # not known yet
    named = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    assert {line.partition("{")[0].split()[0] for line in lines if line[0] != "#"} == named


def test_why_a_run_failed_is_told_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = create_run(tmp_path / "run", parse_plan(""))
    teller = Teller(run, "token")
    teller.seen(3, "a name that is long enough to be cut")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("reticent.server.attempt.write_atomic", full)
    teller.failed(RunError("No space left on device"))
    attempt = read_attempt(run)
    assert attempt is not None and (attempt.state, attempt.code) == ("failed", 8)
    assert attempt.reason == "No space left on device" and attempt.online == 3


def test_an_attempt_of_a_process_that_is_gone_is_not_alive(tmp_path: Path) -> None:
    run = create_run(tmp_path / "run", parse_plan(""))
    assert read_attempt(run) is None
    Teller(run, "token")
    attempt = read_attempt(run)
    assert attempt is not None and attempt.token == "token" and attempt.alive()
    # The same number given to a later process is not the same process.
    assert not Attempt("token", attempt.pid, attempt.began - 1).alive()
    assert not Attempt("token", 2**22 + 1, 0).alive()


@pytest.mark.parametrize("kind", [NetworkError, ProvisionError])
def test_a_failure_is_the_same_error_on_the_other_side(tmp_path: Path, kind: type) -> None:
    run = create_run(tmp_path / "run", parse_plan(""))
    Teller(run, "token").failed(kind("why"))
    attempt = read_attempt(run)
    assert attempt is not None and not attempt.alive()
    error = error_of(attempt)
    assert (type(error), str(error), error.exit_code) == (kind, "why", kind.exit_code)


def test_a_fault_is_an_unexpected_error_on_the_other_side(tmp_path: Path) -> None:
    run = create_run(tmp_path / "run", parse_plan(""))
    Teller(run, "token").failed(KeyError("x"))
    attempt = read_attempt(run)
    assert attempt is not None
    assert error_of(attempt).exit_code == 1
    assert str(error_of(attempt)) == "unexpected KeyError: 'x'"
