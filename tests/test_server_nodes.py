"""Rounds on devices that are slow, away, or back under another node id."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from torch import nn

from reticent.client.records import pack
from reticent.compression.codec import build_codec
from reticent.core.errors import NetworkError, PlanError
from reticent.core.plan import Plan, parse_plan
from reticent.core.protocol import Constants
from reticent.core.seeds import numpy_generator
from reticent.core.update import Layout
from reticent.privacy.ledger import Budget, Ledger
from reticent.privacy.randomness import SeededRandomness
from reticent.privacy.schedule import schedule_for
from reticent.server import nodes as nodes_module
from reticent.server import waiting
from reticent.server.journal import Journal
from reticent.server.nodes import Nodes, polled
from reticent.server.optimizer import ServerState
from reticent.server.rounds import RoundPlan, Tally
from reticent.server.sampling import Sampler
from reticent.server.strategy import PrivateAveraging
from reticent.server.waiting import wait_for_nodes, wait_for_return
from reticent.simulations.grid import InProcessGrid, enter_task
from reticent.simulations.simulate import simulate

CONSTANTS = Constants(b"", np.zeros((0, 0), dtype=np.float32)).encode()
LAYOUT = Layout.of(nn.Linear(8, 4))


def plan_of(*overrides: str) -> Plan:
    given = [
        "task.clients=6",
        "federation.clients_per_round=6",
        "federation.min_replies=2",
        "federation.rounds=1",
        "federation.retries=0",
        "federation.timeout=0.5",
        'updates.codec=["identity"]',
        'updates.broadcast=["identity"]',
        "privacy.noise_multiplier=1.0",
    ]
    return parse_plan("", [*given, *overrides])


class SlowGrid(InProcessGrid):
    """Nodes that answer after so many looks of the server's; one that is not named never does."""

    def __init__(self, looks: dict[int, int]) -> None:
        super().__init__(max(looks) - 1, self)  # nodes count from 2
        self.window = 1
        self.looks, self.looked = looks, 0
        self.sent: dict[str, Message] = {}
        self.handed: list[int] = []

    def get_node_ids(self) -> Iterable[int]:
        return sorted(self.looks)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        given = {f"m{number}": message for number, message in enumerate(messages, len(self.sent))}
        for name, message in given.items():
            message.metadata.__dict__["_message_id"] = name
        self.sent |= given
        self.handed.append(len(given))
        return list(given)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.looked += 1
        found: list[Message] = []
        for name in set(message_ids):
            message = self.sent[name]
            if self.looks[message.metadata.dst_node_id] <= self.looked:
                codec = build_codec(("identity",))
                update = codec.encode(np.ones(36, np.float32), LAYOUT.blocks, numpy_generator(0))
                found.append(Message(RecordDict({"update": pack(update)}), reply_to=message))
        return found


NEVER = 10**9


def played(plan: Plan, grid: SlowGrid, known: Nodes | None = None) -> Tally:
    enter_task()
    tallies: list[Tally] = []
    digest = hashlib.sha256(CONSTANTS).hexdigest()
    rounds = RoundPlan("run", schedule_for(plan), 10.0, LAYOUT, CONSTANTS, digest)
    start = ServerState.begin(np.zeros(LAYOUT.size, dtype=np.float32))
    strategy = PrivateAveraging(
        plan,
        rounds,
        start,
        lambda state, tally, seconds: tallies.append(tally),
        nodes=known or Nodes(gather=polled),
    )
    strategy.start(grid)
    return tallies[-1]


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes_module, "_POLL_SECONDS", 0.01)


def test_a_round_ends_when_everybody_replied_and_not_later() -> None:
    grid = SlowGrid({2: 1, 3: 2, 4: 3, 5: 1, 6: 1, 7: 3})
    assert played(plan_of("federation.timeout=600"), grid).accepted == {2, 3, 4, 5, 6, 7}
    assert grid.looked == 3


def test_orders_are_handed_over_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes_module, "_AT_ONCE", 4)
    grid = SlowGrid(dict.fromkeys(range(2, 8), 1))
    assert played(plan_of(), grid).accepted == {2, 3, 4, 5, 6, 7}
    assert grid.handed == [4, 2]


def test_nobody_is_asked_for_a_round_that_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes_module, "_AT_ONCE", 3)
    grid = SlowGrid(dict.fromkeys(range(2, 8), 1))
    assert len(played(plan_of("federation.enough=3"), grid).accepted) == 3
    assert grid.handed == [3]


def test_a_straggler_is_left_out_at_the_deadline() -> None:
    grid = SlowGrid({2: 1, 3: 1, 4: 1, 5: 1, 6: 1, 7: NEVER})
    began = time.monotonic()
    tally = played(plan_of(), grid)
    assert tally.accepted == {2, 3, 4, 5, 6} and 7 in tally.devices
    assert time.monotonic() - began >= 0.5


def test_too_few_replies_at_the_deadline_end_the_run() -> None:
    with pytest.raises(NetworkError, match="1 of 6 clients gave a valid reply, 2 are needed"):
        played(plan_of(), SlowGrid({2: 1, **dict.fromkeys(range(3, 8), NEVER)}))


def test_a_round_closes_once_it_has_enough_replies() -> None:
    grid = SlowGrid({2: 1, 3: NEVER, 4: 2, 5: NEVER, 6: 1, 7: 3})
    tally = played(plan_of("federation.enough=4", "federation.timeout=600"), grid)
    assert tally.accepted == {2, 4, 6, 7}
    assert sorted(tally.devices) == [2, 3, 4, 5, 6, 7]  # everyone who was asked may have charged


def test_of_replies_that_come_together_no_more_than_enough_are_used() -> None:
    tally = played(plan_of("federation.enough=3"), SlowGrid(dict.fromkeys(range(2, 8), 1)))
    assert len(tally.accepted) == tally.sum.count == 3


class Restarting(SlowGrid):
    """Node 3 is away when it is asked first, and back after two more looks at who is connected."""

    away = 0

    def get_node_ids(self) -> Iterable[int]:
        self.away -= 1
        return [n for n in sorted(self.looks) if n != 3 or self.away < 0]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        if not self.sent:
            self.away = 2
        self.asked = super().push_messages(messages)
        return self.asked

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        if self.away < 0:
            return super().pull_messages(message_ids)
        absent = [m for m in self.sent.values() if m.metadata.dst_node_id == 3]
        error = Error(ErrorCode.NODE_UNAVAILABLE, "Flower says so at once")
        there = [n for n in message_ids if self.sent[n] not in absent]
        return [*super().pull_messages(there), *(Message(error, reply_to=m) for m in absent)]


def test_a_round_is_asked_again_once_enough_of_its_devices_are_back() -> None:
    overrides = ("task.clients=2", "federation.clients_per_round=2", "federation.timeout=60")
    plan = plan_of(*overrides, "federation.retries=1")
    grid = Restarting({2: 1, 3: 1})
    tally = played(plan, grid)
    assert tally.accepted == {2, 3} and grid.away < 0
    assert tally.asked == 3  # node 2 was not asked again
    assert tally.dropped["the client gave no reply (Flower error 5)"] == 1


def test_an_order_is_void_after_the_deadline() -> None:
    grid = SlowGrid(dict.fromkeys(range(2, 8), 1))
    played(plan_of("federation.timeout=77"), grid)
    assert {m.metadata.ttl for m in grid.sent.values()} == {77.0}


def test_who_is_missing_is_in_the_error() -> None:
    told: list[list[int]] = []

    def seen(nodes: list[int]) -> str:
        told.append(nodes)
        return "; not connected: pi-1"

    with pytest.raises(
        NetworkError, match=r"1 clients are connected .* needed; not connected: pi-1"
    ):
        played(plan_of(), SlowGrid({2: 1}), Nodes(gather=polled, seen=seen))
    assert told[0] == [2]


def test_who_was_asked_and_said_nothing_is_in_the_error() -> None:
    known = Nodes(gather=polled, named=lambda nodes: ", ".join(f"pi-{node}" for node in nodes))
    grid = SlowGrid({2: 1, 3: NEVER, 4: 1, 5: NEVER, 6: 1, 7: 1})
    with pytest.raises(NetworkError, match=r"at last without a reply of pi-3, pi-5; no round"):
        played(plan_of("federation.min_replies=5"), grid, known)


def test_who_is_not_welcome_is_not_asked_and_does_not_count_as_connected() -> None:
    known = Nodes(gather=polled, welcome=lambda nodes: [node for node in nodes if node != 3])
    tally = played(plan_of(), SlowGrid(dict.fromkeys(range(2, 8), 1)), known)
    assert tally.accepted == {2, 4, 5, 6, 7} == set(tally.devices)
    with pytest.raises(NetworkError, match="1 clients are connected after"):
        played(plan_of(), SlowGrid({2: 1, 3: 1}), known)


def test_who_is_no_longer_welcome_does_not_count_before_a_round_is_asked_again() -> None:
    looks: list[list[int]] = []
    known = Nodes(seen=lambda nodes: looks.append(list(nodes)) or "", welcome=lambda nodes: [2])
    plan = plan_of("task.clients=2", "federation.clients_per_round=2")
    wait_for_return(SlowGrid({2: 1, 3: 1}), plan.federation, known, [2, 3], {2})
    assert looks == [[2]]  # one look in the plan's half second, and it was not enough


def test_a_device_that_comes_back_as_another_node_has_no_more_rounds() -> None:
    """Three of six clients a round and two rounds: a pass, in which nobody is asked twice."""
    overrides = ("federation.clients_per_round=3", "federation.rounds=2")
    first: list[int] = []

    class Renewed(SlowGrid):
        def get_node_ids(self) -> Iterable[int]:
            # After round 1 its devices come back under ids that are 100 higher.
            return sorted(n + 100 if n in first else n for n in range(2, 8))

        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            given = list(messages)
            self.sent, self.looked = {}, 0
            self.looks = {m.metadata.dst_node_id: 1 for m in given}
            asked.append({m.metadata.dst_node_id for m in given})
            if not first:
                first.extend(asked[0])
            return super().push_messages(given)

    asked: list[set[int]] = []
    known = Nodes(gather=polled, identity=lambda node: node % 100)
    played(plan_of(*overrides), Renewed(dict.fromkeys(range(2, 8), 1)), known)
    assert {node % 100 for node in asked[1]}.isdisjoint(asked[0])
    asked.clear()
    first.clear()
    played(plan_of(*overrides), Renewed(dict.fromkeys(range(2, 8), 1)), Nodes(gather=polled))
    assert not {node % 100 for node in asked[1]}.isdisjoint(asked[0])  # the control


class Joining(SlowGrid):
    """Nodes of which one more is connected at each look."""

    def get_node_ids(self) -> Iterable[int]:
        self.looked += 1
        return sorted(self.looks)[: 3 + self.looked]


def test_a_server_waits_for_clients_that_may_be_asked_and_not_for_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Even nodes may: two of the first four, and the fourth of them comes as the eighth node."""
    monkeypatch.setattr(waiting, "_LOOK_SECONDS", 0.01)
    few = ("federation.clients_per_round=4", "federation.min_replies=3", "federation.timeout=60")
    grid, looks = Joining(dict.fromkeys(range(2, 22), 1)), list[int]()

    def able(nodes: Sequence[int]) -> int:
        looks.append(len(nodes))
        return sum(node % 2 == 0 for node in nodes)

    nodes = wait_for_nodes(grid, plan_of("task.clients=20", *few), Nodes(), able)
    assert list(nodes) == list(range(2, 9)) and looks == [4, 5, 6, 7]
    # Where the plan's six clients are all connected, nobody else would come: a quorum is enough.
    grid.looked = 0
    assert len(wait_for_nodes(grid, plan_of("task.clients=6", *few), Nodes(), able)) == 6
    soon = (*few, "federation.timeout=0.1")
    # Whoever chooses finds out that nobody may be asked, and why.
    assert wait_for_nodes(grid, plan_of("task.clients=20", *soon), Nodes(), lambda nodes: 0)


def test_a_round_waits_for_devices_whose_turn_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """One class of two is connected at first, and another one has its turn."""
    monkeypatch.setattr(waiting, "_LOOK_SECONDS", 0.01)
    turns = ["federation.sampling=fixed", "federation.limit=1", "federation.window=2"]
    few = ("task.clients=30", "federation.clients_per_round=6", "federation.timeout=60")
    plan = plan_of(*few, *turns)
    sampler = Sampler(plan, SeededRandomness(0), "run")
    everybody = list(range(2, 32))
    first, second = (sampler.able(number, everybody, {}) for number in (1, 2))
    assert sorted(first + second) == everybody

    class Late(SlowGrid):
        def get_node_ids(self) -> Iterable[int]:
            self.asked = getattr(self, "asked", 0) + 1
            return sorted(second if self.asked < 4 else [*second, *first[:6]])

    grid = Late(dict.fromkeys(everybody, 1))
    assert played(plan, grid).accepted == set(first[:6])
    assert grid.asked >= 4


@pytest.mark.parametrize(
    "overrides",
    [
        ("federation.enough=1",),
        ("federation.enough=7",),
        ("federation.enough=4", 'privacy.unit="client"', 'privacy.trust="aggregator"'),
    ],
)
def test_where_a_round_cannot_close_early_the_plan_is_refused(overrides: tuple[str, ...]) -> None:
    with pytest.raises(PlanError, match=r"federation\.enough"):
        plan_of(*overrides)


def test_a_simulated_round_uses_some_of_the_replies_and_charges_everyone(tmp_path: Path) -> None:
    given = [
        "task.name=digits",
        "task.clients=4",
        "task.public_examples=100",
        "teacher.epochs=1",
        "student.epochs=1",
        "federation.rounds=3",
        "federation.clients_per_round=4",
        "federation.min_replies=2",
        "federation.eval_every=3",
        "privacy.trust=local",
        "privacy.noise_multiplier=2.0",
        "engine.workers=1",
    ]
    run = simulate(parse_plan("", [*given, "federation.enough=3"]), tmp_path / "run")
    assert [m["replies"] for m in run.read_metrics()] == [3, 3, 3]
    assert [m["asked"] for m in run.read_metrics()] == [4, 4, 4]
    with Ledger.open(run.ledger) as ledger:
        charges = [ledger.overview(f"client-{i}", Budget(99.0, 1e-5)).charges for i in range(4)]
    assert charges == [3, 3, 3, 3]
    journal = Journal(run)
    used = journal.participations()
    assert sum(used.values()) == 9 and set(journal.asked().values()) == {3}
    journal.close()
