"""Schedules of pruning: exact masks, true rewinding, and gradients over what is kept alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from reticent.compression.fold import folded
from reticent.core.errors import PlanError
from reticent.core.models import student
from reticent.core.plan import Plan, parse_plan
from reticent.core.seeds import torch_generator
from reticent.core.tasks import Examples
from reticent.core.update import Layout
from reticent.privacy.clipping import ClippedGradients
from reticent.server.pruning import Stretch, Train, pruned
from reticent.server.public_training import train_public

EPOCHS = 4
SPAN = tuple[int, int] | None


def public() -> Examples:
    generator = torch_generator(2, "public")
    labels = torch.arange(100) % 10
    inputs = torch.randn(100, 1, 8, 8, generator=generator)
    inputs[:, 0, 0] += 3 * F.one_hot(labels, 10)[:, :8]
    return Examples(inputs, labels)


def raw(kind: str = "tiny") -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return student(kind, (1, 8, 8), 10)


def trained(model: nn.Module, name: str, span: SPAN = None, epochs: int = EPOCHS) -> nn.Module:
    return train_public(model, public(), epochs, 0.01, 0, name, span=span)


class Recorder:
    """Trains, and notes how."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Stretch]] = []
        self.begins: list[dict[str, torch.Tensor]] = []

    def __call__(self, model: nn.Module, name: str, stretch: Stretch) -> None:
        self.calls.append((name, stretch))
        self.begins.append({k: v.clone() for k, v in model.state_dict().items()})
        train_public(
            model, public(), stretch.epochs, stretch.learning_rate, 0, name, span=stretch.span
        )


def plan_of(*overrides: str) -> Plan:
    own = [f"student.epochs={EPOCHS}", "student.prune.steps=2", "student.prune.rewind=0.5"]
    return parse_plan("", [*own, *overrides])


def run(plan: Plan, train: Train, kind: str = "tiny") -> tuple[nn.Module, np.ndarray]:
    dense = folded(trained(raw(kind), "student"))
    before = Layout.of(dense).read(dense)
    model, mask = pruned(plan, dense, lambda: raw(kind), public(), train)
    assert (Layout.of(dense).read(dense) == before).all()
    assert mask is not None
    return model, mask


def stopped_after(steps: int) -> dict[str, torch.Tensor]:
    """Return the dense student after so many steps of its whole training."""
    model = raw()
    count = 0

    def stop(_: nn.Module, __: Any) -> None:
        nonlocal count
        if count == steps:
            raise InterruptedError
        count += 1

    handle = model.register_forward_pre_hook(stop)
    with pytest.raises(InterruptedError):
        trained(model, "student")
    handle.remove()
    return model.state_dict()


def test_a_part_from_the_beginning_is_the_beginning_bit_for_bit() -> None:
    part = trained(raw(), "student", (0, 2)).state_dict()
    whole, later = stopped_after(4), stopped_after(5)
    assert all(torch.equal(part[name], value) for name, value in whole.items())
    assert not all(torch.equal(part[name], value) for name, value in later.items())


def rates(span: SPAN) -> list[tuple[float, float]]:
    seen: list[tuple[float, float]] = []

    def note(optimizer: Any, *_: Any) -> None:
        (group,) = optimizer.param_groups
        seen.append((group["lr"], group["betas"][0]))

    handle = register_optimizer_step_pre_hook(note)
    try:
        trained(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "rates", span)
    finally:
        handle.remove()
    return seen


def test_a_part_has_the_learning_rates_of_that_part() -> None:
    whole = rates(None)
    assert len(whole) == 8 and rates((0, EPOCHS)) == whole
    assert rates((2, EPOCHS)) == whole[4:] and rates((1, 3)) == whole[2:6]


KINDS = ["magnitude", "taylor", "random"]
SCHEDULES = ["one-shot", "gradual", "weight-rewind", "rate-rewind"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_masks_are_exact_and_gradients_are_over_what_is_kept(kind: str, schedule: str) -> None:
    plan = plan_of(f"student.prune.kind={kind}", f"student.prune.schedule={schedule}")
    model, mask = run(plan, Recorder())
    layout = Layout.of(model, mask)
    wide = np.concatenate([np.full(p.numel(), p.dim() > 1) for p in model.parameters()])
    assert mask[~wide].all() and (~mask).sum() == round(0.5 * wide.sum())
    values = Layout.of(model).read(model)
    assert not values[~mask].any() and (values[mask & wide] != 0).mean() > 0.99
    assert not any(p.grad is not None or p._backward_hooks for p in model.parameters())

    inputs, labels = public().inputs[:5], public().labels[:5]

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, targets, reduction="sum")

    expected = np.zeros(layout.size)
    for one in range(5):
        part = loss(model(inputs[one : one + 1]), labels[one : one + 1])
        single = layout.gather(list(torch.autograd.grad(part, list(model.parameters()))))
        expected += single * min(1.0, 0.1 / np.linalg.norm(single))
    found = ClippedGradients(model, layout).sum(inputs, labels, loss, 0.1)
    assert np.allclose(found, expected, atol=1e-5)


def test_weights_are_rewound_to_what_they_were_and_masked() -> None:
    train = Recorder()
    _, mask = run(plan_of("student.prune.schedule=weight-rewind"), train)
    assert [name for name, _ in train.calls] == ["student", "pruned-1", "pruned-2"]
    early = stopped_after(4)
    for begin in train.begins[1:]:
        for name, value in begin.items():
            same = torch.equal(value, early[name])
            zeroed = torch.equal(value, early[name] * (value != 0))
            assert same or (zeroed and value.dim() > 1), name
    last = torch.cat([v.flatten() for k, v in train.begins[2].items() if v.dim() > 1])
    assert int((last == 0).sum()) == int((~mask).sum())


def test_rates_are_rewound_and_weights_are_not() -> None:
    train = Recorder()
    run(plan_of("student.prune.schedule=rate-rewind"), train)
    rest = Stretch(EPOCHS, 0.01, (2, EPOCHS))
    assert train.calls == [("pruned-1", rest), ("pruned-2", rest)]
    dense = folded(trained(raw(), "student")).state_dict()
    for name, value in train.begins[0].items():
        assert torch.equal(value, torch.where(value != 0, dense[name], 0.0)), name


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_student_without_batch_normalisation_is_pruned_too(schedule: str) -> None:
    model, mask = run(plan_of(f"student.prune.schedule={schedule}"), Recorder(), "tiny-gn")
    assert not Layout.of(model).read(model)[~mask].any()


def test_weight_rewinding_needs_the_layers_that_were_trained() -> None:
    with pytest.raises(PlanError, match='use "rate-rewind"'):
        plan_of("student.prune.schedule=weight-rewind", "student.thin.kind=l1")
