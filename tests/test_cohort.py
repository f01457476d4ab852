"""Simulated clients that are answered together: each one's reply, ledger and refusal."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from torch import nn

from reticent.client.records import pack, unpack
from reticent.client.round import noisy_step
from reticent.client.steps import Client, NoisyStep
from reticent.client.training import LocalTrainer, trained_alone
from reticent.client.wire import quantization_step
from reticent.compression.codec import build_codec
from reticent.core.errors import DataError
from reticent.core.personal import personal_values, split_of
from reticent.core.plan import Plan, parse_plan
from reticent.core.protocol import PROTOCOL, Constants, Order, Refusal
from reticent.core.seeds import numpy_generator
from reticent.core.sequences import LastGRU, LastLSTM, OneHot
from reticent.core.tasks import Examples
from reticent.core.update import Layout
from reticent.privacy.ledger import Ledger
from reticent.privacy.randomness import SeededRandomness
from reticent.simulations.devices import devices_for
from reticent.simulations.grid import enter_task, node_of
from reticent.simulations.workers import BLOCK, Site

CLIENTS, CLASSES, SHAPE = 32, 3, (1, 8, 8)
EMPTY, MISSING, BROKEN = 3, 5, 11


class SmallTask:
    """Images of noise; one client has none, one cannot be read and one is of another shape."""

    name, classes, clients = "small", CLASSES, CLIENTS

    def __init__(self, nominal: int = 12, shape: tuple[int, ...] = SHAPE) -> None:
        self.nominal_examples, self.input_shape = nominal, shape

    def public(self) -> Examples:
        return drawn(100, 12)

    def test(self) -> Examples:
        return drawn(101, 12)

    def client(self, index: int) -> Examples:
        if index == MISSING:
            raise DataError("cannot be read")
        return drawn(index, 0 if index == EMPTY else 6 + index, 16 if index == BROKEN else 8)

    def teacher(self) -> nn.Module:
        return self.student("")

    def student(self, model: str) -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(1, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 6, 3, 2, 1)),
            *(nn.ReLU(), nn.Flatten(), nn.Linear(24, CLASSES)),
        )


def drawn(seed: int, count: int, side: int = 8) -> Examples:
    rng = numpy_generator(seed, "small")
    inputs = rng.standard_normal((count, 1, side, side)).astype(np.float32)
    return Examples(torch.from_numpy(inputs), torch.from_numpy(rng.integers(CLASSES, size=count)))


def make_task(section: object, seed: int) -> SmallTask:
    """What the plan of these tests names."""
    return SmallTask()


PLAN_TEXT = f"""
[task]
name = "{__name__}:make_task"
clients = {CLIENTS}
[federation]
clients_per_round = {CLIENTS}
sampling_rate = 0.5
rounds = 3
"""
NOISE = "privacy.noise_multiplier=1.0"
SOFT = np.full((CLASSES, CLASSES), 1 / CLASSES, dtype=np.float32)


def plan_of(*overrides: str) -> Plan:
    private = any(o.startswith("privacy") for o in overrides)
    return parse_plan(PLAN_TEXT, [*overrides, *([] if private else [NOISE])])


def layout_of() -> Layout:
    bare = Layout.of(SmallTask().student(""))
    return Layout.of(SmallTask().student(""), np.random.default_rng(0).random(bare.total) < 0.5)


class World:
    """A plan's messages, and sites that answer them with ledgers of their own."""

    def __init__(self, folder: Path, plan: Plan, soft: np.ndarray = SOFT) -> None:
        enter_task()
        torch.manual_seed(0)
        trained, student, local = layout_of(), SmallTask().student(""), plan.federation.local
        split, layers = split_of(trained, local.personal), personal_values(student, local.personal)
        self.folder, self.plan, self.layout = folder, plan, split.travels
        self.constants = Constants(trained.kept, soft, personal=layers).encode()
        codec = build_codec(plan.updates.broadcast, self.layout)
        weights, draws = split.shared(trained.read(student)), numpy_generator(0)
        self.model = codec.encode(weights, self.layout.blocks, draws)
        control = draws.normal(0, 0.02, self.layout.size).astype(np.float32)
        self.control = codec.encode(control, self.layout.blocks, draws)
        self.codec = build_codec(plan.updates.codec, self.layout)

    def order(self, number: int = 1, **changes: Any) -> dict[str, Any]:
        private, digest = self.plan.private, hashlib.sha256(self.constants).hexdigest()
        clip = private.clip if private else 0.0
        noise = 1.0 if private else 0.0
        order = Order(PROTOCOL, "run", self.plan.digest, number, digest, noise, 6.0, clip)
        return {**order.to_config(), **changes}

    def messages(self, number: int = 1, odd: dict[int, dict[str, Any]] | None = None) -> Any:
        """One message a client; those in ``odd`` get an order with other fields."""
        for client in range(CLIENTS):
            order = self.order(number, **(odd or {}).get(client, {}))
            content = RecordDict({"order": ConfigRecord(order), "broadcast": pack(self.model)})
            if self.plan.federation.local.scaffold:
                content["control"] = pack(self.control)
            message = Message(content, node_of(client), "train", group_id=str(number))
            message.metadata.__dict__["_message_id"] = str(client + 1)
            yield message

    def site(self, name: str) -> Site:
        devices = devices_for(self.plan, self.folder / name)
        site = Site(devices, self.plan.canonical(), Ledger.open(devices.ledger))
        site.keep_constants(self.constants)
        return site

    def rows(self, name: str) -> list[Any]:
        with Ledger.open(self.folder / name) as ledger:
            ledger.verify()
            return [(d, ledger.spent(d, 1e-5), ledger.events(d)) for d in ledger.devices()]


def payload(reply: Message) -> bytes | Refusal:
    if reply.has_error():
        code = Refusal(reply.error.code)
        assert reply.error.reason == code.text
        return code
    assert list(reply.content) == ["update"]
    return unpack(reply.content, "update")


def both(world: World, odd: dict[int, dict[str, Any]] | None = None) -> tuple[list[Any], list[Any]]:
    """Replies of every client answered alone, and together."""
    alone, together = world.site("alone"), world.site("together")
    found = [payload(alone.answer(m)) for m in world.messages(odd=odd)]
    many = [payload(reply) for reply in together.answer_many(world.messages(odd=odd))]
    alone.ledger.close()
    together.ledger.close()
    return found, many


SEVERAL = ("federation.steps_per_round=3", "federation.learning_rate=0.3")
PER_LAYER = "privacy.clipping=per-layer"
VARIANTS = [
    [],
    [PER_LAYER, NOISE],
    ["student.distill.local_weight=0.4"],
    ["student.quantize.bits=2"],
    ["privacy.unit=client", NOISE],
    ["privacy.trust=local", NOISE, "federation.steps_per_round=2"],
    ["privacy.trust=local", NOISE, 'updates.codec=["topk"]', "updates.error_feedback=true"],
    ["privacy.trust=local", NOISE, "federation.local.scaffold=true"],
    ["privacy.trust=local", NOISE, *SEVERAL, "federation.local.scaffold=true"],
    ["privacy.trust=local", NOISE, *SEVERAL, "federation.local.proximal=0.5", PER_LAYER],
    ["privacy.unit=client", NOISE, *SEVERAL, 'federation.local.personal=["6"]'],
    [
        *("privacy.unit=client", NOISE, *SEVERAL),
        *("federation.local.proximal=0.5", "student.distill.local_weight=0.4"),
    ],
]


@pytest.mark.parametrize("overrides", VARIANTS)
def test_answered_together_a_client_replies_what_it_does_alone(
    overrides: list[str], tmp_path: Path
) -> None:
    """Equal once decoded within one step, nearly everywhere exactly; refusals and ledgers equal."""
    world = World(tmp_path, plan_of(*overrides))
    alone, together = both(world)
    assert alone[MISSING] is together[MISSING] is Refusal.NO_DATA
    step = quantization_step(noisy_step(world.plan, Order.from_config(world.order()))) or 1e-3
    apart = 0
    for one, other in zip(alone, together, strict=True):
        if isinstance(one, Refusal):
            assert one is other
            continue
        decoded = [world.codec.decode(p, world.layout.blocks) for p in (one, other)]
        assert np.abs(decoded[0] - decoded[1]).max() <= step * 1.0001
        # Where the data set the grid, rounding moves all of it by a few parts in ten million.
        apart += int((~np.isclose(*decoded, rtol=1e-4, atol=1e-7)).sum())
    assert apart <= CLIENTS * world.layout.size // 100
    assert world.rows("alone") == world.rows("together")


def test_data_that_cannot_be_trained_on_fail_their_client_alone(tmp_path: Path) -> None:
    alone, together = both(World(tmp_path, plan_of()))
    assert alone[BROKEN] is together[BROKEN] is Refusal.FAILED
    assert sum(isinstance(p, Refusal) for p in together) == 2


def test_odd_orders_among_others_are_refused_as_they_are_alone(tmp_path: Path) -> None:
    odd: dict[int, dict[str, Any]] = {
        0: {"round": 1.0},
        2: {"plan": "0" * 64},
        6: {"constants": "0" * 64},
        7: {"noise_multiplier": 0.0},
        9: {"clip": 7.0},
    }
    world = World(tmp_path, plan_of())
    alone, together = both(world, odd)
    found = {i: p for i, p in enumerate(together) if isinstance(p, Refusal)}
    assert found == {i: p for i, p in enumerate(alone) if isinstance(p, Refusal)}
    assert set(odd) < set(found) and len(set(found.values())) >= 4
    assert world.rows("alone") == world.rows("together")


def test_devices_over_their_budget_are_not_trained(tmp_path: Path) -> None:
    world = World(tmp_path, plan_of(NOISE, "privacy.budget=1.0"))
    alone, together = both(world)
    assert alone == together
    assert set(together) == {Refusal.BUDGET}
    with Ledger.open(tmp_path / "together") as ledger:
        assert not ledger.devices()


def test_a_reply_depends_on_the_clients_of_its_block_alone(tmp_path: Path) -> None:
    """So it does not matter who answers the block, in which window or after what."""
    world = World(tmp_path, plan_of())
    whole = [payload(r) for r in world.site("whole").answer_many(world.messages())]
    blocks = [list(world.messages())[i : i + BLOCK] for i in range(0, CLIENTS, BLOCK)]
    assert len(blocks) == 3
    for order in (blocks, blocks[::-1]):
        site = world.site(f"blocks-{order is blocks}")
        found = {}
        for block in order:
            for message, reply in zip(block, site.answer_many(block), strict=True):
                found[message.metadata.dst_node_id] = payload(reply)
        assert [found[node_of(i)] for i in range(CLIENTS)] == whole


@pytest.mark.parametrize(("prefetch", "read"), [("false", BLOCK), ("true", 2 * BLOCK)])
def test_replies_come_as_their_blocks_are_done(prefetch: str, read: int, tmp_path: Path) -> None:
    world, taken = World(tmp_path, plan_of(f"engine.prefetch={prefetch}")), []

    def watched() -> Any:
        for message in world.messages():
            taken.append(message)
            yield message

    next(iter(world.site("lazy").answer_many(watched())))
    assert len(taken) == read


def test_it_is_said_which_plans_are_trained_one_by_one() -> None:
    """A function of public constants: the plan, the student, and an expected batch of 6 here."""
    task, local, larger = SmallTask(), ("privacy.trust=local", NOISE), SmallTask(32)
    for overrides in VARIANTS:
        assert trained_alone(plan_of(*overrides), task) is None
    assert LocalTrainer(plan_of(), task, Constants(b"", SOFT)).alone is None

    def reason(rate: float, *overrides: str) -> str | None:
        return trained_alone(plan_of(*overrides, f"federation.sampling_rate={rate}"), larger)

    assert reason(0.5, *local, *SEVERAL) is None
    assert "to the bit" in (reason(0.5, "privacy=off") or "")
    large = "batch of 19.2 examples is above 16"
    for overrides in ((*local, *SEVERAL), ("privacy.unit=client", NOISE)):
        assert large in (reason(0.6, *overrides) or "")
    assert reason(1.0) is None and reason(1.0, *local, "federation.local.scaffold=true") is None


class Asking(nn.Linear):
    """Looks at a value, which torch.func does not let it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore
        return super().forward(x if float(x.sum()) > 0 else -x)


@pytest.mark.parametrize(
    ("layers", "bounded", "plain"),
    [
        ((OneHot(4), LastGRU(4, 6), nn.Linear(6, CLASSES)), "", "6 examples is above 4"),
        (
            (OneHot(4), LastGRU(4, 99), nn.Linear(99, CLASSES)),
            "6 examples with 31,485 parameters each is above 131,072",
            "6 examples is above 4",
        ),
        ((nn.Flatten(), nn.Linear(5, CLASSES)), "", "without convolutions"),
        ((nn.Linear(5, 30_000), nn.Linear(30_000, CLASSES)), "270,003 param", "270,003 param"),
    ],
)
def test_students_for_which_it_would_not_pay_are_trained_one_by_one(
    layers: tuple[nn.Module, ...], bounded: str, plain: str
) -> None:
    class Other(SmallTask):
        def student(self, model: str) -> nn.Module:
            return nn.Sequential(*layers)

    task, fixed = Other(shape=(5,)), ("student.quantize.kind=none", "student.prune.kind=none")
    assert trained_alone(plan_of(*fixed), task) is None
    several = plan_of(*fixed, "privacy.trust=local", NOISE, *SEVERAL)
    unbounded = plan_of(*fixed, "privacy.unit=client", NOISE)
    for plan, reason in ((several, bounded), (unbounded, plain)):
        found = trained_alone(plan, task)
        assert (reason in (found or "")) if reason else found is None


def test_students_that_are_no_chain_have_small_batches_in_common_passes_where_that_pays() -> None:
    """Where nothing is bounded it does not with an LSTM, which torch has a kernel for."""

    def reason(*layers: nn.Module) -> str | None:
        class Other(SmallTask):
            def student(self, model: str) -> nn.Module:
                return nn.Sequential(*layers)

        fixed = ("student.quantize.kind=none", "student.prune.kind=none")
        plan = plan_of(*fixed, "privacy.unit=client", NOISE, "federation.sampling_rate=0.3")
        return trained_alone(plan, Other(shape=(5,)))

    last = nn.Linear(6, CLASSES)
    assert reason(OneHot(4), LastGRU(4, 6), last) is None
    assert "LSTM of one client" in (reason(OneHot(4), LastLSTM(4, 6), last) or "")
    assert "item" in (reason(Asking(5, CLASSES)) or "")


def test_a_device_alone_is_trained_by_the_plain_loop() -> None:
    plan = plan_of("privacy.unit=client", NOISE, *SEVERAL)
    trainer = LocalTrainer(plan, SmallTask(), Constants(b"", SOFT))
    assert "_together" not in vars(trainer)
    start, step = trainer.layout.read(SmallTask().student("")), NoisyStep(None, 0.0, 6.0)
    clients = [Client(drawn(i, 9), SeededRandomness(0), ("run", i, 1)) for i in range(2)]
    trainer.pseudo_gradients(start, clients[:1], step)
    assert "_together" not in vars(trainer)
    trainer.pseudo_gradients(start, clients, step)
    assert "_together" in vars(trainer)
