"""Structured pruning: what is cut is what was scored lowest, and nothing else changes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from reticent.compression import thin
from reticent.compression.fold import folded
from reticent.compression.structure import build, describe
from reticent.compression.thin import CRITERIA, Score, Span, spans, thinned
from reticent.core.errors import PlanError
from reticent.core.models import STUDENTS, student
from reticent.core.seeds import numpy_generator, torch_generator
from reticent.core.tasks import Examples

DRAWS = numpy_generator(0, "thin")


def filled(model: nn.Sequential) -> nn.Sequential:
    generator = torch_generator(5, "thin")
    for p in model.parameters():
        p.data = 0.5 * torch.randn(p.shape, generator=generator)
    return model.eval()


def plain() -> nn.Sequential:
    return filled(
        nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(24, 5),
            nn.Tanh(),
            nn.Linear(5, 3),
        )
    )


def grouped() -> nn.Sequential:
    return filled(
        nn.Sequential(
            nn.Conv2d(1, 8, 3, bias=False),
            nn.GroupNorm(4, 8),
            nn.ReLU(),
            nn.Conv2d(8, 4, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        )
    )


def public(count: int = 30) -> Examples:
    generator = torch_generator(1, "public")
    inputs = torch.randn(count, 1, 8, 8, generator=generator)
    return Examples(inputs, torch.arange(count) % 3)


def fixed(*scores: list[float]) -> Score:
    """Return a criterion that gives the layers these scores, in order."""
    given_scores: Iterator[list[float]] = iter(scores)
    return lambda *_: np.array(next(given_scores))


def gated(model: nn.Sequential, gates: dict[int, list[float]]) -> torch.Tensor:
    """Run the model by hand, multiplying channels after the layers at these positions."""
    x = public().inputs
    for position, layer in enumerate(model):
        x = layer(x)
        if position in gates:
            x = x * torch.tensor(gates[position]).view(1, -1, *[1] * (x.dim() - 2))
    return x


def test_a_cut_unit_is_a_unit_that_is_multiplied_by_zero() -> None:
    model = plain()
    score = fixed([0, 3, 1, 2], [5, 4, 3, 2, 1, 0], [0, 1, 0, 1, 1])
    smaller, cuts = thinned(model, score, [0.5, 0.5, 0.4], public(), DRAWS)
    assert [(c.before, c.after) for c in cuts] == [(4, 2), (6, 3), (5, 3)]
    assert [tuple(p.shape) for p in smaller.parameters()][::2] == [
        (2, 1, 3, 3),
        (3, 2, 3, 3),
        (3, 12),
        (3, 3),
    ]
    expected = gated(model, {1: [0, 1, 0, 1], 4: [1, 1, 1, 0, 0, 0], 7: [0, 1, 0, 1, 1]})
    assert torch.allclose(smaller(public().inputs), expected, atol=1e-5)
    wrong = gated(model, {1: [1, 0, 1, 0], 4: [1, 1, 1, 0, 0, 0], 7: [0, 1, 0, 1, 1]})
    assert not torch.allclose(smaller(public().inputs), wrong, atol=1e-2)


def test_groups_of_a_norm_go_as_a_whole_and_the_others_do_not_change() -> None:
    model = grouped()
    score = fixed([2, 0, 3, 1], [0, 1, 2, 3])
    smaller, cuts = thinned(model, score, [0.4, 0.0], public(), DRAWS)
    assert str(cuts[0]) == "layer 0 keeps 4 of 8 (in whole groups of 2)"
    assert str(cuts[1]) == "layer 3 keeps 4 of 4"
    norm = smaller[1]
    assert isinstance(norm, nn.GroupNorm) and (norm.num_groups, norm.num_channels) == (2, 4)
    expected = gated(model, {2: [1, 1, 0, 0, 1, 1, 0, 0]})
    assert torch.allclose(smaller(public().inputs), expected, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 8])
def test_one_group_and_one_channel_a_group_are_cut_channel_by_channel(groups: int) -> None:
    model = grouped()
    model[1] = nn.GroupNorm(groups, 8)
    smaller, cuts = thinned(model, thin.l1, 0.4, public(), DRAWS)
    norm = smaller[1]
    assert cuts[0].after == 5 and isinstance(norm, nn.GroupNorm)
    assert norm.num_groups == (1 if groups == 1 else 5)
    smaller(public().inputs)


@settings(deadline=None, max_examples=20)
@given(st.floats(0, 0.75), st.sampled_from(sorted(STUDENTS)), st.sampled_from(["l1", "random"]))
def test_every_built_in_student_can_be_thinned(share: float, kind: str, criterion: str) -> None:
    model = folded(student(kind, (1, 8, 8), 10).eval())
    smaller, cuts = thinned(model, CRITERIA[criterion](1), share, public(), DRAWS)
    assert all(c.before - c.after == c.width * round(share * c.before / c.width) for c in cuts)
    copy = build(describe(smaller), (1, 8, 8), 10)
    copy.load_state_dict(smaller.state_dict())
    assert torch.equal(copy(public().inputs), smaller(public().inputs))


def test_nothing_removed_is_the_same_model() -> None:
    model = plain()
    smaller, _ = thinned(model, thin.l2, 0.0, public(), DRAWS)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), smaller.parameters(), strict=True)
    )


def test_the_model_that_is_given_does_not_change() -> None:
    model, same = plain(), plain()
    thinned(model, CRITERIA["taylor"](1), 0.5, public(), DRAWS)
    assert describe(model) == describe(same)
    assert all(
        torch.equal(a, b) and a.grad is None
        for a, b in zip(model.parameters(), same.parameters(), strict=True)
    )


@pytest.mark.parametrize("order", [1, 2])
def test_norms_are_those_of_numpy_loops(order: int) -> None:
    model = grouped()
    span = spans(model)[0]
    weight = next(model.parameters()).detach().numpy().astype(np.float64)
    expected = [np.linalg.norm(weight[2 * u : 2 * u + 2].ravel(), order) for u in range(4)]
    score = {1: thin.l1, 2: thin.l2}[order]
    assert np.allclose(score(model, span, public(), DRAWS), expected)


@pytest.mark.parametrize("make", [plain, grouped])
def test_taylor_is_the_squared_slope_of_each_example_by_finite_differences(make: object) -> None:
    model = (plain if make is plain else grouped)().double()
    given_public = public(7)
    examples = Examples(given_public.inputs.double(), given_public.labels)
    for span in spans(model):
        before = model[: span.gate](examples.inputs).detach()
        expected = np.zeros(span.units)
        for unit in range(span.units):
            slopes = []
            for step in (1e-4, -1e-4):
                moved = before.clone()
                moved[:, unit * span.width : (unit + 1) * span.width] *= 1 + step
                losses = F.cross_entropy(
                    model[span.gate :](moved), examples.labels, reduction="none"
                )
                slopes.append(losses.detach().numpy())
            expected[unit] = np.mean(((slopes[0] - slopes[1]) / 2e-4) ** 2)
        found = thin.taylor(model, span, examples, DRAWS)
        assert np.allclose(found, expected, rtol=1e-4, atol=1e-9)


class AllOrders:
    """Gives every order of the players once."""

    def __init__(self, players: int) -> None:
        self._orders = permutations(range(players))

    def permutation(self, _: int) -> tuple[int, ...]:
        return next(self._orders)


def exact_shapley(model: nn.Sequential, span: Span, examples: Examples) -> list[float]:
    def worth(inside: tuple[int, ...]) -> float:
        gates = [float(u in inside) for u in range(span.units) for _ in range(span.width)]
        x = examples.inputs
        for position, layer in enumerate(model):
            if position == span.gate:
                x = x * torch.tensor(gates).view(1, -1, *[1] * (x.dim() - 2))
            x = layer(x)
        return -float(F.cross_entropy(x.detach(), examples.labels))

    n = span.units
    values = [0.0] * n
    for unit in range(n):
        others = [u for u in range(n) if u != unit]
        for size in range(n):
            weight = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
            for group in combinations(others, size):
                values[unit] += weight * (worth((*group, unit)) - worth(group))
    return values


@pytest.mark.parametrize("make", [plain, grouped])
def test_shapley_over_all_orders_is_the_exact_enumeration(make: object) -> None:
    model = (plain if make is plain else grouped)()
    span = spans(model)[0]
    assert span.units == 4
    exact = exact_shapley(model, span, public())
    found = thin.shapley(24)(model, span, public(), AllOrders(4))  # type: ignore[arg-type]
    assert np.allclose(found, exact, atol=1e-5)


def test_shapley_by_sampling_is_unbiased_and_always_sums_to_the_whole() -> None:
    model = plain()
    span = spans(model)[0]
    exact = np.array(exact_shapley(model, span, public()))
    one = np.array(
        [thin.shapley(1)(model, span, public(), numpy_generator(s, "shapley")) for s in range(100)]
    )
    assert np.allclose(one.sum(axis=1), exact.sum(), atol=1e-4)
    error = one.std(axis=0, ddof=1) / 10
    assert (np.abs(one.mean(axis=0) - exact) < 4 * error + 1e-6).all()
    assert not (np.abs(one.mean(axis=0) - exact[::-1]) < 4 * error + 1e-6).all()


def test_an_emptied_layer_is_refused_by_name_and_the_named_limit_works() -> None:
    with pytest.raises(PlanError, match=r"all 4 outputs of layer 0; must be at most 0\.7500"):
        thinned(plain(), thin.l1, 0.9, public(), DRAWS)
    smaller, _ = thinned(plain(), thin.l1, [0.75, 0.0, 0.0], public(), DRAWS)
    assert next(smaller.parameters()).shape[0] == 1
    with pytest.raises(PlanError, match="all 4 groups of 2 outputs of layer 0"):
        thinned(grouped(), thin.l1, 0.9, public(), DRAWS)


def test_as_many_shares_as_layers_are_needed() -> None:
    with pytest.raises(PlanError, match="one for each of the layers 0, 3, 6"):
        thinned(plain(), thin.l1, [0.5], public(), DRAWS)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_shares_out_of_range_are_refused(share: float) -> None:
    with pytest.raises(PlanError, match="below 1"):
        thinned(plain(), thin.l1, share, public(), DRAWS)


def test_scores_that_are_not_finite_are_refused() -> None:
    model = plain()
    next(model.parameters()).data[0] = float("nan")
    with pytest.raises(PlanError, match="layer 0: its scores are not finite"):
        thinned(model, thin.l1, 0.5, public(), DRAWS)


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(2, 2),
        nn.Sequential(nn.Linear(2, 2)),
        nn.Sequential(nn.Conv2d(2, 4, 1, groups=2), nn.Conv2d(4, 2, 1)),
        nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1, groups=2)),
        nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)),
        nn.Sequential(nn.Conv2d(2, 4, 1), nn.Linear(4, 2)),
        nn.Sequential(nn.Conv2d(2, 4, 1), nn.Flatten(0), nn.Linear(4, 2)),
        nn.Sequential(nn.Conv2d(2, 4, 1), nn.Flatten(), nn.GroupNorm(2, 8), nn.Linear(8, 2)),
        nn.Sequential(nn.Linear(2, 4), nn.Flatten(), nn.Linear(8, 2)),
    ],
)
def test_what_cannot_be_followed_is_refused(model: nn.Module) -> None:
    with pytest.raises(PlanError, match="thin"):
        spans(model)


def test_a_linear_layer_at_several_places_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(PlanError, match="several places"):
        thinned(model, thin.l1, 0.5, public(), DRAWS)


def test_torch_pruning_cuts_the_same_filters() -> None:
    """Optional: it is no dependency, as a chain needs no graph of dependencies."""
    tp = pytest.importorskip("torch_pruning")
    model, twin = plain(), plain()
    ours, _ = thinned(model, thin.l2, [0.5, 0.5, 0.0], public(), DRAWS)
    importance = tp.importance.MagnitudeImportance(p=2, group_reduction="first", normalizer=None)
    pruner = tp.pruner.MagnitudePruner(
        twin,
        public(1).inputs,
        importance=importance,
        pruning_ratio=0.5,
        ignored_layers=[twin[-3], twin[-1]],
    )
    pruner.step()
    theirs = twin.eval()
    shapes = [[tuple(p.shape) for p in m.parameters()] for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert torch.allclose(ours(public().inputs), theirs(public().inputs), atol=1e-5)
