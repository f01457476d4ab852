"""Client-level privacy on the device: what is charged, bounded, encoded and refused."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from reticent.client.environment import Environment
from reticent.client.order import Refused, round_event
from reticent.client.round import run_round
from reticent.client.training import student_model
from reticent.compression.codec import build_codec
from reticent.core.plan import Plan, parse_plan
from reticent.core.protocol import PROTOCOL, Constants, Order, Refusal
from reticent.core.seeds import numpy_generator
from reticent.core.tasks import load_task
from reticent.core.update import Layout
from reticent.privacy.calibrate import max_rounds
from reticent.privacy.client_level import CLIP_RANGE, is_within, split_bit
from reticent.privacy.events import Composed, Event, PoissonGaussian, gaussian, merge
from reticent.privacy.ledger import Budget, Ledger
from reticent.privacy.randomness import SeededRandomness, SystemRandomness
from reticent.privacy.schedule import schedule_for

CLIP = 0.05
GIVEN = [
    "task.name=digits",
    "task.clients=30",
    "task.public_examples=200",
    "federation.clients_per_round=30",
    "federation.rounds=3",
    "federation.steps_per_round=3",
    "federation.learning_rate=0.1",
    "federation.sampling_rate=0.5",
    'updates.codec=["identity"]',
    'updates.broadcast=["identity"]',
    "privacy.unit=client",
    "privacy.noise_multiplier=1.0",
    f"privacy.clip={CLIP}",
]
FIXED = parse_plan("", GIVEN)
ADAPTIVE = parse_plan("", [*GIVEN, "privacy.clip_quantile=0.5"])
EXAMPLE = parse_plan("", [*GIVEN, "privacy.unit=example", "federation.steps_per_round=1"])
TASK = load_task(FIXED.task, FIXED.seed)
CONSTANTS = Constants(b"", np.zeros((0, 0), dtype=np.float32)).encode()
MODEL = student_model(TASK, FIXED)
LAYOUT = Layout.of(MODEL)
CODEC = build_codec(("identity",))
START = (0.1 * numpy_generator(0, "start").standard_normal(LAYOUT.size)).astype(np.float32)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    torch.set_num_threads(1)
    with Ledger.open(tmp_path / "ledger") as opened:
        yield opened


def order_of(plan: Plan, clip: float = CLIP, number: int = 1, noise: float = 1.0) -> Order:
    digest = hashlib.sha256(CONSTANTS).hexdigest()
    denominator = plan.federation.sampling_rate * TASK.nominal_examples
    return Order(PROTOCOL, "run", plan.digest, number, digest, noise, denominator, clip)


def run(
    plan: Plan,
    ledger: Ledger,
    order: Order,
    start: np.ndarray = START,
    limit: float = math.inf,
    system: bool = False,
) -> tuple[bytes, Event]:
    source = SystemRandomness() if system else SeededRandomness(0)
    device = Environment(4, "device", ledger, Budget(limit, 1e-5), source, system)
    payload = CODEC.encode(start, LAYOUT.blocks, numpy_generator(0))
    released = run_round(order, plan.canonical(), CONSTANTS, payload, device)
    return released.value, released.event


def test_the_released_update_is_within_the_orders_bound(ledger: Ledger) -> None:
    payload, _ = run(FIXED, ledger, order_of(FIXED))
    update = CODEC.decode(payload, LAYOUT.blocks)
    norm = float(np.linalg.norm(update.astype(np.float64)))
    assert norm == pytest.approx(CLIP, rel=1e-6), "the update was not long enough to be bounded"


def plain_update(steps: int) -> np.ndarray:
    """Ordinary local SGD by hand: Poisson batches, public denominator, no clipping, no noise."""
    examples, rate = TASK.client(4), FIXED.federation.sampling_rate
    weights, moved = START, np.zeros(LAYOUT.size)
    for index in range(steps):
        stream = SeededRandomness(0).stream("batch", "run", 4, 1, index)
        batch = torch.from_numpy(stream.uniform(len(examples.labels)) < rate)
        LAYOUT.write(MODEL, weights)
        MODEL.zero_grad()
        torch.nn.functional.cross_entropy(
            MODEL(examples.inputs[batch]), examples.labels[batch], reduction="sum"
        ).backward()
        gradients = [p.grad for p in MODEL.parameters() if p.grad is not None]
        gradient = LAYOUT.gather(gradients).astype(np.float64)
        gradient /= rate * TASK.nominal_examples
        moved += gradient
        weights = (weights - FIXED.federation.learning_rate * gradient).astype(np.float32)
    return moved.astype(np.float32)


def test_below_the_bound_it_is_ordinary_local_training(ledger: Ledger) -> None:
    plan = parse_plan("", [*GIVEN, "privacy.clip=1000.0", "student.quantize.kind=none"])
    payload, _ = run(plan, ledger, order_of(plan, clip=1000.0))
    found = CODEC.decode(payload, LAYOUT.blocks)
    assert np.array_equal(found, plain_update(FIXED.federation.steps_per_round))


@pytest.mark.parametrize(("clip", "inside"), [(1e-4, False), (40.0, True)])
def test_an_adaptive_round_tells_whether_the_update_was_within_its_bound(
    ledger: Ledger, clip: float, inside: bool
) -> None:
    bit, payload = split_bit(run(ADAPTIVE, ledger, order_of(ADAPTIVE, clip))[0])
    update = CODEC.decode(payload, LAYOUT.blocks)
    assert bit is inside
    assert is_within(update.astype(np.float64) * (1 - 1e-6), clip)


@pytest.mark.parametrize("bad", [1e38, -1e38])
def test_an_update_that_is_not_finite_is_released_as_zeros(ledger: Ledger, bad: float) -> None:
    wild = START.copy()
    wild[::3] = bad
    bit, payload = split_bit(run(ADAPTIVE, ledger, order_of(ADAPTIVE), wild)[0])
    assert bit and not CODEC.decode(payload, LAYOUT.blocks).any()


def test_a_fixed_round_is_charged_as_one_gaussian_of_the_servers_noise(ledger: Ledger) -> None:
    _, event = run(FIXED, ledger, order_of(FIXED, noise=1.3))
    assert event == gaussian(1.3, unit="client")
    assert ledger.events("device") == [event]


def test_an_adaptive_round_is_charged_for_the_update_and_the_bit(ledger: Ledger) -> None:
    _, event = run(ADAPTIVE, ledger, order_of(ADAPTIVE))
    z = (1.0 - (2 * 30 / 20) ** -2) ** -0.5
    assert isinstance(event, Composed) and event.count == 1
    parts = _gaussians(event)
    assert [p.noise_multiplier for p in parts] == pytest.approx([z, 3.0], rel=1e-12)
    assert parts == [gaussian(p.noise_multiplier, unit="client") for p in parts]
    assert ledger.spent("device", 1e-5) > 0


def _gaussians(event: Event) -> list[PoissonGaussian]:
    return [e for e in merge([event]) if isinstance(e, PoissonGaussian)]


@pytest.mark.parametrize("relation", ["add-or-remove-one", "replace-one"])
@pytest.mark.parametrize("base", [FIXED, ADAPTIVE, EXAMPLE])
def test_device_and_server_mean_the_same_event(base: Plan, relation: str) -> None:
    privacy = base.private
    assert privacy is not None
    changed = privacy.model_copy(update={"relation": relation})
    plan = base.model_copy(update={"privacy": changed})
    schedule = schedule_for(plan)
    assert schedule is not None
    event = round_event(plan, schedule.noise_multiplier)
    assert event == schedule.round_event()
    assert {(e.relation, e.unit) for e in _gaussians(event)} == {(relation, privacy.unit)}


def test_several_rounds_stop_at_the_budget(ledger: Ledger) -> None:
    schedule = schedule_for(ADAPTIVE)
    assert schedule is not None
    limit = 9.0
    fit = max_rounds(limit, 1e-5, schedule.round_event())
    assert fit >= 2
    for number in range(1, fit + 1):
        run(ADAPTIVE, ledger, order_of(ADAPTIVE, number=number), limit=limit)
    with pytest.raises(Refused) as caught:
        run(ADAPTIVE, ledger, replace(order_of(ADAPTIVE), run="another"), limit=limit)
    assert caught.value.refusal is Refusal.BUDGET
    assert ledger.spent("device", 1e-5) <= limit


BAD_CLIPS = [
    (FIXED, CLIP * 1.01),
    (FIXED, 0.0),
    (ADAPTIVE, CLIP * CLIP_RANGE * 1.01),
    (ADAPTIVE, CLIP / CLIP_RANGE * 0.99),
    (ADAPTIVE, 0.0),
    (EXAMPLE, CLIP * 2),
    (parse_plan("", [*GIVEN[:10], "privacy=off"]), CLIP),
]


@pytest.mark.parametrize(("plan", "clip"), BAD_CLIPS)
def test_an_order_with_another_bound_is_refused_before_it_is_charged(
    ledger: Ledger, plan: Plan, clip: float
) -> None:
    noise = 1.0 if plan.private else 0.0
    with pytest.raises(Refused) as caught:
        run(plan, ledger, order_of(plan, clip, noise=noise))
    assert caught.value.refusal is Refusal.BAD_ORDER
    assert ledger.devices() == []


def test_an_order_whose_count_would_reveal_too_much_is_refused(ledger: Ledger) -> None:
    with pytest.raises(Refused) as caught:
        run(ADAPTIVE, ledger, order_of(ADAPTIVE, noise=3.0))
    assert caught.value.refusal is Refusal.BAD_ORDER
    assert ledger.devices() == []


def test_a_ledger_that_counts_in_another_unit_is_not_charged(ledger: Ledger) -> None:
    earlier = gaussian(1.0, unit="example")
    ledger.charge("device", "other", 1, earlier, Budget(math.inf, 1e-5))
    with pytest.raises(Refused) as caught:
        run(FIXED, ledger, order_of(FIXED), limit=50.0)
    assert caught.value.refusal is Refusal.LEDGER
    assert ledger.events("device") == [earlier]


def test_a_retry_on_a_real_device_sends_the_stored_bytes(ledger: Ledger) -> None:
    first, _ = run(ADAPTIVE, ledger, order_of(ADAPTIVE), system=True)
    spent = ledger.spent("device", 1e-5)
    again, _ = run(ADAPTIVE, ledger, order_of(ADAPTIVE), system=True)
    assert again == first and ledger.spent("device", 1e-5) == spent
