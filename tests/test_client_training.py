"""Local training: what is drawn, what is added, and what nothing may depend on."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import nn
from torch.nn import functional as F

from reticent.client.environment import Environment
from reticent.client.round import run_round
from reticent.client.training import (
    LocalTrainer,
    NoisyStep,
    require_whole_gradients,
    student_model,
    trained_alone,
)
from reticent.client.wire import noisy_step, quantization_step
from reticent.compression.codec import build_codec
from reticent.core.errors import DataError, PayloadError
from reticent.core.plan import Plan, parse_plan
from reticent.core.protocol import PROTOCOL, Constants, Order
from reticent.core.seeds import numpy_generator
from reticent.core.tasks import Examples
from reticent.core.update import Vector
from reticent.privacy.ledger import Budget, Ledger
from reticent.privacy.randomness import SeededRandomness

INPUTS, CLASSES = 40, 100
PATH = ("run", 0, 1)


def examples_of(count: int, seed: int = 0) -> Examples:
    rng = numpy_generator(seed, "examples")
    inputs = rng.standard_normal((count, INPUTS)).astype(np.float32)
    return Examples(torch.from_numpy(inputs), torch.from_numpy(rng.integers(CLASSES, size=count)))


class WideTask:
    """A linear student of 4,100 parameters, enough of them to test a distribution."""

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


PLAN_TEXT = f"""
[task]
name = "{__name__}:make_task"
clients = 10
[student]
distill = {{ kind = "response", temperature = 3.0 }}
prune = {{ kind = "none" }}
quantize = {{ kind = "none" }}
[federation]
rounds = 5
clients_per_round = 10
sampling_rate = 0.5
[updates]
codec = ["identity"]
broadcast = ["identity"]
"""
NEVER = "federation.sampling_rate=1e-12"  # every batch is empty
ALWAYS = "federation.sampling_rate=1.0"
NO_SOFT = np.zeros((0, 0), dtype=np.float32)


def plan_of(*overrides: str) -> Plan:
    given = [o for o in overrides if o.startswith("privacy")] or ["privacy.noise_multiplier=1.5"]
    return parse_plan(PLAN_TEXT, [*overrides, *given])


def trainer_of(plan: Plan, soft: NDArray[np.float32] = NO_SOFT) -> LocalTrainer:
    return LocalTrainer(plan, WideTask(), Constants(b"", soft))


def start_of(trainer: LocalTrainer, scale: float = 0.1) -> Vector:
    draws = numpy_generator(0, "start").standard_normal(trainer.layout.size)
    return (scale * draws).astype(np.float32)


def order_of(plan: Plan, constants: bytes = b"", number: int = 1, noise: float = 1.5) -> Order:
    digest = hashlib.sha256(constants).hexdigest()
    clip = plan.private.clip if plan.private else 0.0
    return Order(PROTOCOL, "run", plan.digest, number, digest, noise, 10.0, clip)


def update(
    plan: Plan,
    step: NoisyStep,
    examples: Examples,
    soft: NDArray[np.float32] = NO_SOFT,
    path: tuple[str | int, ...] = PATH,
) -> Vector:
    trainer = trainer_of(plan, soft)
    return trainer.pseudo_gradient(start_of(trainer), examples, step, SeededRandomness(7), path)


def model_at(weights: Vector) -> nn.Linear:
    model = nn.Linear(INPUTS, CLASSES)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(weights[: INPUTS * CLASSES]).view(CLASSES, INPUTS))
        model.bias.copy_(torch.from_numpy(weights[INPUTS * CLASSES :]))
    return model


def gradient(loss: torch.Tensor, model: nn.Module) -> NDArray[np.float64]:
    parts = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([p.reshape(-1) for p in parts]).numpy().astype(np.float64)


def drawn(rate: float, count: int, index: int = 0) -> NDArray[np.int64]:
    uniform = SeededRandomness(7).stream("batch", *PATH, index).uniform(count)
    return np.flatnonzero(uniform < rate)


@pytest.mark.parametrize(
    ("overrides", "share"),
    [
        (("federation.min_replies=4", "privacy.noise_multiplier=1.5"), 1.5 * 0.5 / 4**0.5),
        (("privacy.noise_multiplier=1.5", "privacy.clip=2.0"), 1.5 * 2.0 / 9**0.5),
        (("privacy.noise_multiplier=1.5", 'privacy.trust="local"'), 1.5 * 0.5),
    ],
)
def test_an_empty_batch_gets_exactly_the_share_of_noise(
    overrides: tuple[str, ...], share: float
) -> None:
    plan = plan_of(NEVER, *overrides)
    noise = update(plan, noisy_step(plan, order_of(plan)), examples_of(20))
    scale = share / 10.0
    assert stats.kstest(noise, "norm", (0, scale)).pvalue > 1e-3
    assert stats.kstest(noise, "norm", (0, scale * 2 / 3)).pvalue < 1e-6
    assert stats.kstest(noise, "norm", (0, scale * 3 / 2)).pvalue < 1e-6


def test_a_client_without_examples_sends_noise_too() -> None:
    plan = plan_of(ALWAYS)
    noise = update(plan, noisy_step(plan, order_of(plan)), examples_of(0))
    scale = 1.5 * 0.5 / 9**0.5 / 10.0
    assert stats.kstest(noise, "norm", (0, scale)).pvalue > 1e-3
    assert stats.kstest(noise, "norm", (0, scale * 2 / 3)).pvalue < 1e-6


def test_no_two_clients_or_rounds_share_noise(tmp_path: Path) -> None:
    plan = plan_of(NEVER)
    constants = Constants(b"", NO_SOFT).encode()
    trainer = trainer_of(plan)
    codec = build_codec(("identity",))
    payload = codec.encode(start_of(trainer), trainer.layout.blocks, numpy_generator(0))
    rows: list[Vector] = []
    with Ledger.open(tmp_path) as ledger:
        for client, number in itertools.product(range(3), range(1, 4)):
            budget, randomness = Budget(float("inf"), 1e-5), SeededRandomness(7)
            device = Environment(client, str(client), ledger, budget, randomness, False)
            order = order_of(plan, constants, number)
            released = run_round(order, plan.canonical(), constants, payload, device)
            rows.append(codec.decode(released.value, trainer.layout.blocks))
    correlation = np.corrcoef(np.stack(rows)) - np.eye(len(rows))
    assert np.abs(correlation).max() < 5.5 / trainer.layout.size**0.5


def test_local_steps_draw_fresh_noise_each() -> None:
    plan = plan_of(
        NEVER,
        "federation.steps_per_round=4",
        "privacy.noise_multiplier=1.5",
        'privacy.trust="local"',
    )
    total = update(plan, noisy_step(plan, order_of(plan)), examples_of(20))
    scale = 1.5 * 0.5 / 10.0
    assert stats.kstest(total, "norm", (0, scale * 2)).pvalue > 1e-3  # sqrt(4), not 4
    assert stats.kstest(total, "norm", (0, scale * 4)).pvalue < 1e-6


def test_the_scale_of_the_noise_and_the_size_of_the_payload_ignore_the_number_of_examples() -> None:
    plan = plan_of(ALWAYS)
    step = noisy_step(plan, order_of(plan))
    silent = NoisyStep(step.clip, 0.0, step.denominator)
    noises, sizes = [], set()
    for count in (5, 50):
        examples = examples_of(count)
        noised = update(plan, step, examples)
        noises.append(noised - update(plan, silent, examples))
        generator = numpy_generator(0)
        blocks = trainer_of(plan).layout.blocks
        codec = build_codec(("dither4",))
        bound = quantization_step(step)
        small = np.clip(noised, -3 * (bound or 0), 3 * (bound or 0)).astype(np.float32)
        sizes.add(len(codec.encode(small, blocks, generator, bound)))
        sizes.add(len(build_codec(("identity",)).encode(noised, blocks, generator)) + 10**6)
    np.testing.assert_allclose(noises[0], noises[1], atol=1e-6)
    assert len(sizes) == 2  # one size for each codec
    scale = step.noise / step.denominator
    assert stats.kstest(noises[1], "norm", (0, scale)).pvalue > 1e-3
    assert stats.kstest(noises[1], "norm", (0, scale / 10)).pvalue < 1e-6  # divided by 5/50


def test_the_sum_is_divided_by_the_public_denominator_only() -> None:
    plan = plan_of(ALWAYS)
    few = examples_of(5)
    many = Examples(few.inputs.repeat(10, 1), few.labels.repeat(10))
    step = NoisyStep(0.5, 0.0, 10.0)
    once = update(plan, step, few)
    np.testing.assert_allclose(update(plan, step, many), 10 * once, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(update(plan, NoisyStep(0.5, 0.0, 20.0), few), once / 2, rtol=1e-6)
    assert np.linalg.norm(10.0 * once) <= 5 * 0.5 * 1.0001


def test_privacy_off_is_the_plain_gradient_sum_of_the_same_batch() -> None:
    plan = plan_of("privacy=off")
    examples = examples_of(20)
    step = noisy_step(plan, order_of(plan, noise=0.0))
    assert step == NoisyStep(None, 0.0, 10.0)
    got = update(plan, step, examples)
    batch = torch.from_numpy(drawn(0.5, 20))
    assert 0 < len(batch) < 20
    model = model_at(start_of(trainer_of(plan)))
    outputs = model(examples.inputs[batch])
    loss = F.cross_entropy(outputs, examples.labels[batch], reduction="sum")
    np.testing.assert_allclose(got, gradient(loss, model) / 10.0, rtol=1e-4, atol=1e-7)


def test_a_clip_above_every_norm_and_no_noise_is_privacy_off() -> None:
    plan, examples = plan_of(), examples_of(20)
    clipped = update(plan, NoisyStep(1e6, 0.0, 10.0), examples)
    plain = update(plan_of("privacy=off"), NoisyStep(None, 0.0, 10.0), examples)
    np.testing.assert_allclose(clipped, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_local_distillation_is_the_formula(weight: float) -> None:
    plan = plan_of("privacy=off", f"student.distill.local_weight={weight}", ALWAYS)
    soft = numpy_generator(3).dirichlet(np.ones(CLASSES), CLASSES).astype(np.float32)
    examples = examples_of(20)
    got = update(plan, NoisyStep(None, 0.0, 10.0), examples, soft)
    heat = 3.0

    def expected(factor: float) -> NDArray[np.float64]:
        model = model_at(start_of(trainer_of(plan)))
        logits = model(examples.inputs)
        log_hard = torch.log_softmax(logits, dim=1)
        hard = -log_hard[torch.arange(20), examples.labels].sum()
        target = torch.from_numpy(soft)[examples.labels]
        log_soft = torch.log_softmax(logits / heat, dim=1)
        divergence = (target * (target.log() - log_soft)).sum()
        return gradient((1 - weight) * hard + weight * factor * divergence, model) / 10.0

    np.testing.assert_allclose(got, expected(heat**2), rtol=1e-3, atol=1e-6)
    assert not np.allclose(got, expected(1.0), rtol=1e-1, atol=1e-4)


def test_a_distillation_weight_of_zero_is_no_distillation() -> None:
    plan, examples = plan_of("privacy=off"), examples_of(20)
    soft = np.eye(CLASSES, dtype=np.float32)[::-1].copy()
    step = NoisyStep(None, 0.0, 10.0)
    assert np.array_equal(update(plan, step, examples, soft), update(plan, step, examples))


@pytest.mark.parametrize("rows", [1, CLASSES - 1, CLASSES + 1])
def test_soft_labels_of_other_classes_are_refused(rows: int) -> None:
    plan = plan_of("student.distill.local_weight=0.5")
    with pytest.raises(PayloadError, match=f"has {rows} rows: must have {CLASSES}"):
        trainer_of(plan, np.zeros((rows, rows), dtype=np.float32))


class MixingTask(WideTask):
    """Its student mixes the examples of a batch."""

    def student(self, model: str) -> nn.Module:
        return nn.Sequential(nn.Linear(INPUTS, CLASSES), nn.BatchNorm1d(CLASSES))


def test_a_student_that_mixes_examples_is_refused_before_anything_is_charged_or_trained() -> None:
    with pytest.raises(DataError, match="batch normalisation"):
        LocalTrainer(plan_of(), MixingTask(), Constants(b"", NO_SOFT))


class TaskOf(WideTask):
    """A task with another student."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        self._make = make

    def student(self, model: str) -> nn.Module:
        return self._make()


class Half(nn.Module):
    """Uses a layer's weight a second time outside of the layer, where no hook sees it."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.layer, self.dropout, self.shared = nn.Linear(INPUTS, CLASSES), nn.Dropout(), shared

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        seen = self.layer(self.dropout(inputs))
        return seen + F.linear(inputs, self.layer.weight) if self.shared else seen


class Unused(nn.Sequential):
    """Has a layer that is not used."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(INPUTS, CLASSES))
        self.unused = nn.Linear(2, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:  # pyright: ignore
        return self[0](inputs)


@pytest.mark.parametrize("shared", [False, True])
def test_a_student_whose_gradients_are_not_whole_is_found_before_the_first_round(
    shared: bool,
) -> None:
    with pytest.raises(DataError, match="do not sum") if shared else nullcontext():
        require_whole_gradients(plan_of(), TaskOf(lambda: Half(shared)))


def test_a_student_with_an_unused_layer_is_found_before_the_first_round() -> None:
    with pytest.raises(DataError, match="no per-example gradient"):
        require_whole_gradients(plan_of(), TaskOf(Unused))


def make_shared_task(section: object, seed: int) -> TaskOf:
    """What the plan of the next test names."""
    return TaskOf(lambda: Half(shared=True))


def test_a_device_refuses_a_student_whose_gradients_are_not_whole_before_it_is_charged(
    tmp_path: Path,
) -> None:
    plan = plan_of(f"task.name={__name__}:make_shared_task")
    constants, codec = Constants(b"", NO_SOFT).encode(), build_codec(("identity",))
    layout = trainer_of(plan_of()).layout
    payload = codec.encode(start_of(trainer_of(plan_of())), layout.blocks, numpy_generator(0))
    with Ledger.open(tmp_path) as ledger:
        budget = Budget(float("inf"), 1e-5)
        device = Environment(0, "0", ledger, budget, SeededRandomness(7), False)
        with pytest.raises(DataError, match="do not sum"):
            run_round(order_of(plan, constants), plan.canonical(), constants, payload, device)
        assert ledger.events("0") == []


class Centred(nn.Linear):
    """Takes off the mean of the batch."""

    def __init__(self) -> None:
        super().__init__(INPUTS, CLASSES)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:  # pyright: ignore
        return super().forward(inputs - inputs.mean(dim=0))


def test_a_student_that_mixes_examples_is_refused_before_anything_is_charged() -> None:
    with pytest.raises(DataError, match="the student mixes examples"):
        LocalTrainer(plan_of(), TaskOf(Centred), Constants(b"", NO_SOFT))


def test_a_student_of_joined_layers_is_trained_in_common_passes() -> None:
    task = TaskOf(lambda: Half(shared=False))
    assert trained_alone(plan_of(), task) is None
    trainer = LocalTrainer(plan_of(), task, Constants(b"", NO_SOFT))
    assert trainer.alone is None
    hooked = TaskOf(lambda: Half(shared=True))
    assert "Opacus' hooks" in (trained_alone(plan_of(), hooked) or "")


def test_the_layers_of_a_student_with_a_forward_of_its_own_are_not_taken_for_it() -> None:
    assert isinstance(student_model(TaskOf(Unused), plan_of()), Unused)


def test_checking_a_student_reads_no_data() -> None:
    class NoData(WideTask):
        def public(self) -> Examples:
            raise DataError("the data are not here")

        client = test = public  # pyright: ignore

    require_whole_gradients(plan_of(), NoData())


@pytest.mark.parametrize("privacy", ['privacy="off"', 'privacy.unit="client"'])
def test_a_student_whose_gradients_are_not_bounded_need_not_be_whole(privacy: str) -> None:
    require_whole_gradients(plan_of(privacy), TaskOf(Unused))


@pytest.mark.parametrize("privacy", ["privacy=off", "privacy.unit=client"])
def test_a_parameter_that_is_not_used_stays_as_it_is_where_gradients_are_not_bounded(
    privacy: str,
) -> None:
    plan, step = plan_of(privacy), NoisyStep(None, 0.0, 10.0)
    trainer = LocalTrainer(plan, TaskOf(Unused), Constants(b"", NO_SOFT))
    start, size = start_of(trainer), trainer_of(plan).layout.size
    given = examples_of(20), step, SeededRandomness(7), PATH
    found = trainer.pseudo_gradient(start, *given)
    assert np.array_equal(found[:size], trainer_of(plan).pseudo_gradient(start[:size], *given))
    assert found[:size].any() and not found[size:].any()


def test_several_local_steps_are_a_loop_written_by_hand() -> None:
    plan = plan_of(
        "federation.steps_per_round=3",
        "federation.learning_rate=0.25",
        "privacy.noise_multiplier=1.5",
        'privacy.trust="local"',
    )
    examples, step = examples_of(20), noisy_step(plan, order_of(plan))
    assert step.clip == 0.5
    weights, total = start_of(trainer_of(plan)), np.zeros(trainer_of(plan).layout.size)
    for index in range(3):
        summed = np.zeros_like(total)
        for i in drawn(0.5, 20, index):
            model = model_at(weights)
            loss = F.cross_entropy(model(examples.inputs[i : i + 1]), examples.labels[i : i + 1])
            row = gradient(loss, model)
            summed += row * min(1.0, 0.5 / np.linalg.norm(row))
        noise = SeededRandomness(7).stream("noise", *PATH, index).normal(len(total))
        moved = (summed + step.noise * noise) / 10.0
        total += moved
        weights = (weights - 0.25 * moved).astype(np.float32)
    got = update(plan, step, examples)
    np.testing.assert_allclose(got, total, rtol=1e-4, atol=1e-5)
    assert not np.array_equal(drawn(0.5, 20, 0), drawn(0.5, 20, 1))
