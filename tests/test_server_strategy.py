"""The strategy: broken replies are dropped with a reason, and the round goes on."""

from __future__ import annotations

import hashlib
import struct
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from torch import nn

from reticent.client.records import pack, unpack
from reticent.compression.codec import build_codec
from reticent.core.errors import NetworkError, PlanError
from reticent.core.plan import Plan, parse_plan
from reticent.core.protocol import Constants, Order, Refusal
from reticent.core.seeds import numpy_generator
from reticent.core.update import Layout, Vector
from reticent.privacy.anchor import Signed, state
from reticent.privacy.ledger import Head
from reticent.privacy.schedule import participations, schedule_for
from reticent.server.countersign import Countersigner
from reticent.server.optimizer import ServerState, apply_round
from reticent.server.reasons import Unusable
from reticent.server.rounds import BudgetsSpent, RoundPlan, Tally, farthest
from reticent.server.strategy import Opened, PrivateAveraging
from reticent.simulations.grid import InProcessGrid, enter_task, node_of

CONSTANTS = Constants(b"", np.zeros((0, 0), dtype=np.float32)).encode()
LAYOUT = Layout.of(nn.Linear(8, 4))
CODEC = build_codec(("identity",))
Answer = Callable[[Message], list[Message]]


def plan_of(clients: int, per_round: int, rounds: int, *overrides: str) -> Plan:
    given = [
        f"task.clients={clients}",
        f"federation.clients_per_round={per_round}",
        f"federation.rounds={rounds}",
        'updates.codec=["identity"]',
        'updates.broadcast=["identity"]',
        "privacy.noise_multiplier=1.0",
    ]
    return parse_plan("", [*given, *overrides])


class Script:
    """Answers each message as a function says, and remembers what was asked."""

    window = 3

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.asked: list[tuple[int, int, bool]] = []

    def answer(self, messages: list[Message]) -> Iterator[Message]:
        for message in messages:
            first = "constants" in message.content
            self.asked.append((round_in(message), message.metadata.dst_node_id, first))
            yield from self._answer(message)

    def nodes(self, number: int) -> list[int]:
        return [node for asked, node, _ in self.asked if asked == number]

    def informed(self, number: int) -> set[int]:
        return {node for asked, node, first in self.asked if asked == number and first}


class Federation:
    """A strategy on a grid with a scripted backend."""

    def __init__(
        self,
        plan: Plan,
        answer: Answer,
        countersigner: Countersigner | None = None,
        opened: Opened = tuple,
    ) -> None:
        enter_task()
        self.script = Script(answer)
        self.grid = InProcessGrid(plan.task.clients, self.script)
        self.tallies: list[Tally] = []
        self.states: list[ServerState] = []
        digest = hashlib.sha256(CONSTANTS).hexdigest()
        self.rounds = RoundPlan("run", schedule_for(plan), 10.0, LAYOUT, CONSTANTS, digest)
        self.start = ServerState.begin(np.linspace(-1, 1, LAYOUT.size, dtype=np.float32))
        self.strategy = PrivateAveraging(
            plan, self.rounds, self.start, self._commit, None, countersigner, opened
        )

    def _commit(self, state: ServerState, tally: Tally, seconds: float) -> None:
        self.states.append(state)
        self.tallies.append(tally)

    def run(self) -> Tally:
        """Run every round and return what arrived in the last."""
        self.strategy.start(self.grid)
        return self.tallies[-1]


@pytest.mark.parametrize("first", [[], ["federation.enough=7", "federation.min_replies=5"]])
def test_messages_are_made_as_a_lazy_grid_takes_them(
    first: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many are there does not depend on the cohort, and nothing else on when they were made."""
    made: list[weakref.ref[Message]] = []
    alive: list[int] = []
    make = PrivateAveraging._messages

    def watched(*arguments: Any) -> Iterator[Message]:
        for message in make(*arguments):
            made.append(weakref.ref(message))
            yield message

    def answer(message: Message) -> list[Message]:
        alive.append(sum(one() is not None for one in made))
        return honest(message)

    monkeypatch.setattr(PrivateAveraging, "_messages", watched)
    found = []
    for lazy in (True, False):
        if not lazy:
            monkeypatch.delattr(InProcessGrid, "lazy")
        made.clear()
        alive.clear()
        federation = Federation(plan_of(40, 40, 2, *first), answer)
        tally = federation.run()
        assert len(made) == len(alive) == 80
        assert max(alive) <= 2 * Script.window if lazy else max(alive) == 40
        figures = tally.accepted, tally.asked, tally.bytes_down, tally.first_bytes_down
        found.append((figures, federation.states[-1].weights.tobytes()))
    assert found[0] == found[1]
    assert len(found[0][0][0]) == (7 if first else 40)


def round_in(message: Message) -> int:
    return Order.from_config(dict(message.content.config_records["order"])).round


def vector_of(node: int, number: int = 1) -> Vector:
    draws = numpy_generator(node, "update", number).standard_normal(LAYOUT.size)
    return draws.astype(np.float32)


def encoded(vector: Vector) -> bytes:
    return CODEC.encode(vector, LAYOUT.blocks, numpy_generator(0))


def reply(message: Message, payload: bytes) -> Message:
    return Message(RecordDict({"update": pack(payload)}), reply_to=message)


def honest(message: Message) -> list[Message]:
    vector = vector_of(message.metadata.dst_node_id, round_in(message))
    return [reply(message, encoded(vector))]


def patched(vector: Vector, value: float) -> bytes:
    """A payload with a value that the codec would not encode, and a checksum that fits it."""
    marker = np.float32(1234.5)
    given = vector.copy()
    given[3] = marker
    payload = encoded(given)
    assert payload.count(marker.tobytes()) == 1
    payload = payload.replace(marker.tobytes(), np.float32(value).tobytes())
    head, rest = payload[:13], payload[17:]
    return head + struct.pack("<I", zlib.crc32(rest, zlib.crc32(head))) + rest


def other_records(message: Message) -> list[Message]:
    return [Message(RecordDict({"gift": pack(encoded(vector_of(1)))}), reply_to=message)]


def more_records(message: Message) -> list[Message]:
    content = RecordDict({"update": pack(encoded(vector_of(1))), "count": ConfigRecord({"n": 5})})
    return [Message(content, reply_to=message)]


def another_value(message: Message) -> list[Message]:
    record = ConfigRecord({"model": encoded(vector_of(1))})
    return [Message(RecordDict({"update": record}), reply_to=message)]


def an_array(message: Message) -> list[Message]:
    data = encoded(vector_of(1))
    array = Array(dtype="uint8", shape=(len(data),), stype="custom", data=data)
    return [Message(RecordDict({"update": ArrayRecord({"payload": array})}), reply_to=message)]


def a_text(message: Message) -> list[Message]:
    record = ConfigRecord({"payload": "text"})
    return [Message(RecordDict({"update": record}), reply_to=message)]


def replies(payload: bytes) -> Answer:
    return lambda message: [reply(message, payload)]


def fails(code: int, text: str = "") -> Answer:
    return lambda message: [Message(Error(code, text), reply_to=message)]


NOT_ONE = "the reply is not one encoded update"
UNREADABLE = "the payload cannot be decoded"
BROKEN: list[tuple[Answer, str]] = [
    (fails(2, "Traceback: /home/me"), "the client gave no reply (Flower error 2)"),
    (fails(5), "the client gave no reply (Flower error 5)"),
    (fails(8), "the client gave no reply (Flower error 8)"),
    *((fails(code), "the client gave no reply (an unknown error)") for code in (0, 9, 2**40)),
    *((fails(int(u), "words of the client's own"), u.text) for u in Unusable),
    *((fails(int(r), "words of the client's own"), r.text) for r in Refusal),
    (other_records, NOT_ONE),
    (more_records, NOT_ONE),
    (another_value, NOT_ONE),
    (an_array, NOT_ONE),
    (a_text, NOT_ONE),
    (replies(bytes(65 + 8 * LAYOUT.size)), "the payload is larger than any update of this plan"),
    (replies(b""), UNREADABLE),
    (replies(encoded(vector_of(1))[:-1]), UNREADABLE),
    (replies(encoded(vector_of(1))[:20]), UNREADABLE),
    (replies(patched(vector_of(1), float("nan"))), UNREADABLE),
    (replies(patched(vector_of(1), float("inf"))), UNREADABLE),
    (replies(encoded(1e6 * vector_of(1))), "the update is larger than the plan's bound"),
]


def but(node: int, answer: Answer) -> Answer:
    """Everybody is honest but one node."""
    return lambda m: answer(m) if m.metadata.dst_node_id == node else honest(m)


def mean_of(nodes: list[int]) -> np.ndarray:
    return np.mean([vector_of(n).astype(np.float64) for n in nodes], axis=0)


def assert_is_step_along(federation: Federation, plan: Plan, gradient: np.ndarray) -> None:
    expected = apply_round(federation.start, gradient, plan.federation.server, 0.9)
    np.testing.assert_allclose(federation.states[0].weights, expected.weights, rtol=1e-6)


def test_patching_keeps_a_payload_readable() -> None:
    changed = CODEC.decode(patched(vector_of(1), 2.5), LAYOUT.blocks)
    assert changed[3] == 2.5


def test_a_model_that_diverges_ends_the_run_and_is_not_committed() -> None:
    plan = plan_of(4, 4, 2, "federation.server.learning_rate=1e300")
    federation = Federation(plan, honest)
    with pytest.raises(PlanError, match=r"round 1: .*server\.learning_rate=1e\+300"):
        federation.run()
    assert not federation.states


@pytest.mark.parametrize(("answer", "reason"), BROKEN)
def test_a_broken_reply_is_dropped_with_its_reason(answer: Answer, reason: str) -> None:
    plan = plan_of(4, 4, 1, "federation.min_replies=3")
    bad = node_of(1)
    federation = Federation(plan, but(bad, answer))
    tally = federation.run()
    good = [node_of(0), node_of(2), node_of(3)]
    assert tally.dropped == Counter({reason: 1})
    assert tally.accepted == set(good) and tally.sum.count == 3
    assert tally.bytes_up == 3 * len(encoded(vector_of(1)))
    assert_is_step_along(federation, plan, mean_of(good))


def test_the_bound_is_what_decides() -> None:
    plan = plan_of(4, 4, 1, "federation.min_replies=3")
    bound = Federation(plan, honest).rounds.bound
    unit = np.full(LAYOUT.size, LAYOUT.size**-0.5, dtype=np.float32)

    def outcome(norm: float) -> Tally:
        payload = encoded((norm * unit).astype(np.float32))
        return Federation(plan, but(node_of(1), replies(payload))).run()

    assert outcome(0.999 * bound).sum.count == 4
    assert outcome(1.001 * bound).dropped == Counter(
        {"the update is larger than the plan's bound": 1}
    )


def test_the_bound_is_of_updates_before_a_codec_that_makes_them_longer() -> None:
    codec = ("randk:0.25",)
    settings = ('updates.codec=["randk:0.25"]', 'privacy.trust="local"')
    plan = plan_of(4, 4, 1, "federation.min_replies=3", *settings)
    bound = Federation(plan, honest).rounds.bound
    unit = np.full(LAYOUT.size, LAYOUT.size**-0.5, dtype=np.float32)

    def outcome(norm: float) -> Tally:
        vector = (norm * unit).astype(np.float32)
        payload = build_codec(codec).encode(vector, LAYOUT.blocks, numpy_generator(0))
        return Federation(plan, lambda message: [reply(message, payload)]).run()

    assert build_codec(codec).expansion(LAYOUT.size) == 4
    # Of equal values a quarter, times four, is twice as long: far within what one value can be.
    assert outcome(0.999 * bound).sum.count == 4
    assert outcome(1.999 * bound).sum.count == 4
    with pytest.raises(NetworkError, match="larger than the plan's bound"):
        outcome(2.001 * bound)


def test_a_repeated_reply_counts_once() -> None:
    def twice(message: Message) -> list[Message]:
        return [*honest(message), *honest(message), reply(message, encoded(-vector_of(9)))]

    plan = plan_of(4, 4, 1)
    federation = Federation(plan, but(node_of(1), twice))
    tally = federation.run()
    assert tally.sum.count == 4 and len(tally.accepted) == 4
    assert_is_step_along(federation, plan, mean_of([node_of(c) for c in range(4)]))


def test_one_reply_of_a_node_is_read_each_time_it_is_asked_and_none_of_others() -> None:
    """A flood of broken replies costs one decoding an attempt, and a stranger's none."""

    def flood(message: Message) -> list[Message]:
        stranger = Message(message.content, node_of(77), "train", group_id="1")
        stranger.metadata.__dict__["_message_id"] = "stranger"
        return [*[reply(message, b"broken")] * 50, *honest(message), *honest(stranger)]

    plan = plan_of(4, 4, 1, "federation.retries=2", "federation.min_replies=4")
    federation = Federation(plan, but(node_of(1), flood))
    with pytest.raises(NetworkError, match="3 x the payload cannot be decoded"):
        federation.run()
    assert federation.strategy._tally.accepted == {node_of(0), node_of(2), node_of(3)}


def test_a_reply_of_another_round_does_not_count() -> None:
    def late(message: Message) -> list[Message]:
        node = message.metadata.dst_node_id
        old = Message(message.content, node, "train", group_id="99")
        old.metadata.__dict__["_message_id"] = "old"
        return honest(old)

    plan = plan_of(4, 4, 1, "federation.min_replies=3")
    federation = Federation(plan, but(node_of(1), late))
    tally = federation.run()
    assert tally.accepted == {node_of(0), node_of(2), node_of(3)}
    assert_is_step_along(federation, plan, mean_of(sorted(tally.accepted)))


def test_a_short_round_asks_only_the_missing_again() -> None:
    sick = {node_of(1): 1, node_of(4): 2}  # how often each fails
    left = Counter(sick)

    def sometimes(message: Message) -> list[Message]:
        node = message.metadata.dst_node_id
        if left[node]:
            left[node] -= 1
            return fails(2)(message)
        return honest(message)

    plan = plan_of(6, 6, 1, "federation.min_replies=6", "federation.retries=2")
    federation = Federation(plan, sometimes)
    tally = federation.run()
    everyone = [node_of(c) for c in range(6)]
    assert federation.script.nodes(1) == [*everyone, node_of(1), node_of(4), node_of(4)]
    assert tally.dropped == Counter({"the client gave no reply (Flower error 2)": 3})
    assert_is_step_along(federation, plan, mean_of(everyone))


def test_a_silent_client_is_asked_again() -> None:
    silent = [node_of(2)]

    def once(message: Message) -> list[Message]:
        return [] if silent and silent.pop() else honest(message)

    plan = plan_of(4, 4, 1, "federation.min_replies=4")
    federation = Federation(plan, but(node_of(2), once))
    assert federation.run().sum.count == 4
    assert federation.script.nodes(1).count(node_of(2)) == 2
    assert len(federation.script.nodes(1)) == 5


def test_giving_up_names_counts_and_reasons_and_keeps_rounds() -> None:
    def answer(message: Message) -> list[Message]:
        node = message.metadata.dst_node_id
        if round_in(message) < 3 or node == node_of(0):
            return honest(message)
        return fails(int(Refusal.BUDGET))(message) if node == node_of(1) else fails(2)(message)

    plan = plan_of(4, 4, 5, "federation.min_replies=3", "federation.retries=1")
    federation = Federation(plan, answer)
    with pytest.raises(NetworkError) as caught:
        federation.run()
    text = str(caught.value)
    assert "round 3: 1 of 4 clients" in text and "3 are needed, asked 2 times" in text
    assert f"2 x {Refusal.BUDGET.text}" in text
    assert "4 x the client gave no reply (Flower error 2)" in text
    assert "rounds 1 to 2 are kept" in text
    assert [s.round for s in federation.states] == [1, 2]
    assert federation.strategy.state is federation.states[-1]
    assert len(federation.script.nodes(3)) == 4 + 3


@pytest.mark.parametrize(("spent", "ends"), [(1, False), (2, True), (4, True)])
def test_budgets_end_the_training_only_where_they_alone_are_missing(spent: int, ends: bool) -> None:
    def answer(message: Message) -> list[Message]:
        node = message.metadata.dst_node_id
        if node == node_of(3) and spent < 4:
            return honest(message)
        return fails(int(Refusal.BUDGET) if node < node_of(spent) else 2)(message)

    federation = Federation(plan_of(4, 4, 1, "federation.min_replies=3"), answer)
    with pytest.raises(NetworkError) as caught:
        federation.run()
    assert isinstance(caught.value, BudgetsSpent) == ends


def refusing(code: int, *clients: int) -> Answer:
    nodes = {node_of(client) for client in clients}
    return lambda m: fails(code)(m) if m.metadata.dst_node_id in nodes else honest(m)


def test_one_refusal_does_not_end_a_run_that_the_others_can_still_hold() -> None:
    away = refusing(5, 3)

    def answer(message: Message) -> list[Message]:
        if message.metadata.dst_node_id == node_of(2):
            return fails(int(Refusal.BUDGET))(message)
        return away(message)

    plan = plan_of(10, 10, 1, "federation.min_replies=9", "federation.retries=0")
    with pytest.raises(NetworkError) as caught:
        Federation(plan, answer).run()
    assert not isinstance(caught.value, BudgetsSpent)


@pytest.mark.parametrize(("spent", "ends"), [((2,), False), ((1, 2), True)])
def test_of_real_nodes_another_cohort_may_hold_the_round(
    spent: tuple[int, ...], ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four of them are connected, and three are asked: who refuses is always among these."""
    plan = plan_of(4, 3, 1, "federation.min_replies=3", "federation.retries=0")
    federation = Federation(plan, honest)
    nodes = [node_of(client) for client in range(4)]
    asked = [nodes.index(n) for n in federation.strategy.cohort(1, federation.grid)]
    refuse = refusing(int(Refusal.BUDGET), *(asked[i] for i in spent))
    federation = Federation(plan, refuse)
    monkeypatch.setattr(federation.grid, "get_node_ids", lambda: nodes)
    with pytest.raises(NetworkError) as caught:
        federation.run()
    assert isinstance(caught.value, BudgetsSpent) == ends


def test_budgets_that_refuse_only_at_a_second_look_end_the_training_too() -> None:
    """Counted as devices: a refusal is one, in whichever attempt it comes."""
    tries = Counter[int]()

    def answer(message: Message) -> list[Message]:
        node = message.metadata.dst_node_id
        tries[node] += 1
        if node != node_of(0):
            return honest(message)
        return fails(2 if tries[node] == 1 else int(Refusal.BUDGET))(message)

    plan = plan_of(3, 3, 1, "federation.min_replies=3", "federation.retries=1")
    with pytest.raises(BudgetsSpent):
        Federation(plan, answer).run()


PLAIN = ('privacy="off"', 'federation.server={kind="sgd",learning_rate=0.5,momentum=0.9}')


def test_without_privacy_an_update_is_bounded_by_the_model() -> None:
    """Ten times the model's norm, of a model of 36 coordinates that is near zero of six."""
    given = ("task.clients=3", "federation.clients_per_round=3", "federation.rounds=1")
    codecs = ('updates.codec=["identity"]', 'updates.broadcast=["identity"]')
    plan = parse_plan("", [*PLAIN, *given, *codecs, "federation.min_replies=2"])
    unit = np.full(LAYOUT.size, LAYOUT.size**-0.5, dtype=np.float32)

    def outcome(norm: float) -> Tally:
        payload = encoded((norm * unit).astype(np.float32))
        return Federation(plan, but(node_of(1), replies(payload))).run()

    assert LAYOUT.size == 36
    assert np.linalg.norm(Federation(plan, honest).start.weights) < 6
    assert outcome(0.999 * 10 * 6 / 0.5).sum.count == 3
    for norm in (1.001 * 10 * 6 / 0.5, 3e38):
        assert outcome(norm).dropped == {"the update is larger than the plan's bound": 1}


def test_the_bound_without_privacy_grows_with_the_model() -> None:
    model = np.full(36, 5.0, dtype=np.float32)
    optimizer = parse_plan("", list(PLAIN)).federation.server
    assert farthest(model, optimizer) == pytest.approx(10 * 30 / 0.5)


def test_no_retries_means_one_try() -> None:
    plan = plan_of(4, 4, 1, "federation.retries=0")
    federation = Federation(plan, lambda _: [])
    with pytest.raises(NetworkError, match=r"asked 1 times \(no reply at all\)"):
        federation.run()
    assert len(federation.script.asked) == 4 and federation.states == []


def test_constants_are_sent_once_and_again_after_a_drop() -> None:
    bad = node_of(2)

    def answer(message: Message) -> list[Message]:
        failing = round_in(message) == 2 and message.metadata.dst_node_id == bad
        return fails(int(Refusal.CONSTANTS_MISSING))(message) if failing else honest(message)

    plan = plan_of(4, 4, 4, "federation.min_replies=3")
    federation = Federation(plan, answer)
    federation.run()
    informed = [federation.script.informed(n) for n in range(1, 5)]
    assert informed == [{node_of(c) for c in range(4)}, set(), {bad}, set()]
    sent = [t.first_bytes_down for t in federation.tallies]
    assert sent == [4 * len(CONSTANTS), 0, len(CONSTANTS), 0]


def test_a_message_holds_the_order_the_model_and_the_constants() -> None:
    seen: list[RecordDict] = []

    def answer(message: Message) -> list[Message]:
        seen.append(message.content)
        return honest(message)

    plan = plan_of(4, 4, 1)
    federation = Federation(plan, answer)
    federation.run()
    for content in seen:
        assert sorted(content) == ["broadcast", "constants", "order"]
        assert unpack(content, "constants") == CONSTANTS
        weights = CODEC.decode(unpack(content, "broadcast"), LAYOUT.blocks)
        assert np.array_equal(weights, federation.start.weights)
        order = Order.from_config(dict(content.config_records["order"]))
        assert (order.plan, order.round, order.noise_multiplier) == (plan.digest, 1, 1.0)


SIZES = [(10, 3, 20), (10, 5, 7), (12, 4, 9), (7, 7, 3), (20, 1, 45), (11, 6, 5), (9, 2, 1)]


def cohorts(plan: Plan) -> list[list[int]]:
    federation = Federation(plan, honest)
    rounds = range(1, plan.federation.rounds + 1)
    return [federation.strategy.cohort(n, federation.grid) for n in rounds]


@pytest.mark.parametrize(("clients", "per_round", "rounds"), SIZES)
def test_cohorts_keep_the_bound_on_participations(
    clients: int, per_round: int, rounds: int
) -> None:
    plan = plan_of(clients, per_round, rounds)
    dealt = cohorts(plan)
    assert all(len(set(c)) == len(c) == per_round for c in dealt)
    counts = Counter(node for cohort in dealt for node in cohort)
    assert set(counts) <= {node_of(c) for c in range(clients)}
    assert max(counts.values()) <= participations(plan)
    per_pass = clients // per_round
    for first in range(0, rounds, per_pass):
        within = [n for cohort in dealt[first : first + per_pass] for n in cohort]
        assert len(set(within)) == len(within)


def test_the_bound_on_participations_is_met() -> None:
    plan = plan_of(12, 4, 9)  # three whole passes over everybody
    counts = Counter(node for cohort in cohorts(plan) for node in cohort)
    assert set(counts.values()) == {participations(plan)} == {3}


def test_cohorts_depend_on_the_seed_and_on_nothing_else() -> None:
    plan = plan_of(30, 5, 12)
    dealt = cohorts(plan)
    assert cohorts(plan) == dealt
    assert cohorts(plan_of(30, 5, 12, "seed=1")) != dealt
    federation = Federation(plan, honest)
    assert federation.strategy.cohort(7, federation.grid) == dealt[6]  # as after a resume
    assert dealt[:6] != dealt[6:]  # passes are shuffled anew


def test_who_is_asked_is_the_cohort() -> None:
    plan = plan_of(10, 3, 6)
    federation = Federation(plan, honest)
    federation.run()
    assert [federation.script.nodes(n) for n in range(1, 7)] == cohorts(plan)


def test_a_client_that_answers_too_late_is_not_asked_beyond_the_bound() -> None:
    late = node_of(1)  # it trains and charges its budget, but its update never arrives in time
    plan = plan_of(8, 4, 4, "federation.min_replies=1", "federation.retries=0")
    federation = Federation(plan, but(late, lambda message: []))
    half = InProcessGrid(4, federation.script)  # the other half never connects
    with pytest.raises(NetworkError, match="0 connected clients have been asked"):
        federation.strategy.start(half)
    assert participations(plan) == 2
    for number, tally in enumerate(federation.tallies, 1):
        assert federation.script.nodes(number) == list(tally.devices)
        assert late in tally.devices and late not in tally.accepted
    assert [s.round for s in federation.states] == [1, 2]


def test_who_was_asked_before_a_round_failed_is_not_asked_beyond_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = plan_of(8, 4, 2, "federation.retries=0", "federation.timeout=0.001")
    assert participations(plan) == 1
    known: set[int] = set()

    def opened(cohort: list[int]) -> set[int]:
        known.update(cohort)
        return set(known)

    first = Federation(plan, lambda message: [], opened=opened)  # charged, and never heard of
    with pytest.raises(NetworkError, match="0 of 4 clients"):
        first.strategy.start(first.grid)
    assert known == set(first.script.nodes(1)) and len(known) == 4
    again = Federation(plan, honest, opened=opened)
    others, gone = InProcessGrid(8, again.script), sorted(known)[:2]
    monkeypatch.setattr(
        others, "get_node_ids", lambda: [n for n in map(node_of, range(8)) if n not in gone]
    )
    with pytest.raises(NetworkError, match="connected clients have been asked in fewer than"):
        again.strategy.start(others)
    assert set(again.tallies[0].devices) == known > set(again.script.nodes(1))


def test_too_few_nodes_are_an_error_that_counts_them() -> None:
    plan = plan_of(8, 8, 1, "federation.timeout=0.001")
    federation = Federation(plan, honest)
    small = InProcessGrid(3, federation.script)
    with pytest.raises(NetworkError, match=r"3 clients are connected after .*, 8 are needed"):
        federation.strategy.start(small)


def test_real_devices_are_judged_by_their_statements_and_get_the_last_one_back(
    tmp_path: Path,
) -> None:
    key, met = Ed25519PrivateKey.generate(), dict[int, int]()

    def states(message: Message) -> list[Message]:
        [answer] = honest(message)
        number, node = round_in(message), message.metadata.dst_node_id
        if node == node_of(0):  # the other device makes no statement
            if "anchor" in message.content:
                met[number] = Signed.decode(unpack(message.content, "anchor")).head.sequence
            payload = unpack(answer.content, "update")
            signed = state(key, Head(2 * number, "ab" * 32), "run", number, payload)
            answer.content["statement"] = pack(signed.encode())
        return [answer]

    countersigner = Countersigner.open(tmp_path, Ed25519PrivateKey.generate())
    plan = plan_of(2, 2, 3, "federation.min_replies=1", "federation.retries=0")
    federation = Federation(plan, states, countersigner)
    federation.run()
    assert met == {2: 2, 3: 4}
    for tally in federation.tallies:
        assert tally.accepted == {node_of(0)}
        assert tally.dropped == {"the reply holds no ledger statement": 1}
