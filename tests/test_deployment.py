from __future__ import annotations

import hashlib
import importlib
import json
import logging
import shutil
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from numpy.typing import NDArray
from safetensors.numpy import load_file

from reticent.client import deployment as device
from reticent.client.budget import remembered_budget
from reticent.client.records import pack, unpack
from reticent.client.round import run_round
from reticent.client.training import student_model
from reticent.client.wire import noisy_step
from reticent.compression.artifact import load_artifact
from reticent.compression.codec import build_codec
from reticent.core.bundle import read_bundle, write_bundle
from reticent.core.errors import PlanError, RunError
from reticent.core.plan import Plan, parse_plan
from reticent.core.protocol import PROTOCOL, Constants, Order, Refusal
from reticent.core.run import Run, create_run
from reticent.core.seeds import numpy_generator
from reticent.core.signing import (
    PUBLIC_KEY,
    make_signing_key,
    private_key_file,
    read_private_key,
    read_public_key,
)
from reticent.core.tasks import load_task
from reticent.core.update import Layout
from reticent.privacy.anchor import countersign, public_hex
from reticent.privacy.ledger import Budget, Head, Ledger
from reticent.privacy.randomness import SeededRandomness, SystemRandomness
from reticent.privacy.schedule import Schedule, schedule_for
from reticent.server import deployment as server
from reticent.server.countersign import create_state
from reticent.server.journal import Journal
from reticent.server.optimizer import Accumulator, ServerState, apply_round
from reticent.server.preparation import prepare
from reticent.simulations.grid import enter_task
from reticent.simulations.simulate import simulate

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "deployment"
CONFIG: dict[str, Any] = {"plan": (EXAMPLE / "plan.toml").read_text()}
PLAN: Plan = parse_plan(CONFIG["plan"])
TASK = load_task(PLAN.task, PLAN.seed)


def scheduled() -> Schedule:
    schedule = schedule_for(PLAN)
    assert schedule is not None
    return schedule


def owner(folder: Path, **changed: Any) -> Context:
    """What a SuperNode hands to the app: the owner's settings and the run's configuration."""
    settings = {"state-dir": str(folder), "budget-epsilon": 8.0, "budget-delta": 1e-5}
    settings = {**settings, "partition-id": 0, **changed}
    return Context(1, 2, settings, RecordDict(), {"plan": CONFIG["plan"]})


def untrained() -> tuple[Layout, bytes, bytes]:
    """A layout, encoded constants and an encoded broadcast, as the server would make them."""
    model = student_model(TASK, PLAN)
    layout = Layout.of(model)
    constants = Constants(b"", np.zeros((0, 0), dtype=np.float32)).encode()
    codec = build_codec(PLAN.updates.broadcast)
    return layout, constants, codec.encode(layout.read(model), layout.blocks, numpy_generator(1))


LAYOUT, CONSTANTS, BROADCAST = untrained()


def order(number: int = 1, run: str = "a", scale: float = 1.0) -> Order:
    digest = hashlib.sha256(CONSTANTS).hexdigest()
    sigma = scale * scheduled().noise_multiplier
    denominator = PLAN.federation.sampling_rate * TASK.nominal_examples
    return Order(PROTOCOL, run, PLAN.digest, number, digest, sigma, denominator, scheduled().clip)


def ask(context: Context, wanted: Order, anchor: bytes = b"") -> Message:
    """Send one order through the ClientApp that a SuperNode would start."""
    enter_task()
    fields: dict[str, Any] = {**wanted.to_config()}
    content = RecordDict({"order": ConfigRecord(fields)})
    content["broadcast"], content["constants"] = pack(BROADCAST), pack(CONSTANTS)
    if anchor:
        content["anchor"] = pack(anchor)
    message = Message(content, 2, "train", group_id=str(wanted.round))
    message.metadata.__dict__["_message_id"] = "1"
    return device.app(message=message, context=context)


def released(reply: Message) -> bytes:
    assert not reply.has_error()
    assert list(reply.content) == ["update", "statement"]
    return unpack(reply.content, "update")


def decoded(payload: bytes, layout: Layout = LAYOUT) -> NDArray[np.float64]:
    return build_codec(PLAN.updates.codec).decode(payload, layout.blocks).astype(np.float64)


def noise_ratio(a: NDArray[np.float64], b: NDArray[np.float64], denominator: float) -> float:
    """How many times the planned noise two independent updates differ by."""
    planned = noisy_step(PLAN, order()).noise / denominator
    return float(np.std(a - b)) / (2**0.5 * planned)


def test_a_budget_that_is_too_small_is_refused_by_the_device(tmp_path: Path) -> None:
    reply = ask(owner(tmp_path, **{"budget-epsilon": 1.0}), order())
    assert reply.has_error()
    assert reply.error.code == Refusal.BUDGET
    assert reply.error.reason == Refusal.BUDGET.text
    with Ledger.open(tmp_path) as ledger:
        assert ledger.events("device") == []


def test_the_budget_holds_over_rounds_and_runs(tmp_path: Path) -> None:
    device_context = owner(tmp_path)
    for number in (1, 2):
        released(ask(device_context, order(number)))
    for refused in (order(1, run="b"), order(2, run="b")):
        assert ask(device_context, refused).error.code == Refusal.BUDGET
    with Ledger.open(tmp_path) as ledger:
        assert ledger.events("device") == [scheduled().over(scheduled().round_event(), 2)]
        assert 7.9 < ledger.spent("device", 1e-5) <= 8.0


def test_noise_is_the_systems_and_a_retry_sends_the_same_bytes(tmp_path: Path) -> None:
    one, two = owner(tmp_path / "one"), owner(tmp_path / "two")
    first = released(ask(one, order()))
    assert released(ask(one, order())) == first
    assert released(ask(two, order())) != first
    assert isinstance(device._environment(one).randomness, SystemRandomness)


def test_a_seeded_device_would_repeat_itself(tmp_path: Path) -> None:
    """The control of the test above: with a known seed, two devices send the same bytes."""

    def seeded(name: str) -> bytes:
        own = device._environment(owner(tmp_path / name))
        fields = {**vars(own), "randomness": SeededRandomness(0)}
        text = PLAN.canonical()
        return run_round(order(), text, CONSTANTS, BROADCAST, type(own)(**fields)).value

    assert seeded("one") == seeded("two")


@pytest.mark.parametrize(("scale", "holds"), [(1.0, True), (2 / 3, False)])
def test_updates_of_a_device_carry_the_planned_noise(
    tmp_path: Path, scale: float, holds: bool
) -> None:
    updates = [
        decoded(released(ask(owner(tmp_path / n, **{"budget-epsilon": 99.0}), order(scale=scale))))
        for n in ("one", "two")
    ]
    # Besides the noise: 2 % from the codec and a few from the batches.
    ratio = noise_ratio(updates[0], updates[1], order().denominator)
    assert (0.97 < ratio < 1.10) is holds


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("budget-epsilon", None, "budget-epsilon is absent"),
        ("budget-delta", "tiny", "budget-delta='tiny': must be float"),
        ("partition-id", True, "partition-id=True: must be int"),
        ("state-dir", 7, "state-dir=7: must be str"),
    ],
)
def test_wrong_settings_are_told_to_the_owner_and_not_to_the_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str, value: Any, said: str
) -> None:
    context = owner(tmp_path, **{key: value})
    if value is None:
        del context.node_config[key]
    with caplog.at_level(logging.ERROR):
        reply = ask(context, order())
    assert (reply.error.code, reply.error.reason) == (Refusal.FAILED, Refusal.FAILED.text)
    assert said in caplog.text


def test_why_a_round_was_not_run_is_told_to_the_owner(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "reticent.device"):
        assert ask(owner(tmp_path, **{"budget-epsilon": 1.0}), order()).error.code == 1006
    assert "round not run" in caplog.text and "budget" in caplog.text
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(("folder", "key"), [(False, False), (True, False), (True, True)])
def test_a_server_that_lost_power_while_it_made_its_state_makes_it_again(
    tmp_path: Path, folder: bool, key: bool
) -> None:
    run = create_run(tmp_path / "run", PLAN)
    if key:
        server._countersigner(run, "").close()
    elif folder:
        (run.folder / "state" / "keys").mkdir(parents=True)
    countersigner = server._countersigner(run, "")
    assert countersigner.anchor(1) == b""
    countersigner.close()


def test_a_ledger_that_cannot_be_used_is_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").write_bytes(b"not a ledger" * 100)
    assert ask(owner(tmp_path), order()).error.code == Refusal.LEDGER


def test_a_run_directory_is_resumed_but_not_shared(tmp_path: Path) -> None:
    def context(plan: str = CONFIG["plan"], folder: str = str(tmp_path / "run")) -> Context:
        return Context(1, 1, {}, RecordDict(), {"plan": plan, "run-dir": folder})

    first = server._settings(context())
    with pytest.raises(RunError, match="in use"):
        server._settings(context())
    first.close()
    server._settings(context()).close()
    with pytest.raises(RunError, match="another plan"):
        server._settings(context(CONFIG["plan"].replace("rounds = 2", "rounds = 3")))
    with pytest.raises(RunError, match="run-dir"):
        server._settings(context(folder=""))
    with pytest.raises(PlanError, match="run-config plan"):
        server._settings(context("rounds = "))


def test_a_run_that_was_stopped_while_it_was_made_is_made_again(tmp_path: Path) -> None:
    whole = create_run(tmp_path / "whole", PLAN)
    for lost in (["plan.sha256"], ["plan.sha256", "plan.toml"]):
        folder = tmp_path / str(len(lost))
        create_run(folder, PLAN)
        for name in lost:
            (folder / name).unlink()
        assert create_run(folder, PLAN).plan() == whole.plan()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "plan.toml").write_text("# somebody's\n")
    with pytest.raises(RunError, match="not empty"):
        create_run(tmp_path / "own", PLAN)


def test_a_served_run_is_no_simulation_and_a_simulation_is_not_served(tmp_path: Path) -> None:
    """What real devices have charged is in their ledgers alone: a simulation would not count it."""
    served = create_run(tmp_path / "served", PLAN)
    served.attempt.write_text("{}")
    with pytest.raises(RunError, match=r"real devices run it.*reticent server run --run"):
        simulate(PLAN, served.folder, resume=True)
    assert not served.ledger.exists()
    with pytest.raises(RunError, match="reticent server run --run"):
        served.read_summary()
    simulated = create_run(tmp_path / "simulated", PLAN)
    simulated.ledger.mkdir()
    given = {"plan": CONFIG["plan"], "run-dir": str(simulated.folder)}
    with pytest.raises(RunError, match=r"is a simulation.*reticent simulate --run"):
        server._settings(Context(1, 1, {}, RecordDict(), given))
    assert not simulated.attempt.exists()


def test_a_run_directory_never_holds_the_servers_private_key(tmp_path: Path) -> None:
    """Not even by a link, which programs that pack a directory follow."""
    key = make_signing_key(tmp_path / "server" / "keys" / "artifacts")
    run = create_run(tmp_path / "run", PLAN)
    run.keys.mkdir()  # a process died here
    for _ in range(2):
        server._use_artifact_key(run, tmp_path / "server" / "keys" / "artifacts")
    held = list(run.folder.rglob("*"))
    assert not any(path.is_symlink() for path in held)
    assert not any(b"PRIVATE" in path.read_bytes() for path in held if path.is_file())
    public = key.public_key().public_bytes_raw()
    assert read_private_key(private_key_file(run.keys)).public_key().public_bytes_raw() == public
    assert read_public_key(run.keys / PUBLIC_KEY).public_bytes_raw() == public
    shutil.rmtree(tmp_path / "server")
    assert not private_key_file(
        run.keys
    ).exists()  # a copy on another machine: nothing to sign with


def test_a_budget_with_a_window_is_the_owners_too(tmp_path: Path) -> None:
    context = owner(tmp_path, **{"budget-window-days": 30.0})
    environment = device._environment(context)
    assert environment.budget == Budget(8.0, 1e-5, 30 * 86400)
    assert environment.ledger._store.marks.time() is not None  # device time runs from here on
    released(ask(context, order()))
    assert remembered_budget(tmp_path) == environment.budget


def test_a_device_that_pins_a_server_refuses_a_ledger_that_lacks_its_anchor(
    tmp_path: Path,
) -> None:
    keys = create_state(tmp_path / "server").parent
    settings = {"server-key": str(keys / "signing_key.pub.pem"), "budget-epsilon": 99.0}
    context = owner(tmp_path / "device", **settings)
    name = public_hex(read_private_key(keys / "signing_key.pem").public_key())
    identity = device._environment(context).identity
    assert identity is not None
    assert [public_hex(key) for key in identity.servers] == [name]
    anchor = countersign(
        read_private_key(keys / "signing_key.pem"), identity.name, Head(7, "ab" * 32)
    )
    released(ask(context, order()))
    reply = ask(context, order(2), anchor=anchor.encode())
    assert (reply.error.code, reply.error.reason) == (1009, Refusal.ROLLED_BACK.text)
    # It stays so, for orders without the anchor too.
    assert ask(context, order(2)).error.code == Refusal.ROLLED_BACK


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example's module, which starts and stops everything."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    return importlib.import_module("loopback")


@pytest.mark.deployment
def test_two_devices_over_tls(tmp_path: Path, loopback: Any) -> None:
    with loopback.deployment(tmp_path / "all") as running:
        check_certificate(running)
        with stranger(running, loopback):
            words = ("--run", running.run, "--deliver")
            told = running.reticent("run", EXAMPLE / "plan.toml", *words, timeout=200)
            assert all(f"{name}: installed" in told for name in loopback.NAMES)
            check_nodes(running, loopback.NAMES)
            check_status(running, loopback.NAMES)
        check_delivery(running, loopback.NAMES[0])
        check_policy(running, loopback.NAMES)
        check_revocation(running, loopback)
    run = Run(running.run)
    check_rounds(run)
    check_artifact(run)
    check_ledgers(run, [running.device(name) / "state" for name in loopback.NAMES])


def check_certificate(running: Any) -> None:
    """The SuperLink speaks TLS, and only our own certificate authority vouches for it."""
    trusting = ssl.create_default_context(cafile=str(running.server / "tls" / "ca.crt"))
    with (
        socket.create_connection(("127.0.0.1", running.port), 10) as raw,
        trusting.wrap_socket(raw, server_hostname="localhost") as link,
    ):
        assert link.version() in {"TLSv1.2", "TLSv1.3"}
    with (
        socket.create_connection(("127.0.0.1", running.port), 10) as raw,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        ssl.create_default_context().wrap_socket(raw, server_hostname="localhost")


@contextmanager
def stranger(running: Any, loopback: Any) -> Iterator[None]:
    """Start one more SuperNode, whose key another server made."""
    # Kept apart from the others, because it is no failure if it ends.
    outsider = replace(running, processes=type(running.processes)(running.folder))
    elsewhere = replace(outsider, folder=running.folder / "elsewhere")
    elsewhere.folder.mkdir()
    port = str(running.port)  # the stranger knows where the server is, and trusts it
    outsider.processes.run("cli", "reticent", "server", "init", elsewhere.server, "--port", port)
    elsewhere.reticent("enroll", "stranger")
    bundle = read_bundle(elsewhere.server / "bundles" / "stranger.bundle")
    trusted = replace(
        bundle, ca_certificate=(running.server / "tls" / "ca.crt").read_text(), index=2
    )
    write_bundle(running.server / "bundles" / "stranger.bundle", trusted)
    try:
        loopback.start_device(outsider, "stranger")
        yield
    finally:
        outsider.processes.stop()


def agent_log(running: Any, name: str) -> str:
    return (running.device(name) / "agent.log").read_text()


REFUSED = "No SuperNode found with the given public key"


def check_nodes(running: Any, names: tuple[str, ...]) -> None:
    """The stranger was turned away, and its device was never asked anything."""
    assert REFUSED in running.processes.logs(1000)
    assert all("round not run" not in agent_log(running, name) for name in names)
    assert "SuperNode ID" not in agent_log(running, "stranger")
    listed = json.loads(running.reticent("list", "--json"))
    assert {d["name"]: d["state"] for d in listed} == dict.fromkeys(names, "online")
    assert not any((running.device("stranger") / "state").iterdir())


def check_status(running: Any, names: tuple[str, ...]) -> None:
    """Each device tells its owner what it did; the stranger's agent goes on trying."""
    for name in (*names, "stranger"):
        words = ("reticent", "device", "status", "--dir", running.device(name), "--json")
        told = json.loads(running.processes.run("cli", *words))
        assert told["rounds_released"] == (0 if name == "stranger" else 2)
        assert (told["agent"]["connection"] == "connected") is (name != "stranger")
        assert told["agent"]["state"] in {"running", "waiting"}
        assert told["refusals"] == {}
        assert told["accepts_now"]
        models = [(m["version"], m["plan"]) for m in told["model"]["installed"]]
        assert models == ([] if name == "stranger" else [(1, PLAN.digest)])


def check_delivery(running: Any, name: str) -> None:
    """A device predicts with the model that was delivered, which is the run's."""
    run = Run(running.run)
    inputs = run.artifact / "self_test.safetensors"
    words = ("reticent", "predict", "--dir", running.device(name), inputs, "--json")
    told = json.loads(running.processes.run("cli", *words))
    artifact = load_artifact(run.artifact, read_public_key(run.keys / "signing_key.pub.pem"))
    expected = artifact.predict(torch.from_numpy(load_file(inputs)["inputs"]))
    assert torch.equal(torch.tensor([one["logits"] for one in told]), expected)


def check_policy(running: Any, names: tuple[str, ...]) -> None:
    """What the owners do not allow is refused by their devices, for them to read."""
    for name in names:
        words = ("policy", "set", "limits.largest_rounds=1", "--dir", running.device(name))
        running.processes.run("cli", "reticent", "device", *words)
    quick = ("federation.retries=0", "teacher.epochs=1", "student.epochs=1")
    changes = (word for change in quick for word in ("--set", change))
    with pytest.raises(Exception, match="policy of the device's owner does not allow the plan"):
        running.reticent("run", EXAMPLE / "plan.toml", "--run", running.folder / "second", *changes)
    for name in names:
        words = ("reticent", "device", "status", "--dir", running.device(name), "--json")
        told = json.loads(running.processes.run("cli", *words))
        assert told["refusals"] == {"federation.rounds=2: limits.largest_rounds is 1": 1}
        assert told["budget"]["rounds"] == 2  # it cost nothing


def check_revocation(running: Any, loopback: Any) -> None:
    """A device that was revoked is refused from then on, and the other is not."""
    revoked, other = loopback.NAMES

    def refused() -> int:
        # Whatever comes first: it asks for messages, says that it is alive, or was starting anew.
        return running.processes.logs(10000).count('HTTP/1.1" 401')

    before = refused()
    assert "is refused from now on" in running.reticent("revoke", revoked)
    states = {d["name"]: d["state"] for d in json.loads(running.reticent("list", "--json"))}
    assert states == {revoked: "revoked", other: "online"}
    deadline = time.monotonic() + 60  # its SuperNode goes on asking, with the key it has
    while refused() == before:
        assert time.monotonic() < deadline
        time.sleep(0.5)


def check_rounds(run: Run) -> None:
    metrics = run.read_metrics()
    assert [m["round"] for m in metrics] == [1, 2]
    assert [m["replies"] for m in metrics] == [2, 2]
    assert all(m["dropped"] == {} for m in metrics)
    assert metrics[0]["bytes_constants"] > 0
    assert metrics[1]["bytes_constants"] == 0  # sent once to each node


def check_artifact(run: Run) -> None:
    summary = run.read_summary()
    artifact = load_artifact(run.artifact, read_public_key(run.keys / "signing_key.pub.pem"))
    assert artifact.manifest.plan_digest == PLAN.digest == summary["plan"]
    assert summary["rounds"] == 2
    privacy = summary["privacy"]
    assert privacy["largest_participation"] == 2
    assert 7.9 < privacy["epsilon"] <= 8.0
    assert privacy["server_epsilon"] == privacy["epsilon"]  # local trust
    assert privacy["noise_multiplier"] == scheduled().noise_multiplier


def check_ledgers(run: Run, folders: list[Path]) -> None:
    """What the devices recorded is what was planned, and their releases give the model exactly."""
    journal = Journal(run)
    identity = journal.fact("run")
    assert identity is not None
    start = prepare(PLAN, TASK, journal, print)
    payloads: list[bytes] = []
    promised = run.read_summary()["privacy"]["epsilon"]
    for folder in folders:
        with Ledger.open(folder) as ledger:
            ledger.verify()
            met = list(json.loads((folder / "anchors.json").read_text()).values())
            assert [sequence for sequence, _ in met] == [2]  # what the server saw in round 1
            assert ledger.contains(Head(*met[0]))
            assert ledger.devices() == ["device"]
            assert ledger.events("device") == [scheduled().over(scheduled().round_event(), 2)]
            assert ledger.spent("device", 1e-5) == promised
            payload = ledger.stored_release("device", identity, 2)
            assert payload is not None
            payloads.append(payload)
    assert sum(map(len, payloads)) == run.read_metrics()[1]["bytes_up"]
    updates = [decoded(p, start.layout) for p in payloads]
    assert 0.97 < noise_ratio(updates[0], updates[1], order().denominator) < 1.15
    total = Accumulator(start.layout.size)
    for update in updates:
        total.add(update.astype(np.float32))
    before = ServerState(1, **load_file(run.checkpoints / "round-000001.safetensors"))
    federation = PLAN.federation
    after = apply_round(before, total.mean(), federation.server, federation.average)
    latest = journal.latest()
    journal.close()
    assert latest is not None
    assert np.array_equal(latest.weights, after.weights)
