"""The gate: nothing but one encoded update or one fixed refusal leaves a device."""

from __future__ import annotations

import ast
import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reticent.client.app import Outgoing, acknowledge, build_client_app, egress, gate
from reticent.client.environment import Environment
from reticent.client.order import Refused
from reticent.client.records import pack, unpack
from reticent.compression.codec import build_codec
from reticent.core.errors import DataError, LedgerError, PayloadError, PrivacyError
from reticent.core.plan import Plan, parse_plan
from reticent.core.protocol import PROTOCOL, Constants, Order, Refusal
from reticent.core.seeds import numpy_generator
from reticent.core.tasks import Examples
from reticent.core.update import Layout
from reticent.privacy.events import PoissonGaussian
from reticent.privacy.ledger import Budget, Ledger
from reticent.privacy.randomness import SeededRandomness
from reticent.privacy.release import PUBLIC_KINDS, Public, Released
from reticent.simulations.grid import enter_task, to_bytes

SECRET = "patient-4711-is-ill"
NO_DATA_CLIENT = 3


class SmallTask:
    """Six random examples a client; one client's data cannot be loaded."""

    name, classes, input_shape, clients, nominal_examples = "small", 3, (4,), 4, 6

    def public(self) -> Examples:
        return self._drawn(100)

    def test(self) -> Examples:
        return self._drawn(101)

    def client(self, index: int) -> Examples:
        if index == NO_DATA_CLIENT:
            raise DataError(f"/home/{SECRET}/images: cannot be read")
        return self._drawn(index)

    def teacher(self) -> nn.Module:
        return nn.Linear(4, 3)

    def student(self, model: str) -> nn.Module:
        return nn.Linear(4, 3)

    def _drawn(self, seed: int) -> Examples:
        rng = numpy_generator(seed, "small")
        inputs = rng.standard_normal((6, 4)).astype(np.float32)
        return Examples(torch.from_numpy(inputs), torch.from_numpy(rng.integers(3, size=6)))


def make_task(section: object, seed: int) -> SmallTask:
    """What the plan of these tests names."""
    return SmallTask()


PLAN_TEXT = f"""
[task]
name = "{__name__}:make_task"
clients = 4
[student]
distill = {{ kind = "none" }}
prune = {{ kind = "none" }}
quantize = {{ kind = "none" }}
[federation]
rounds = 5
clients_per_round = 4
[updates]
codec = ["identity"]
broadcast = ["identity"]
"""
PRIVATE = parse_plan(PLAN_TEXT, ["privacy.noise_multiplier=1.0"])
OPEN = parse_plan(PLAN_TEXT, ["privacy=off"])
LAYOUT = Layout.of(nn.Linear(4, 3))
CONSTANTS = Constants(b"", np.zeros((0, 0), dtype=np.float32)).encode()
BROADCAST = build_codec(("identity",)).encode(
    np.zeros(LAYOUT.size, dtype=np.float32), LAYOUT.blocks, numpy_generator(0)
)
UNLIMITED = Budget(math.inf, 1e-5)
EVENT = PoissonGaussian(0.1, 1.0, 1)


def order_of(plan: Plan = PRIVATE, /, **changes: Any) -> dict[str, Any]:
    digest = hashlib.sha256(CONSTANTS).hexdigest()
    noise = 1.0 if plan.private else 0.0
    clip = plan.private.clip if plan.private else 0.0
    order = Order(PROTOCOL, "run", plan.digest, 1, digest, noise, 0.6, clip)
    return {**order.to_config(), **changes}


def message_of(content: RecordDict | None = None) -> Message:
    enter_task()
    message = Message(content or RecordDict(), 2, "train", group_id="1")
    message.metadata.__dict__["_message_id"] = "1"
    return message


def content_of(order: dict[str, Any], **records: Any) -> RecordDict:
    given = {"broadcast": pack(BROADCAST), "constants": pack(CONSTANTS), **records}
    content = RecordDict({k: v for k, v in given.items() if v is not None})
    content["order"] = ConfigRecord(order)
    return content


class Device:
    """A ClientApp with a real ledger, as one client of the plan."""

    def __init__(self, folder: Path, plan: Plan = PRIVATE) -> None:
        self.ledger = Ledger.open(folder)
        self.budget = UNLIMITED
        self.client = 0
        self.state = RecordDict()
        self.app: ClientApp = build_client_app(self.environment, lambda _: plan.canonical())

    def environment(self, _: Context) -> Environment:
        randomness = SeededRandomness(0)
        return Environment(self.client, "device", self.ledger, self.budget, randomness, False)

    def ask(self, content: RecordDict) -> Message:
        context = Context(1, 2, {}, self.state, {})
        return self.app(message=message_of(content), context=context)


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


def refusal(reply: Message) -> Refusal:
    assert reply.has_error() and not reply.has_content()
    code = Refusal(reply.error.code)
    assert reply.error.reason == code.text
    return code


def through_gate(act: Callable[[Message], Message]) -> Message:
    message = message_of()
    context = Context(1, 2, {}, RecordDict(), {})
    return gate(message, context, lambda asked, _: act(asked))


def reply_with(content: RecordDict) -> Message:
    return through_gate(lambda asked: Message(content, reply_to=asked))


def array(data: bytes, **changes: Any) -> Array:
    return Array(
        **{"dtype": "uint8", "shape": (len(data),), "stype": "custom", **changes}, data=data
    )


names = st.sampled_from(["update", "payload", "metrics", "", "Update", "order"]) | st.text(
    max_size=5
)
arrays = st.dictionaries(names, st.binary(max_size=8).map(array), max_size=3).map(ArrayRecord)
numbers = st.integers(-(2**62), 2**62) | st.floats(allow_nan=False)
metrics = st.dictionaries(names, numbers, max_size=3).map(lambda d: MetricRecord({**d}))
configs = st.dictionaries(names, st.text(max_size=5) | st.binary(max_size=5), max_size=3).map(
    lambda d: ConfigRecord({**d})
)
contents = st.dictionaries(names, arrays | metrics | configs, max_size=3)


@settings(max_examples=300, deadline=None)
@given(contents)
def test_no_record_passes_whatever_its_name_and_kind(records: dict[str, Any]) -> None:
    assert refusal(reply_with(RecordDict(records))) is Refusal.NOT_RELEASED


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=1, max_size=200))
def test_the_very_bytes_of_a_release_do_not_pass_unless_they_are_released(payload: bytes) -> None:
    """The record that a real reply consists of, made by hand: nobody was charged for it."""
    forged = RecordDict({"update": pack(payload)})
    assert refusal(reply_with(forged)) is Refusal.NOT_RELEASED
    genuine = through_gate(lambda asked: egress(asked, Released(payload, EVENT)))
    assert list(genuine.content) == ["update"]
    assert unpack(genuine.content, "update") == payload


@settings(max_examples=100, deadline=None)
@given(contents.filter(bool), st.binary(min_size=1, max_size=20))
def test_a_record_beside_a_release_stops_it(records: dict[str, Any], payload: bytes) -> None:
    def add(asked: Message) -> Message:
        reply = egress(asked, Released(payload, EVENT))
        reply.content.update(records)
        return reply

    assert refusal(through_gate(add)) is Refusal.NOT_RELEASED


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=1, max_size=50), st.binary(max_size=50))
def test_a_public_value_travels_beside_the_release(payload: bytes, words: bytes) -> None:
    statement = Public(words, "statement")
    reply = through_gate(lambda asked: egress(asked, Released(payload, EVENT), statement))
    assert list(reply.content) == ["update", "statement"]
    assert unpack(reply.content, "update") == payload
    assert unpack(reply.content, "statement") == words


@pytest.mark.parametrize("raw", [b"raw", SECRET, {"loss": 0.3}, torch.zeros(3), None])
def test_egress_takes_nothing_that_is_not_wrapped(raw: Any) -> None:
    with pytest.raises(TypeError, match="Released"):
        egress(message_of(), raw)
    if raw is not None:
        with pytest.raises(TypeError, match="Public"):
            egress(message_of(), Released(b"x", EVENT), raw)
    assert refusal(through_gate(lambda asked: egress(asked, raw))) is Refusal.FAILED


def test_an_empty_release_does_not_pass() -> None:
    reply = through_gate(lambda asked: egress(asked, Released(b"", EVENT)))
    assert refusal(reply) is Refusal.NOT_RELEASED


@pytest.mark.parametrize("raw", [SECRET, 7, bytearray(b"x"), [SECRET], {"loss": 0.3}])
def test_a_wrapped_value_that_is_not_bytes_does_not_pass(raw: Any) -> None:
    for update, statement in (
        (Released(raw, EVENT), None),
        (Released(b"x", EVENT), Public(raw, "statement")),
    ):
        reply = through_gate(lambda asked, u=update, s=statement: egress(asked, u, s))
        assert refusal(reply) is Refusal.NOT_RELEASED
        assert SECRET.encode() not in to_bytes(reply)


@pytest.mark.parametrize("reply", [None, SECRET, RecordDict()])
def test_what_is_no_reply_at_all_is_a_refusal(reply: Any) -> None:
    assert refusal(through_gate(lambda _: reply)) is Refusal.FAILED


def test_a_public_value_of_an_undeclared_kind_cannot_be_made() -> None:
    with pytest.raises(PrivacyError, match="'accuracy': must be one of statement, receipt"):
        Public(b"0.93", "accuracy")
    assert set(PUBLIC_KINDS) == {"statement", "receipt"}


def makers(name: str) -> list[str]:
    """The source files that call the class ``name``."""
    root = Path(__file__).resolve().parent.parent
    folders = ("core", "compression", "privacy", "client", "server", "simulations", "cli")
    found: list[str] = []
    for path in (path for folder in folders for path in (root / folder).rglob("*.py")):
        calls = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call))
        if any(isinstance(call.func, ast.Name) and call.func.id == name for call in calls):
            found.append(path.relative_to(root).as_posix())
    return sorted(found)


def test_released_and_public_values_are_made_in_one_place_each() -> None:
    assert makers("Released") == ["client/reticent/client/round.py"]
    assert makers("Public") == [
        "client/reticent/client/delivery.py",
        "client/reticent/client/identity.py",
    ]
    assert makers("Outgoing") == makers("Acknowledgement") == ["client/reticent/client/app.py"]


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=17, max_size=17))
def test_a_receipt_travels_alone_and_has_one_length(told: bytes) -> None:
    reply = through_gate(lambda asked: acknowledge(asked, Public(told, "receipt")))
    assert list(reply.content) == ["receipt"]
    assert unpack(reply.content, "receipt") == told
    for wrong in (
        Public(told + b"x", "receipt"),
        Public(told, "statement"),
        Public(bytearray(told), "receipt"),
        Released(told, EVENT),
        told,
    ):
        refused = through_gate(lambda asked, w=wrong: acknowledge(asked, w))  # pyright: ignore
        assert refusal(refused) is Refusal.NOT_RELEASED


def test_a_record_beside_a_receipt_stops_it() -> None:
    def add(asked: Message) -> Message:
        reply = acknowledge(asked, Public(bytes(17), "receipt"))
        reply.content["loss"] = MetricRecord({"loss": 0.3})
        return reply

    assert refusal(through_gate(add)) is Refusal.NOT_RELEASED


def test_what_the_gate_wraps_carries_no_words_of_the_app() -> None:
    class Talkative(Outgoing):
        def __init__(self) -> None:
            super().__init__(Released(b"bytes", EVENT), None)
            self.note = SECRET

    reply = through_gate(lambda asked: Message(Talkative(), reply_to=asked))
    assert dict(reply.content) == {"update": ConfigRecord({"payload": b"bytes"})}
    assert SECRET.encode() not in to_bytes(reply)


@pytest.mark.parametrize(
    "act",
    [
        lambda asked: egress(asked, Released(b"update", EVENT)),
        lambda asked: acknowledge(asked, Public(bytes(17), "receipt")),
        lambda asked: Message(RecordDict(), reply_to=asked),
    ],
)
def test_when_a_reply_was_made_is_not_told(act: Callable[[Message], Message]) -> None:
    asked = message_of()
    asked.metadata.created_at, asked.metadata.ttl = 1.7e9 + 0.25, 600.0
    replied = gate(asked, Context(1, 2, {}, RecordDict(), {}), lambda m, _: act(m)).metadata
    assert (replied.created_at, replied.ttl) == (1.7e9 + 0.25, 600.0)
    assert replied.reply_to_message_id == asked.metadata.message_id


def test_an_error_of_the_apps_own_making_does_not_leave() -> None:
    reply = through_gate(lambda asked: Message(Error(7, SECRET), reply_to=asked))
    assert refusal(reply) is Refusal.NOT_RELEASED
    assert SECRET.encode() not in to_bytes(reply)


class Unheard(Exception):
    """A type that the gate cannot know."""


RAISED = [
    (ValueError, Refusal.FAILED),
    (KeyError, Refusal.FAILED),
    (RuntimeError, Refusal.FAILED),
    (MemoryError, Refusal.FAILED),
    (OSError, Refusal.FAILED),
    (AssertionError, Refusal.FAILED),
    (StopIteration, Refusal.FAILED),
    (Unheard, Refusal.FAILED),
    (PayloadError, Refusal.FAILED),
    (LedgerError, Refusal.FAILED),
    (DataError, Refusal.NO_DATA),
]


@pytest.mark.parametrize(("kind", "expected"), RAISED)
def test_the_text_of_an_exception_stays(kind: type[Exception], expected: Refusal) -> None:
    def fail(_: Message) -> Message:
        raise kind(SECRET) from ValueError(SECRET)

    reply = through_gate(fail)
    assert refusal(reply) is expected
    assert SECRET.encode() not in to_bytes(reply)


@pytest.mark.parametrize(("kind", "expected"), RAISED)
def test_the_gate_is_around_the_whole_app(kind: type[Exception], expected: Refusal) -> None:
    def environment(_: Context) -> Environment:
        raise kind(SECRET)

    app = build_client_app(environment, lambda _: PRIVATE.canonical())
    context = Context(1, 2, {}, RecordDict(), {})
    reply = app(message=message_of(content_of(order_of())), context=context)
    assert refusal(reply) is expected
    assert SECRET.encode() not in to_bytes(reply)


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=30), st.sampled_from(list(Refusal)))
def test_a_refusal_is_the_same_whatever_its_cause(text: str, code: Refusal) -> None:
    def refuse(cause: str) -> Error:
        def fail(_: Message) -> Message:
            raise Refused(code) from ValueError(cause)

        return through_gate(fail).error

    first, second = refuse(text), refuse(SECRET)
    assert (first.code, first.reason) == (second.code, second.reason) == (int(code), code.text)


def test_a_good_order_is_answered_and_charged_once(device: Device) -> None:
    reply = device.ask(content_of(order_of()))
    vector = build_codec(("identity",)).decode(unpack(reply.content, "update"), LAYOUT.blocks)
    assert vector.any()
    again = device.ask(content_of(order_of(), constants=None))  # the constants were kept
    assert unpack(again.content, "update") == unpack(reply.content, "update")
    assert len(device.ledger.events("device")) == 1


BAD_ORDERS: list[tuple[dict[str, Any], Refusal]] = [
    ({"protocol": PROTOCOL + 1}, Refusal.BAD_ORDER),
    ({"protocol": "1"}, Refusal.BAD_ORDER),
    ({"round": 0}, Refusal.BAD_ORDER),
    ({"round": 2**31}, Refusal.BAD_ORDER),
    ({"round": 2**62}, Refusal.BAD_ORDER),
    ({"run": ""}, Refusal.BAD_ORDER),
    ({"run": "r" * 257}, Refusal.BAD_ORDER),
    ({"round": 1.0}, Refusal.BAD_ORDER),
    ({"round": True}, Refusal.BAD_ORDER),
    ({"run": 5}, Refusal.BAD_ORDER),
    ({"noise_multiplier": math.nan}, Refusal.BAD_ORDER),
    ({"noise_multiplier": math.inf}, Refusal.BAD_ORDER),
    ({"noise_multiplier": -1.0}, Refusal.BAD_ORDER),
    ({"noise_multiplier": 0.0}, Refusal.BAD_ORDER),
    ({"noise_multiplier": 1}, Refusal.BAD_ORDER),
    ({"noise_multiplier": 1e-300}, Refusal.BAD_ORDER),
    ({"noise_multiplier": 1e300}, Refusal.BAD_ORDER),
    ({"denominator": 0.0}, Refusal.BAD_ORDER),
    ({"denominator": math.nan}, Refusal.BAD_ORDER),
    ({"extra": 1}, Refusal.BAD_ORDER),
    ({"plan": "0" * 64}, Refusal.WRONG_PLAN),
    ({"plan": OPEN.digest}, Refusal.WRONG_PLAN),
    ({"constants": "0" * 64}, Refusal.CONSTANTS_MISSING),
]


@pytest.mark.parametrize(("changes", "expected"), BAD_ORDERS)
def test_a_bad_order_is_refused_and_not_charged(
    device: Device, changes: dict[str, Any], expected: Refusal
) -> None:
    assert refusal(device.ask(content_of(order_of(**changes)))) is expected
    assert device.ledger.events("device") == []


@pytest.mark.parametrize("key", sorted(order_of()))
def test_an_order_that_lacks_a_key_is_refused(device: Device, key: str) -> None:
    order = {k: v for k, v in order_of().items() if k != key}
    assert refusal(device.ask(content_of(order))) is Refusal.BAD_ORDER


def test_noise_is_refused_where_the_plan_has_none(tmp_path: Path) -> None:
    device = Device(tmp_path, OPEN)
    noisy = content_of(order_of(OPEN, noise_multiplier=1.0))
    assert refusal(device.ask(noisy)) is Refusal.BAD_ORDER
    assert device.ask(content_of(order_of(OPEN))).has_content()  # the same order without noise


MISSING: list[tuple[dict[str, Any], Refusal]] = [
    ({"constants": None}, Refusal.CONSTANTS_MISSING),
    ({"broadcast": None}, Refusal.BAD_ORDER),
    ({"broadcast": ArrayRecord({"other": array(b"x")})}, Refusal.BAD_ORDER),
    ({"broadcast": pack(BROADCAST[:-1])}, Refusal.BAD_BROADCAST),
    ({"broadcast": pack(BROADCAST[:-1] + b"\x7f")}, Refusal.BAD_BROADCAST),
    ({"broadcast": pack(b"no codec made this")}, Refusal.BAD_BROADCAST),
    ({"constants": pack(CONSTANTS + b" ")}, Refusal.CONSTANTS_MISSING),
]


@pytest.mark.parametrize(("records", "expected"), MISSING)
def test_a_message_with_broken_records_is_refused_and_not_charged(
    device: Device, records: dict[str, Any], expected: Refusal
) -> None:
    assert refusal(device.ask(content_of(order_of(), **records))) is expected
    assert device.ledger.events("device") == []


def test_a_message_without_an_order_is_refused(device: Device) -> None:
    assert refusal(device.ask(RecordDict({"broadcast": pack(BROADCAST)}))) is Refusal.BAD_ORDER


def test_constants_of_the_right_digest_that_cannot_be_read_are_refused(device: Device) -> None:
    garbage = b"not safetensors"
    order = order_of(constants=hashlib.sha256(garbage).hexdigest())
    reply = device.ask(content_of(order, constants=pack(garbage)))
    assert refusal(reply) is Refusal.BAD_BROADCAST


def test_soft_labels_that_lack_a_label_tell_nothing_about_a_batch(tmp_path: Path) -> None:
    """Training would fail exactly on the batches that hold the label: a refusal that is a leak."""
    plan = parse_plan(
        PLAN_TEXT,
        [
            "privacy.noise_multiplier=1.0",
            'privacy.trust="local"',
            "student.distill.local_weight=0.5",
            "federation.sampling_rate=1.0",
        ],
    )
    device = Device(tmp_path, plan)
    for rows in (1, 2):
        table = Constants(b"", np.full((rows, rows), 0.5, dtype=np.float32)).encode()
        order = order_of(plan, constants=hashlib.sha256(table).hexdigest())
        reply = device.ask(content_of(order, constants=pack(table)))
        assert refusal(reply) is Refusal.BAD_BROADCAST
        assert device.ledger.events("device") == []


def test_constants_of_another_digest_are_not_kept(device: Device) -> None:
    device.ask(content_of(order_of(), constants=pack(b"forged")))
    assert "constants" not in device.state
    assert refusal(device.ask(content_of(order_of(), constants=None))) is Refusal.CONSTANTS_MISSING


def test_over_budget_is_refused_and_nothing_is_charged(device: Device) -> None:
    assert device.ask(content_of(order_of())).has_content()
    spent = device.ledger.spent("device", 1e-5)
    device.budget = Budget(spent * 1.0001, 1e-5)
    reply = device.ask(content_of(order_of(round=2)))
    assert refusal(reply) is Refusal.BUDGET
    assert device.ledger.spent("device", 1e-5) == spent
    assert len(device.ledger.events("device")) == 1
    device.budget = replace(device.budget, epsilon=10 * spent)
    assert device.ask(content_of(order_of(round=2))).has_content()


def test_a_round_that_was_paid_for_is_not_asked_for_with_less_noise(device: Device) -> None:
    assert device.ask(content_of(order_of())).has_content()
    assert refusal(device.ask(content_of(order_of(noise_multiplier=0.5)))) is Refusal.LEDGER


def test_data_that_cannot_be_loaded_are_no_data(device: Device) -> None:
    device.client = NO_DATA_CLIENT
    reply = device.ask(content_of(order_of()))
    assert refusal(reply) is Refusal.NO_DATA
    assert SECRET.encode() not in to_bytes(reply)
