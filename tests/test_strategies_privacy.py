"""What local rules and device-kept layers may not change: sensitivity, noise, who knows what."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from torch import nn

from reticent.client.environment import Environment
from reticent.client.kept import Kept
from reticent.client.local_rules import LocalRule, variate_after
from reticent.client.order import Refused
from reticent.client.round import run_round
from reticent.client.training import LocalTrainer, NoisyStep
from reticent.compression.codec import build_codec
from reticent.core.errors import PayloadError, PlanError
from reticent.core.personal import split_of
from reticent.core.plan import Plan, parse_plan
from reticent.core.protocol import PROTOCOL, Constants, Order, Refusal
from reticent.core.seeds import numpy_generator
from reticent.core.tasks import Examples
from reticent.core.update import Layout
from reticent.privacy.client_level import split_bit
from reticent.privacy.ledger import Budget, Ledger
from reticent.privacy.randomness import SeededRandomness
from reticent.simulations.audit import audit_plan
from reticent.simulations.compress.rehearsal import require_rehearsal

INPUTS, CLASSES, CLIP, SIGMA, DENOMINATOR = 40, 100, 0.3, 1.5, 10.0
PERSONAL_SIZE = INPUTS * CLASSES
SOFT = np.zeros((0, 0), dtype=np.float32)
LAYERS = (0.1 * numpy_generator(0, "layers").standard_normal(PERSONAL_SIZE)).astype(np.float32)
PLAN_TEXT = f"""
[task]
name = "{__name__}:make_task"
clients = 10
[student]
distill = {{ kind = "none" }}
prune = {{ kind = "none" }}
quantize = {{ kind = "none" }}
[federation]
rounds = 5
clients_per_round = 10
sampling_rate = 1.0
learning_rate = 0.1
steps_per_round = 2
[updates]
codec = ["identity"]
broadcast = ["identity"]
"""
LOCAL = ["privacy.trust=local", f"privacy.noise_multiplier={SIGMA}", f"privacy.clip={CLIP}"]
CLIENT = ["privacy.unit=client", f"privacy.noise_multiplier={SIGMA}", f"privacy.clip={CLIP}"]
SCAFFOLD, PERSONAL = "federation.local.scaffold=true", 'federation.local.personal=["weight"]'
NEVER = "federation.sampling_rate=1e-12"  # every batch is empty


def examples_of(count: int, seed: int = 0, scale: float = 1.0) -> Examples:
    rng = numpy_generator(seed, "examples")
    inputs = (scale * rng.standard_normal((count, INPUTS))).astype(np.float32)
    return Examples(torch.from_numpy(inputs), torch.from_numpy(rng.integers(CLASSES, size=count)))


class WideTask:
    """A linear student: 4,000 weights, which the plans here keep on the device, and 100 biases."""

    name, classes, input_shape, clients, nominal_examples = "wide", CLASSES, (INPUTS,), 10, 20

    def public(self) -> Examples:
        return examples_of(20, 100)

    def test(self) -> Examples:
        return examples_of(20, 101)

    def client(self, index: int) -> Examples:
        return examples_of(20, index)

    def teacher(self) -> nn.Module:
        return nn.Linear(INPUTS, CLASSES)

    def student(self, model: str) -> nn.Module:
        return nn.Linear(INPUTS, CLASSES)


def make_task(section: object, seed: int) -> WideTask:
    """What the plan of these tests names."""
    return WideTask()


def plan_of(*overrides: str) -> Plan:
    return parse_plan(PLAN_TEXT, overrides)


def trainer_of(plan: Plan) -> LocalTrainer:
    layers = LAYERS if plan.federation.local.personal else LAYERS[:0]
    return LocalTrainer(plan, WideTask(), Constants(b"", SOFT, personal=layers))


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    torch.set_num_threads(1)
    with Ledger.open(tmp_path / "ledger") as opened:
        yield opened


def run(
    plan: Plan, ledger: Ledger, control: NDArray[np.float32] | None, device: str = "device"
) -> bytes:
    """Run round 2 of client 4 and return what it releases."""
    trainer, codec = trainer_of(plan), build_codec(("identity",))
    blocks = trainer.split.travels.blocks
    layers = LAYERS if plan.federation.local.personal else LAYERS[:0]
    constants = Constants(b"", SOFT, personal=layers).encode()
    digest = hashlib.sha256(constants).hexdigest()
    order = Order(PROTOCOL, "run", plan.digest, 2, digest, SIGMA, DENOMINATOR, CLIP)
    home = Environment(4, device, ledger, Budget(math.inf, 1e-5), SeededRandomness(0), False)
    start = codec.encode(np.zeros(sum(blocks), np.float32), blocks, numpy_generator(0))
    sent = b"" if control is None else codec.encode(control, blocks, numpy_generator(0))
    return run_round(order, plan.canonical(), constants, start, home, control=sent).value


def leave(ledger: Ledger, what: str, vector: NDArray[np.float32], device: str = "device") -> Kept:
    """Store ``vector`` as what round 1 of the device left."""
    store = Kept(ledger.folder / what, device, "run")
    store.keep(1, vector)
    return store


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e6, 1e30])
def test_with_unit_client_an_update_is_bounded_whatever_the_device_kept(
    ledger: Ledger, scale: float
) -> None:
    """Sensitivity with adversarial c, c_i and personal layers: at most the clip, one bit beside."""
    many = ["task.clients=100", "federation.clients_per_round=100", "privacy.clip_quantile=0.5"]
    plan = plan_of(*CLIENT, SCAFFOLD, PERSONAL, *many)
    evil = numpy_generator(1).standard_normal(PERSONAL_SIZE).astype(np.float32) * np.float32(scale)
    leave(ledger, "control", evil[:CLASSES])
    leave(ledger, "personal", evil)
    _, payload = split_bit(run(plan, ledger, -evil[:CLASSES]))
    update = build_codec(("identity",)).decode(payload, (CLASSES,)).astype(np.float64)
    assert float(np.linalg.norm(update)) <= CLIP * (1 + 1e-6)


def test_what_a_device_sends_depends_on_no_other_devices_state(ledger: Ledger) -> None:
    plan = plan_of(*CLIENT, SCAFFOLD, PERSONAL)
    zero = np.zeros(CLASSES, np.float32)
    leave(ledger, "control", zero + 0.25)
    alone = run(plan, ledger, zero)
    leave(ledger, "control", zero + 7, device="other")
    leave(ledger, "personal", LAYERS * 3, device="other")
    assert run(plan, ledger, zero) == alone
    leave(ledger, "control", zero + 0.5)
    assert run(plan, ledger, zero) != alone, "its own state has no effect"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(-3, 6), st.floats(-3, 6))
def test_with_unit_example_one_example_moves_a_step_by_the_clip_whatever_is_added(
    seed: int, drift: float, layers: float
) -> None:
    """The same noise, drift and personal layers, and one example more: at most C over the sum."""
    plan = plan_of(*LOCAL, PERSONAL, "federation.steps_per_round=1")
    trainer, rng = trainer_of(plan), np.random.default_rng(seed)
    rule = LocalRule(drift=10.0**drift * rng.standard_normal(trainer.layout.size))
    start = trainer.split.whole(
        rng.standard_normal(CLASSES).astype(np.float32),
        (10.0**layers * rng.standard_normal(PERSONAL_SIZE)).astype(np.float32),
    )
    many = examples_of(6, seed, scale=100.0)
    few = Examples(many.inputs[:5], many.labels[:5])
    step, moved = NoisyStep(CLIP, 0.0, DENOMINATOR), []
    for held in (many, few):
        noised = trainer.pseudo_gradient(start, held, step, SeededRandomness(1), ("p",), rule)
        moved.append(noised.astype(np.float64))
    rounding = 1e-6 * 10.0**drift * math.sqrt(trainer.layout.size)
    assert np.linalg.norm(moved[0] - moved[1]) <= CLIP / DENOMINATOR * (1 + 1e-4) + rounding


@pytest.mark.parametrize(("wrong", "fits"), [(1.0, True), (2 / 3, False)])
def test_personal_layers_are_trained_by_noised_steps(
    ledger: Ledger, wrong: float, fits: bool
) -> None:
    """On empty batches they move by the noise, at its whole scale (two thirds are rejected)."""
    run(plan_of(*LOCAL, PERSONAL, NEVER), ledger, None)
    moved = Kept(ledger.folder / "personal", "device", "run").before(3, LAYERS) - LAYERS
    assert len(moved) == PERSONAL_SIZE
    deviation = wrong * 0.1 * math.sqrt(2) * SIGMA * CLIP / DENOMINATOR
    assert bool(stats.kstest(moved / deviation, "norm").pvalue > 1e-4) is fits


def test_control_variates_are_added_to_the_noised_gradient_and_take_no_noise_away() -> None:
    plan = plan_of(*LOCAL, NEVER)
    trainer = trainer_of(plan)
    drift = numpy_generator(2).standard_normal(trainer.layout.size)
    step, start = NoisyStep(CLIP, SIGMA * CLIP, DENOMINATOR), np.zeros(trainer.layout.size, "f4")
    source, nobody = SeededRandomness(3), examples_of(0)
    plain = trainer.pseudo_gradient(start, nobody, step, source, ("p",))
    found = trainer.pseudo_gradient(start, nobody, step, source, ("p",), LocalRule(drift=drift))
    assert plain.any()
    np.testing.assert_allclose(found - 2 * drift, plain, atol=1e-6)


@pytest.mark.parametrize("unit", [LOCAL, CLIENT], ids=["example", "client"])
def test_a_device_keeps_of_its_update_what_the_server_reads(
    ledger: Ledger, unit: list[str]
) -> None:
    """So with unit example the variate it keeps is a function of what it released."""
    own, control = (numpy_generator(n).standard_normal(CLASSES).astype("f4") for n in (5, 6))
    store = leave(ledger, "control", own)
    payload = run(plan_of(*unit, SCAFFOLD, PERSONAL), ledger, control)
    sent = build_codec(("identity",)).decode(payload, (CLASSES,))
    assert (store.before(3, own) == variate_after(own, control, sent, 2)).all()


def test_a_round_that_is_trained_again_begins_with_the_same_state(ledger: Ledger) -> None:
    plan, control = plan_of(*CLIENT, SCAFFOLD, PERSONAL), np.ones(CLASSES, np.float32)
    leave(ledger, "control", control / 2)
    assert run(plan, ledger, control) == run(plan, ledger, control)


@pytest.mark.parametrize("payload", [None, np.zeros(CLASSES - 1, np.float32)])
def test_an_order_without_the_servers_variate_is_refused(
    ledger: Ledger, payload: NDArray[np.float32] | None
) -> None:
    with pytest.raises((Refused, PayloadError)) as refused:
        run(plan_of(*CLIENT, SCAFFOLD, PERSONAL), ledger, payload)
    if payload is None:
        assert refused.value.refusal == Refusal.BAD_BROADCAST  # type: ignore[union-attr]
    assert not ledger.devices(), "charged for a round that cannot be trained"


@pytest.mark.parametrize("size", [0, PERSONAL_SIZE - 1])
def test_constants_with_other_personal_layers_are_refused(size: int) -> None:
    with pytest.raises(PayloadError, match="the size of the personal layers"):
        LocalTrainer(
            plan_of(*CLIENT, PERSONAL), WideTask(), Constants(b"", SOFT, personal=LAYERS[:size])
        )


def test_constants_carry_personal_layers_and_refuse_what_is_not_finite() -> None:
    given = Constants(b"", SOFT, personal=LAYERS)
    assert (Constants.decode(given.encode()).personal == LAYERS).all()
    assert Constants(b"", SOFT).encode() == Constants(b"", SOFT, personal=LAYERS[:0]).encode()
    with pytest.raises(PayloadError, match=r"constants\.personal holds non-finite"):
        Constants.decode(Constants(b"", SOFT, personal=LAYERS * np.float32(np.inf)).encode())


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_the_parts_of_a_masked_model_make_the_whole(seed: int, masked: bool) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    rng = np.random.default_rng(seed)
    bare = Layout.of(model)
    layout = Layout.of(model, rng.random(bare.total) < 0.6) if masked else bare
    split = split_of(layout, ["2", "4.bias"])
    vector = rng.standard_normal(layout.size).astype(np.float32)
    shared, personal = split.shared(vector), split.personal(vector)
    assert split.travels.size == len(shared) == sum(split.travels.blocks)
    assert split.travels.names == ("0.weight", "0.bias", "4.weight")
    assert (split.whole(shared, personal) == vector).all()
    assert (split.spread(shared.astype(np.float64)) == split.whole(shared, 0 * personal)).all()
    values = np.concatenate([p.detach().numpy().reshape(-1) for p in [*model[2].parameters()]])
    values = np.concatenate([values, model[4].bias.detach().numpy()]).astype(np.float32)
    assert (split.kept(values) == split.personal(layout.read(model))).all()
    everything = split_of(layout, [])
    assert everything.travels == layout
    assert (everything.shared(vector) == vector).all()
    assert (everything.whole(vector, vector[:0]) == vector).all()


@pytest.mark.parametrize("unit", [LOCAL, CLIENT], ids=["example", "client"])
def test_such_plans_can_be_audited(unit: list[str]) -> None:
    plan = plan_of(*unit, SCAFFOLD, PERSONAL)
    assert audit_plan(plan, canaries=40, rounds=1, seed=0).verdict == "consistent"


def test_such_plans_are_not_rehearsed() -> None:
    require_rehearsal(plan_of(*LOCAL))
    with pytest.raises(PlanError, match=r"federation\.local: a search rehearses"):
        require_rehearsal(plan_of(*LOCAL, SCAFFOLD))
