"""The server numbers, signs and brings models, over a line that loses what it likes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from deliveries import OWNERS, PIECE, PLAN, Fleet, bring, make_artifact, make_fleet, offered, quick
from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid

from reticent.cli.main import cli
from reticent.client import deployment
from reticent.client.delivery import Recipient
from reticent.client.folder import accept_policy
from reticent.client.records import pack, unpack
from reticent.core.bundle import sign_plan
from reticent.core.errors import ArtifactError, NetworkError, ProvisionError, RunError
from reticent.core.plan import parse_plan
from reticent.core.protocol import Refusal
from reticent.core.run import Run, create_run
from reticent.server.certificates import utc_now
from reticent.server.delivery import Courier
from reticent.server.enrolment import revoke
from reticent.server.offers import (
    INSTALLED,
    REFUSED,
    SENDING,
    WAITING,
    Parcel,
    Shipment,
    last_delivery,
    prepare_shipment,
    shipments,
)
from reticent.server.registry import Device, NodeKey, Registry
from reticent.server.shipping import receivers, require_delivered
from reticent.simulations.grid import enter_task, from_bytes, numbered, to_bytes

NODE = 7


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return make_fleet(tmp_path)


def finished(fleet: Fleet, folder: Path, seed: int = 0, plan: Any = PLAN, **changes: Any) -> Run:
    """A run directory with an artifact."""
    run = create_run(folder, plan)
    make_artifact(fleet, run.artifact, seed, **({"plan_digest": plan.digest} | changes))
    return run


class Line(Grid):
    """Flower's transport in one process, with one device at its end.

    Attributes:
        away: Whether the device is not connected.
        lost: Which replies never come, by the number of their message.
        sent: Bytes of models that were sent.
        answers: What comes instead of the device's replies.
    """

    def __init__(self, fleet: Fleet) -> None:
        enter_task()
        signature = sign_plan(fleet.key("plans"), PLAN.digest)
        config = {"plan": PLAN_TEXT, "plan-signature": signature}
        place = {"device-dir": str(fleet.device.folder)}
        self.context = Context(1, NODE, place, RecordDict(), config)
        self.away, self.lost, self.sent, self.asked = False, set[int](), 0, 0
        self.answers: list[Any] = []
        self.replies: dict[str, Message] = {}

    def set_run(self, *_: Any) -> None: ...

    @property
    def run(self) -> Any: ...

    def create_message(self, *_: Any, **__: Any) -> Any: ...

    def send_and_receive(self, *_: Any, **__: Any) -> Any: ...

    def get_node_ids(self) -> Iterable[int]:
        return [] if self.away else [NODE]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            self.asked += 1
            name = str(self.asked)
            asked = numbered(from_bytes(to_bytes(numbered(message, self.asked))), self.asked)
            if "chunk" in asked.content:
                self.sent += len(unpack(asked.content, "chunk"))
            reply = self._answer(asked)
            if self.asked not in self.lost:
                self.replies[name] = reply
            yield name

    def _answer(self, asked: Message) -> Message:
        if self.answers:
            return Message(self.answers.pop(0), reply_to=asked)
        return from_bytes(to_bytes(deployment.app(message=asked, context=self.context)))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.replies.pop(i) for i in list(message_ids) if i in self.replies]


class Clock:
    """Time that passes when somebody waits."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.now += seconds


def _toml() -> str:
    import tomli_w

    from reticent.core.run import without_none

    return tomli_w.dumps(without_none(PLAN.model_dump(mode="json")))


PLAN_TEXT = _toml()


@pytest.fixture
def line(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> Line:
    monkeypatch.setattr(deployment, "Recipient", partial(Recipient, trial=quick))
    return Line(fleet)


@pytest.fixture
def shipment(fleet: Fleet, tmp_path: Path) -> Shipment:
    return prepare_shipment(fleet.home, finished(fleet, tmp_path / "run"))


def registry() -> Registry:
    key = NodeKey("public", "2026-01-01", "2027-01-01T00:00:00+00:00", NODE)
    return Registry({"pi-1": Device(0, "2026-01-01", None, (key,), NODE)})


def courier(shipment: Shipment, clock: Clock, chunk: int = PIECE, told: Any = None) -> Courier:
    tell = told if told is not None else (lambda parcels: None)
    return Courier(shipment, ("pi-1",), chunk, registry, tell, clock, clock.pause)


def deliver(shipment: Shipment, line: Line, timeout: float = 3600.0, **options: Any) -> Parcel:
    return courier(shipment, Clock(), **options).deliver(line, timeout)["pi-1"]


# ----- on the way -----


def test_a_model_comes_part_by_part(line: Line, shipment: Shipment, fleet: Fleet) -> None:
    seen: list[Parcel] = []
    assert deliver(shipment, line, told=lambda p: seen.append(p["pi-1"])).state == INSTALLED
    assert line.sent == shipment.offer.size
    assert line.asked == 1 + -(-shipment.offer.size // PIECE)
    offsets = [parcel.offset for parcel in seen if parcel.state == SENDING]
    assert offsets == sorted(offsets) and max(offsets) > PIECE
    assert fleet.models.state().version == 1
    assert deliver(shipment, line).state == INSTALLED  # again: there is nothing to send


def test_a_small_model_comes_with_its_offer(line: Line, shipment: Shipment) -> None:
    assert deliver(shipment, line, chunk=2**18).state == INSTALLED
    assert (line.asked, line.sent) == (1, shipment.offer.size)


@pytest.mark.parametrize("lost", [{1}, {2}, {3, 4}, set(range(1, 40, 2)), {7, 8}])
def test_lost_answers_cost_time_and_no_model(
    line: Line, shipment: Shipment, fleet: Fleet, lost: set[int]
) -> None:
    line.lost = lost
    assert deliver(shipment, line, timeout=1e6).state == INSTALLED
    assert fleet.models.state().version == 1


def test_a_device_that_is_revoked_on_the_way_gets_no_more_of_the_model(
    line: Line, shipment: Shipment, fleet: Fleet
) -> None:
    """Whether the SuperLink was told or not."""
    known, clock = registry(), Clock()

    def revoked(_: Any) -> None:
        if line.asked >= 3:
            known.devices["pi-1"] = replace(known.devices["pi-1"], revoked="2026-01-02")
            clock.pause(30)  # until it looks at the record again

    sender = Courier(shipment, ("pi-1",), PIECE, lambda: known, revoked, clock, clock.pause)
    assert sender.deliver(line, 600.0)["pi-1"].state == SENDING
    assert line.asked < 1 + -(-shipment.offer.size // PIECE)
    assert fleet.models.state().version == 0


def test_a_delivery_that_was_stopped_goes_on_where_it_was(
    line: Line, shipment: Shipment, fleet: Fleet
) -> None:
    line.lost = set(range(4, 100))
    first = deliver(shipment, line, timeout=60)
    assert first.state == SENDING and fleet.models.state().version == 0
    before, line.lost, line.sent = fleet.models.incoming.offset(shipment.offer), set(), 0
    assert before > first.offset > 0
    assert deliver(shipment, line).state == INSTALLED
    assert line.sent == shipment.offer.size - before


def test_who_is_away_is_waited_for_until_the_time_is_over(line: Line, shipment: Shipment) -> None:
    line.away = True
    parcel = deliver(shipment, line, timeout=20)
    assert (parcel.state, line.asked) == (WAITING, 0)
    with pytest.raises(NetworkError, match=r"not installed on pi-1 \(waiting\)"):
        require_delivered(shipment, {"pi-1": parcel})


def test_an_owner_who_wants_no_models_is_asked_once(
    line: Line, shipment: Shipment, fleet: Fleet
) -> None:
    accept_policy(fleet.device, f"{OWNERS}[delivery]\naccept = false", "test")
    parcel = deliver(shipment, line)
    assert parcel == Parcel(REFUSED, 0, Refusal.POLICY.text)
    assert (line.asked, line.sent) == (1, 0)


def test_an_owner_who_wants_none_now_is_asked_again(
    line: Line, shipment: Shipment, fleet: Fleet
) -> None:
    accept_policy(fleet.device, f"{OWNERS}[when]\nlargest_celsius = 0.001", "test")

    def told(parcels: dict[str, Parcel]) -> None:
        if line.asked == 3:
            assert parcels["pi-1"] == Parcel(WAITING, 0, Refusal.NOT_NOW.text)
            accept_policy(fleet.device, OWNERS, "test")

    assert deliver(shipment, line, told=told).state == INSTALLED


def test_damage_on_the_way_is_mended_three_times_and_not_for_ever(
    line: Line, shipment: Shipment
) -> None:
    model = shipment.folder / "model"
    model.write_bytes(model.read_bytes()[:-1] + b"!")
    parcel = deliver(shipment, line)
    assert parcel.state == REFUSED and parcel.reason == Refusal.DAMAGED.text
    assert line.sent == 3 * shipment.offer.size


@pytest.mark.parametrize(
    "answer",
    [RecordDict(), RecordDict({"receipt": pack(b"")}), RecordDict({"receipt": pack(b"\xff" * 17)})],
)
def test_answers_that_are_none_end_the_way(
    line: Line, shipment: Shipment, answer: RecordDict
) -> None:
    line.answers = [answer] * 3
    parcel = deliver(shipment, line)
    assert parcel == Parcel(REFUSED, 0, Refusal.FAILED.text)


def test_a_node_that_goes_away_is_asked_again(line: Line, shipment: Shipment) -> None:
    line.answers = [Error(3, "unavailable"), Error(4, "expired"), Error(99999, "new")]
    assert deliver(shipment, line).state == INSTALLED


# ----- numbers -----


def test_versions_count_up_and_the_same_model_keeps_its_own(fleet: Fleet, tmp_path: Path) -> None:
    one, two = finished(fleet, tmp_path / "one"), finished(fleet, tmp_path / "two", seed=1)
    assert last_delivery(fleet.home) is None
    assert [prepare_shipment(fleet.home, run).offer.version for run in (one, two, one)] == [1, 2, 1]
    assert prepare_shipment(fleet.home, one, 5).offer.version == 5  # going back
    assert prepare_shipment(fleet.home, one).offer.version == 5
    assert prepare_shipment(fleet.home, one, 1).offer.version == 1
    for taken in (2, 3, 4):
        with pytest.raises(ArtifactError, match="must be above 5"):
            prepare_shipment(fleet.home, one, taken)
    assert [s.offer.version for s in shipments(fleet.home)] == [1, 2, 5]
    last = last_delivery(fleet.home)
    assert last is not None and (last["version"], last["devices"]) == (5, {})


def test_only_what_devices_will_accept_is_offered(fleet: Fleet, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="has no artifact"):
        prepare_shipment(fleet.home, create_run(tmp_path / "none", PLAN))
    stranger = finished(fleet, tmp_path / "stranger", private_key=Ed25519PrivateKey.generate())
    with pytest.raises(ArtifactError, match="signature does not fit"):
        prepare_shipment(fleet.home, stranger)
    other = finished(fleet, tmp_path / "other", plan_digest="cd" * 32)
    with pytest.raises(ArtifactError, match="another plan"):
        prepare_shipment(fleet.home, other)
    assert shipments(fleet.home) == []


def test_a_run_of_another_plan_is_another_model(fleet: Fleet, tmp_path: Path) -> None:
    plan = parse_plan("", ["seed=9"])
    runs = [finished(fleet, tmp_path / "a"), finished(fleet, tmp_path / "b", plan=plan)]
    assert [prepare_shipment(fleet.home, run).offer.plan for run in runs] == [
        PLAN.digest,
        plan.digest,
    ]
    assert len(shipments(fleet.home)) == 2


def test_progress_is_kept_and_a_damaged_record_is_said(shipment: Shipment) -> None:
    assert shipment.progress() == {}
    parcels = {"pi-1": Parcel(SENDING, 5), "pi-2": Parcel(REFUSED, 0, "why")}
    shipment.write_progress(parcels)
    assert shipment.progress() == parcels
    assert [p.words for p in parcels.values()] == ["sending, 5 bytes", "refused: why"]
    (shipment.folder / "progress.json").write_text('{"pi-1": {"no": 1}}')
    with pytest.raises(RunError, match=r"progress\.json: damaged"):
        shipment.progress()


def test_a_damaged_offer_is_named(fleet: Fleet, shipment: Shipment) -> None:
    path = shipment.folder / "offer"
    path.write_bytes(shipment.signed[:-1])
    with pytest.raises(ArtifactError, match=r"offer: the offer is not signed") as caught:
        last_delivery(fleet.home)
    assert str(path) in str(caught.value)


def test_a_model_goes_to_devices_that_are_welcome(fleet: Fleet) -> None:
    assert receivers(fleet.home, ()) == receivers(fleet.home, ("pi-1", "pi-1")) == ("pi-1",)
    with pytest.raises(ProvisionError, match="is not enrolled"):
        receivers(fleet.home, ("pi-9",))
    revoke(fleet.home, ["pi-1"], utc_now())
    with pytest.raises(NetworkError, match="no device is enrolled"):
        receivers(fleet.home, ())


# ----- the command line -----


def run_cli(*words: str | Path) -> Any:
    return CliRunner().invoke(cli, [str(word) for word in words])


def test_predict_uses_the_installed_model_or_says_why_it_does_not(
    fleet: Fleet, tmp_path: Path
) -> None:
    files = make_artifact(fleet, tmp_path / "artifact")
    inputs = tmp_path / "artifact" / "self_test.safetensors"
    own = run_cli("predict", tmp_path / "artifact", inputs, "--key", key_of(fleet))
    none = run_cli("predict", "--dir", fleet.device.folder, inputs)
    assert isinstance(none.exception, ArtifactError) and "holds no model" in str(none.exception)
    for version in (1, 2):
        _, signed, data = offered(fleet, files, version)
        bring(fleet.recipient(), signed, data)
    there = run_cli("predict", "--dir", fleet.device.folder, inputs, "--json")
    assert len(json.loads(there.stdout)) == 2
    plain = run_cli("predict", "--dir", fleet.device.folder, inputs)
    assert plain.stdout == own.stdout != ""
    (fleet.models.path(2) / "model.json").unlink()
    fallen = run_cli("predict", "--dir", fleet.device.folder, inputs)
    assert fallen.stdout == own.stdout and "using model 1" in fallen.stderr
    back = run_cli("device", "rollback", "--dir", fleet.device.folder)
    assert back.output == "model 1 is the current one\n"
    shown = run_cli("device", "status", "--dir", fleet.device.folder)
    assert f"1 of plan {PLAN.digest[:12]}" in shown.output


def key_of(fleet: Fleet) -> Path:
    return fleet.device.key_file("artifacts")


@pytest.mark.parametrize("words", [["x"], ["x", "y", "z"], ["--dir", "d", "x", "y"]])
def test_predict_says_what_it_wants(words: list[str]) -> None:
    assert run_cli("predict", *words).exit_code == 2
    assert run_cli("predict", "--dir", "d", "--key", "k", "x").exit_code == 2


def test_a_run_without_an_artifact_is_not_delivered(fleet: Fleet, tmp_path: Path) -> None:
    run = create_run(tmp_path / "run", PLAN)
    told = run_cli("server", "deliver", run.folder, "--dir", fleet.home.folder)
    assert isinstance(told.exception, ArtifactError)
