"""Local steps in common passes: each client's sum is what it gets when it is trained alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import odd_students
import pytest
import torch
from owned_students import MODELS, batch_of, made
from torch import nn

from reticent.client.local_rules import rule_of
from reticent.client.steps import Client, NoisyStep
from reticent.client.training import LocalTrainer, trained_alone
from reticent.core.personal import personal_values
from reticent.core.plan import Plan, parse_plan
from reticent.core.protocol import Constants
from reticent.core.seeds import numpy_generator
from reticent.core.tasks import Examples
from reticent.core.update import Layout, Vector
from reticent.privacy.randomness import SeededRandomness

CLASSES, SHAPE = 3, (1, 8, 8)
HELD = (6, 0, 13, 30, 1, 17)
"""Examples of each client."""


class SmallTask:
    """Images of noise for a chain of all layers with parameters."""

    name, classes, input_shape, clients, nominal_examples = "small", CLASSES, SHAPE, 6, 12

    def public(self) -> Examples:
        return drawn(100, 12)

    def test(self) -> Examples:
        return drawn(101, 12)

    def client(self, index: int) -> Examples:
        return drawn(index, HELD[index])

    def teacher(self) -> nn.Module:
        return self.student("")

    def student(self, model: str) -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(1, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 6, 3, 2, 1)),
            *(nn.ReLU(), nn.Flatten(), nn.Linear(24, CLASSES)),
        )


def drawn(seed: int, count: int) -> Examples:
    rng = numpy_generator(seed, "small")
    inputs = rng.standard_normal((count, *SHAPE)).astype(np.float32)
    return Examples(torch.from_numpy(inputs), torch.from_numpy(rng.integers(CLASSES, size=count)))


def make_task(section: object, seed: int) -> SmallTask:
    """What the plan of these tests names."""
    return SmallTask()


PLAN_TEXT = f"""
[task]
name = "{__name__}:make_task"
clients = 6
[federation]
clients_per_round = 6
sampling_rate = 0.5
rounds = 3
steps_per_round = 4
learning_rate = 0.3
"""
EXAMPLE = ("privacy.noise_multiplier=1.0", "privacy.trust=local")
CLIENT = ("privacy.noise_multiplier=1.0", "privacy.unit=client")
FLOAT = ("student.quantize.kind=none", "student.prune.kind=none")
LOCAL = {
    "plain": (),
    "once": ("federation.steps_per_round=1",),
    "proximal": ("federation.local.proximal=0.7",),
    "scaffold": ("federation.local.scaffold=true",),
    "personal": ('federation.local.personal=["6"]',),
    "both": ("federation.local.scaffold=true", 'federation.local.personal=["0", "6.bias"]'),
    "distilled": ("student.distill.local_weight=0.4",),
    "two-bits": (
        "student.quantize.kind=qat",
        "student.quantize.bits=2",
        "student.quantize.granularity=tensor",
    ),
}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
SOFT = (np.eye(CLASSES) * 0.4 + 0.2).astype(np.float32)


def trainer_of(plan: Plan, accelerator: str | None = None) -> LocalTrainer:
    student = SmallTask().student("")
    mask = np.random.default_rng(0).random(Layout.of(student).total) < 0.7
    layout = Layout.of(student, mask if plan.student.prune.kind != "none" else None)
    layers = personal_values(student, plan.federation.local.personal)
    constants = Constants(layout.kept, SOFT, personal=layers)
    return LocalTrainer(plan, SmallTask(), constants, accelerator)


def clients_of(trainer: LocalTrainer) -> tuple[Vector, list[Client], NoisyStep]:
    """Return the broadcast model, clients with rules and layers of their own, and the step."""
    plan, rng = trainer.plan, numpy_generator(0, "clients")
    size = trainer.split.travels.size
    common, control = (rng.normal(0, 0.2, size).astype(np.float32) for _ in range(2))
    clients: list[Client] = []
    for index in range(len(HELD)):
        layers = rng.normal(0, 0.2, trainer.split.inner.sum()).astype(np.float32)
        start = trainer.split.whole(common, layers)
        own = rng.normal(0, 0.2, size).astype(np.float32)
        rule = rule_of(plan.federation.local, trainer.split, start, control, own)
        path = ("run", index, 1)
        clients.append(Client(SmallTask().client(index), SeededRandomness(5), path, rule, start))
    bounded = plan.private is not None and plan.private.unit == "example"
    return common, clients, NoisyStep(0.5, 0.6, 6.0) if bounded else NoisyStep(None, 0.0, 6.0)


def alone(
    trainer: LocalTrainer, start: Vector, clients: Sequence[Client], step: NoisyStep
) -> list[Vector]:
    return [trainer.pseudo_gradients(start, [client], step)[0] for client in clients]


def close(found: Sequence[Vector], expected: Sequence[Vector]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("local", list(LOCAL))
@pytest.mark.parametrize("privacy", [EXAMPLE, CLIENT], ids=["example", "client"])
@pytest.mark.parametrize("layers", [FLOAT, ()], ids=["float", "int8"])
def test_together_every_client_gets_what_it_gets_alone(
    local: str, privacy: tuple[str, ...], layers: tuple[str, ...]
) -> None:
    """For each local rule, with and without bounds, masks and rounded weights."""
    plan = parse_plan(PLAN_TEXT, [*layers, *privacy, *LOCAL[local]])
    trainer = trainer_of(plan)
    assert trainer.alone is None
    given = clients_of(trainer)
    found = trainer.pseudo_gradients(*given)
    close(found, alone(trainer, *given))
    assert all((a == b).all() for a, b in zip(found, trainer.pseudo_gradients(*given), strict=True))


class OtherTask(SmallTask):
    """The same clients, with data for students that are no plain chain."""

    def __init__(self, kind: str) -> None:
        self.kind, self.input_shape = kind, MODELS[kind][0]

    def client(self, index: int) -> Examples:
        inputs, labels = batch_of(self.kind, HELD[index], index)
        return Examples(inputs, labels)

    def student(self, model: str) -> nn.Module:
        return made(self.kind)


@pytest.mark.parametrize("kind", ["residual", "attention", "gru", "table"])
@pytest.mark.parametrize(
    "privacy",
    [EXAMPLE, (*CLIENT, "federation.sampling_rate=0.3"), (*EXAMPLE, "privacy.clipping=per-layer")],
    ids=["example", "client", "per-layer"],
)
@pytest.mark.parametrize("layers", [FLOAT, ()], ids=["float", "int8"])
def test_students_that_are_no_chain_get_what_they_get_alone(
    kind: str, privacy: tuple[str, ...], layers: tuple[str, ...]
) -> None:
    task, plan = OtherTask(kind), parse_plan(PLAN_TEXT, [*layers, *privacy])
    trainer = LocalTrainer(plan, task, Constants(b"", SOFT))
    assert trainer.alone is None
    bounded = plan.private is not None and plan.private.unit == "example"
    step = NoisyStep(0.5, 0.6, 6.0) if bounded else NoisyStep(None, 0.0, 6.0)
    clients = [Client(task.client(i), SeededRandomness(5), ("run", i, 1)) for i in range(len(HELD))]
    start = trainer.layout.read(made(kind))
    found = trainer.pseudo_gradients(start, clients, step)
    close(found, alone(trainer, start, clients, step))
    assert np.abs(found[0] - found[2]).max() > 0.1


class HookedTask(SmallTask):
    """A student whose gradients at common weights only Opacus' hooks know."""

    def __init__(self, make: Callable[[tuple[int, ...], int], nn.Module]) -> None:
        self.make = make

    def student(self, model: str) -> nn.Module:
        return self.make(SHAPE, CLASSES)


@pytest.mark.parametrize("make", [odd_students.Rows, odd_students.grouped])
@pytest.mark.parametrize("layers", [FLOAT, ()], ids=["float", "int8"])
def test_students_that_need_hooks_alone_get_the_same_together(
    make: Callable[[tuple[int, ...], int], nn.Module], layers: tuple[str, ...]
) -> None:
    """What a run says of them, by a student of its own, is what is done."""
    task, several = HookedTask(make), ("federation.steps_per_round=3",)
    once = parse_plan(PLAN_TEXT, [*layers, *EXAMPLE, *LOCAL["once"]])
    assert "Opacus' hooks" in (trained_alone(once, task) or "")
    plan = parse_plan(PLAN_TEXT, [*layers, *EXAMPLE, *several, "federation.sampling_rate=0.2"])
    trainer = LocalTrainer(plan, task, Constants(b"", SOFT))
    assert trainer.alone is trained_alone(plan, task) is None
    clients = [Client(task.client(i), SeededRandomness(5), ("run", i, 1)) for i in range(len(HELD))]
    torch.manual_seed(1)
    start, step = trainer.layout.read(task.student("")), NoisyStep(0.5, 0.6, 6.0)
    found = trainer.pseudo_gradients(start, clients, step)
    close(found, alone(trainer, start, clients, step))
    assert np.abs(found[0] - found[2]).max() > 0.1


@pytest.mark.parametrize("local", list(LOCAL))
@pytest.mark.parametrize("privacy", [EXAMPLE, CLIENT, ("privacy=off",)], ids=lambda p: p[0])
@pytest.mark.parametrize("device", DEVICES)
def test_on_an_accelerator_every_client_gets_what_it_gets_alone(
    local: str, privacy: tuple[str, ...], device: str
) -> None:
    """Also a single one, without privacy, and with int8 weights and a mask."""
    layers = FLOAT if privacy == ("privacy=off",) and local != "two-bits" else ()
    plan = parse_plan(PLAN_TEXT, [*layers, *privacy, *LOCAL[local]])
    trainer = trainer_of(plan, device)
    assert trainer.alone is None
    given = clients_of(trainer)
    expected = alone(trainer_of(plan), *given)
    close(trainer.pseudo_gradients(*given), expected)
    close(alone(trainer, *given), expected)


def test_the_comparison_tells_every_part_of_a_step() -> None:
    """Another start, rule, stream or step of one client is seen, and in its own sum alone."""
    trainer = trainer_of(parse_plan(PLAN_TEXT, [*FLOAT, *EXAMPLE, *LOCAL["both"]]))
    start, clients, step = clients_of(trainer)
    right, third = alone(trainer, start, clients, step), clients[2]
    assert third.start is not None and clients[3].start is not None
    for changed in (
        third._replace(start=clients[3].start),
        third._replace(rule=clients[3].rule),
        third._replace(path=clients[3].path),
        third._replace(examples=Examples(third.examples.inputs[1:], third.examples.labels[1:])),
    ):
        found = trainer.pseudo_gradients(start, [*clients[:2], changed, *clients[3:]], step)
        close([*found[:2], *found[3:]], [*right[:2], *right[3:]])
        with pytest.raises(AssertionError):
            close([found[2]], [right[2]])
    for wrong in (replace(step, noise=0.5), replace(step, clip=0.4), replace(step, denominator=7)):
        with pytest.raises(AssertionError):
            close(trainer.pseudo_gradients(start, clients, wrong), right)


def test_a_client_that_diverges_does_so_alone() -> None:
    trainer = trainer_of(parse_plan(PLAN_TEXT, [*FLOAT, *CLIENT]))
    start, clients, step = clients_of(trainer)
    right = trainer.pseudo_gradients(start, clients, step)
    inputs = clients[3].examples.inputs.clone()
    inputs[:] = torch.nan
    clients[3] = clients[3]._replace(examples=Examples(inputs, clients[3].examples.labels))
    found = trainer.pseudo_gradients(start, clients, step)
    assert not np.isfinite(found[3]).all()
    close([*found[:3], *found[4:]], [*right[:3], *right[4:]])


def test_examples_that_are_not_finite_count_zero_where_gradients_are_bounded() -> None:
    trainer = trainer_of(parse_plan(PLAN_TEXT, [*FLOAT, *EXAMPLE]))
    start, clients, step = clients_of(trainer)
    inputs = clients[3].examples.inputs.clone()
    inputs[::2] = torch.inf
    clients[3] = clients[3]._replace(examples=Examples(inputs, clients[3].examples.labels))
    found = trainer.pseudo_gradients(start, clients, step)
    assert np.isfinite(found).all()
    close(found, alone(trainer, start, clients, step))


def test_clients_without_any_example_get_their_noise() -> None:
    trainer = trainer_of(parse_plan(PLAN_TEXT, [*FLOAT, *EXAMPLE]))
    start, clients, step = clients_of(trainer)
    nobody = [client._replace(examples=drawn(0, 0)) for client in clients]
    found = trainer.pseudo_gradients(start, nobody, step)
    for client, one in zip(clients, found, strict=True):
        streams = (client.randomness.stream("noise", *client.path, i) for i in range(4))
        draws = sum(stream.normal(len(one)).astype(np.float64) for stream in streams)
        expected = draws * step.noise / step.denominator
        np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-7)
