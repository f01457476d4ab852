"""Fewer bits on public data: what is scaled, what is left out, and that nothing else does so."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reticent.core.errors import RunError
from reticent.core.models import teacher
from reticent.core.plan import parse_plan
from reticent.core.seeds import torch_generator
from reticent.core.tasks import Examples
from reticent.server.learning import LowPrecision, Update, in_precision, learning
from reticent.server.means import Means
from reticent.server.public_training import train_public
from reticent.simulations.simulate import simulate

ROOT = Path(__file__).parent.parent
HALF = Means(precision="fp16")


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


@torch.no_grad()
def loss(model: nn.Module, examples: Examples) -> float:
    return float(F.cross_entropy(model(examples.inputs), examples.labels))


def moved_by(means: Means, factor: float) -> torch.Tensor:
    """Return how far one step down ``factor`` times the sum of the answers moves the weights."""
    model = linear()
    before = model.weight.detach().clone()
    with learning(model, 0.01, 4, means) as (runs, step):
        step(factor * runs(torch.ones(5, 3)).sum())
    return model.weight.detach() - before


def test_a_gradient_that_vanishes_in_float16_survives_because_the_loss_is_scaled() -> None:
    inputs = torch.ones(5, 3)
    model = linear()
    (1e-9 * LowPrecision(model, torch.float16, "cpu")(inputs).sum()).backward()
    assert model.weight.grad is not None and not model.weight.grad.any()
    plain, half = moved_by(Means(), 1e-9), moved_by(HALF, 1e-9)
    assert plain.abs().min() > 1e-5
    torch.testing.assert_close(half, plain, rtol=0.02, atol=0)


def test_a_step_that_overflows_is_left_out_with_its_place_in_the_schedule() -> None:
    """Float16 ends at 65,504; the first scale is 65,536, and gradients are 8 times it at first."""
    model = linear()
    with learning(model, 0.01, 9, HALF) as (runs, step):
        assert isinstance(step, Update)
        weights, rates = [model.weight.detach().clone()], [step.optimizer.param_groups[0]["lr"]]
        for _ in range(6):
            step(8 * runs(torch.ones(1, 3)).sum())
            weights.append(model.weight.detach().clone())
            rates.append(step.optimizer.param_groups[0]["lr"])
    same = [torch.equal(a, b) for a, b in pairwise(weights)]
    assert same == [True, True, True, True, False, False]
    assert [a == b for a, b in pairwise(rates)] == same
    assert all(w.isfinite().all() for w in weights)
    full = linear()
    with learning(full, 0.01, 9, Means()) as (runs, step):
        assert isinstance(step, Update)
        step(runs(torch.ones(1, 3)).sum())
        assert step.optimizer.param_groups[0]["lr"] == rates[5]


def test_gradients_that_are_never_finite_are_an_error_and_not_a_teacher() -> None:
    def never_finite() -> None:
        with learning(model, 0.01, 100, HALF) as (runs, step):
            for _ in range(100):
                step(float("nan") * runs(torch.ones(1, 3)).sum())

    model = linear()
    before = model.weight.detach().clone()
    with pytest.raises(RunError, match=r'precision="fp16": gradients are not finite .* "bf16"'):
        never_finite()
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_fp16_computes_in_float16_and_learns_in_float32(offload: str) -> None:
    torch.manual_seed(0)
    model = teacher((1, 8, 8), 4)
    seen: set[torch.dtype] = set()
    model.register_forward_hook(lambda _m, _i, output: seen.add(output.dtype))
    inputs = torch.randn(12, 1, 8, 8, generator=torch_generator(0, "precision"))
    examples = Examples(inputs, torch.arange(12) % 4)
    before = loss(model.eval(), examples)
    seen.clear()
    means = Means(precision="fp16", offload=offload)
    train_public(model, examples, 30, 0.01, 0, "teacher", means=means)
    assert seen == {torch.float16}
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    assert loss(model, examples) < before / 2


def test_fp32_is_the_model_itself() -> None:
    model = linear()
    assert in_precision(model, Means()) is model


def sources() -> Iterator[tuple[str, set[str]]]:
    """Yield every module of the packages with the names and attributes that it uses."""
    for package in ("core", "compression", "privacy", "client", "server", "simulations", "cli"):
        for path in (ROOT / package).rglob("*.py"):
            nodes = list(ast.walk(ast.parse(path.read_text())))
            names = {n.id for n in nodes if isinstance(n, ast.Name)}
            names |= {n.attr for n in nodes if isinstance(n, ast.Attribute)}
            names |= {a.name for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names}
            yield str(path.relative_to(ROOT)), names


def test_public_training_alone_scales_a_loss_or_computes_in_fewer_bits() -> None:
    users = {path for path, names in sources() if names & {"GradScaler", "autocast", "amp"}}
    assert users == {"server/reticent/server/learning.py"}


def refused(*_: object, **__: object) -> Any:
    raise AssertionError("a loss was scaled or bits were dropped")


def test_no_loss_is_scaled_under_dp_sgd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a teacher in float16, whose training does fail once scaling and autocast are gone."""
    plan = parse_plan(
        "",
        [
            "task.name=digits",
            "task.clients=4",
            "task.public_examples=30",
            "teacher.epochs=1",
            'teacher.precision="fp16"',
            "student.epochs=1",
            "federation.clients_per_round=4",
            "federation.rounds=2",
            "engine.workers=1",
        ],
    )

    def stop(metrics: dict[str, Any]) -> None:
        rounds.append(metrics["round"])
        if len(rounds) == 1:
            monkeypatch.setattr(torch.amp, "GradScaler", refused)
            monkeypatch.setattr(torch, "autocast", refused)

    rounds: list[int] = []
    simulate(plan, tmp_path / "run", progress=stop)
    assert rounds == [1, 2]
    with pytest.raises(AssertionError, match="a loss was scaled"):
        simulate(plan, tmp_path / "again")
