"""Distillation losses: each against a plain reimplementation, and what their gradients touch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from reticent.compression.distill import (
    Answers,
    Ensemble,
    Guide,
    Hint,
    Seen,
    angle_loss,
    distance_loss,
    relation_loss,
    response_loss,
    softened,
)
from reticent.core.errors import PlanError
from reticent.core.plan import Distill
from reticent.core.seeds import torch_generator

Array = NDArray[np.float64]


def points(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((n, d), generator=torch_generator(seed, "points"), dtype=torch.float64)


def huber(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max())
    return e / e.sum()


@settings(deadline=None, max_examples=25)
@given(st.floats(0.5, 8), st.integers(1, 6), st.integers(2, 5))
def test_the_response_loss_is_the_formula(heat: float, n: int, classes: int) -> None:
    logits, other = points(n, classes), points(n, classes, 1)
    target = softened(nn.Identity(), other, heat)
    expected = 0.0
    for z, v in zip(logits.numpy(), other.numpy(), strict=True):
        p, q = softmax(v / heat), softmax(z / heat)
        expected += heat**2 * float((p * (np.log(p) - np.log(q))).sum()) / n
    assert response_loss(logits, target, heat).item() == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=15)
@given(st.integers(2, 6), st.integers(1, 4), st.integers(0, 9))
def test_the_distance_loss_is_the_formula(n: int, d: int, seed: int) -> None:
    first, second = points(n, d, seed), points(n, d + 2, seed + 1)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]

    def over_mean(p: Array) -> Array:
        distances = np.array([math.dist(p[i], p[j]) for i, j in pairs])
        return distances / distances.mean()

    gaps = over_mean(first.numpy()) - over_mean(second.numpy())
    expected = np.mean([huber(g) for g in gaps])
    assert distance_loss(first, second).item() == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=15)
@given(st.integers(3, 6), st.integers(1, 4), st.integers(0, 9))
def test_the_angle_loss_is_the_formula(n: int, d: int, seed: int) -> None:
    first, second = points(n, d, seed), points(n, d + 2, seed + 1)

    def cosine(p: Array, i: int, j: int, k: int) -> float:
        a, b = p[i] - p[j], p[k] - p[j]
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    triples = [(i, j, k) for i in range(n) for j in range(n) for k in range(n)]
    gaps = [
        huber(cosine(first.numpy(), *t) - cosine(second.numpy(), *t))
        for t in triples
        if len(set(t)) == 3
    ]
    assert angle_loss(first, second).item() == pytest.approx(np.mean(gaps), abs=1e-9)


def test_relations_do_not_change_under_scaling_and_rotation() -> None:
    plain = points(5, 3)
    turned = 7 * plain @ torch.linalg.qr(points(3, 3, 2)).Q + 1
    assert relation_loss(plain, turned).item() == pytest.approx(0, abs=1e-12)
    assert relation_loss(plain, points(5, 3, 4)).item() > 0.1


@pytest.mark.parametrize("n", [1, 2, 3])
def test_relations_of_few_or_equal_examples_have_finite_gradients(n: int) -> None:
    for start in (points(n, 2), torch.zeros((n, 2), dtype=torch.float64)):
        student = start.clone().requires_grad_()
        relation_loss(student, points(n, 4, 1)).backward()
        assert student.grad is not None and torch.isfinite(student.grad).all()


@pytest.mark.parametrize("kind", ["response", "feature"])
def test_response_and_feature_are_separable_by_example(kind: str) -> None:
    assert _moved_by_another_example(kind) == pytest.approx(0, abs=1e-9)


def test_relation_is_not_separable_by_example() -> None:
    assert _moved_by_another_example("relation") > 0.1


def _moved_by_another_example(kind: str) -> float:
    """Return how far example 0's share of the gradient moves when another example changes."""
    student, teacher = nn.Linear(3, 4).double(), points(6, 4, 7)
    hint = Hint(torch.Size((1, 4)), torch.Size((1, 4)), torch_generator(0)).double()
    inputs = points(6, 3)

    def share(inputs: torch.Tensor) -> torch.Tensor:
        made = student(inputs)
        made.retain_grad()
        if kind == "response":
            response_loss(made, F.softmax(teacher, dim=1), 2.0).backward()
        elif kind == "feature":
            hint(made, teacher).backward()
        else:
            relation_loss(made, teacher).backward()
        assert made.grad is not None
        return made.grad[0]

    changed = inputs.clone()
    changed[5] += 3
    before, after = share(inputs), share(changed)
    return float((before - after).norm() / before.norm())


def test_a_spatial_hint_is_the_formula() -> None:
    hint = Hint(torch.Size((1, 2, 4, 4)), torch.Size((1, 3, 2, 2)), torch_generator(1)).double()
    student = points(2, 32).view(2, 2, 4, 4)
    teacher = points(2, 12, 1).view(2, 3, 2, 2)
    weight, bias = (p.detach().numpy() for p in (hint.weight, hint.bias))
    expected = 0.0
    for n in range(2):
        for y in range(2):
            for x in range(2):
                block = student[n, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
                mean = block.reshape(2, 4).mean(dim=1).numpy()
                gap = weight @ mean + bias - teacher[n, :, y, x].numpy()
                expected += float((gap**2).sum()) / 24
    assert hint(student, teacher).item() == pytest.approx(expected, abs=1e-12)


def test_a_hint_between_a_spatial_and_a_flat_layer_is_linear() -> None:
    hint = Hint(torch.Size((1, 2, 2, 2)), torch.Size((1, 5)), torch_generator(1)).double()
    student, teacher = points(3, 8), points(3, 5, 1)
    guess = student @ hint.weight.T + hint.bias
    expected = ((guess - teacher) ** 2).mean().item()
    assert hint(student.view(3, 2, 2, 2), teacher).item() == pytest.approx(expected, abs=1e-12)


def test_an_ensemble_answers_with_the_mean_of_its_members() -> None:
    members: list[nn.Module] = [nn.Linear(3, 4), nn.Linear(3, 4)]
    both, inputs = Ensemble(members), points(5, 3).float()
    for heat in (1.0, 3.0):
        mean = sum(F.softmax(m(inputs) / heat, dim=1) for m in members) / 2
        torch.testing.assert_close(softened(both, inputs, heat), mean)
    torch.testing.assert_close(F.softmax(both(inputs), dim=1), softened(both, inputs, 1.0))


def small(norm: bool = True) -> nn.Sequential:
    layers = [nn.Conv2d(1, 3, 3, padding=1), *([nn.BatchNorm2d(3)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(48, 4))


@pytest.mark.parametrize("kind", ["feature", "relation", "response+feature", "response+relation"])
def test_a_guide_adds_the_terms_of_its_kind(kind: str) -> None:
    torch.manual_seed(0)
    student, teacher = small(), small(norm=False).eval()
    inputs, labels = torch.randn(6, 1, 4, 4), torch.arange(6) % 4
    distill = Distill.model_validate({"kind": kind, "weight": 0.3, "temperature": 3.0})
    guide = Guide(teacher, distill, student, inputs[:1], torch_generator(0))
    student.eval()
    mine, other = student[:3](inputs), teacher[:2](inputs)
    terms = {
        "response": lambda: response_loss(student(inputs), softened(teacher, inputs, 3.0), 3.0),
        "relation": lambda: relation_loss(mine.flatten(1), other.flatten(1)),
        "feature": lambda: F.mse_loss(
            F.conv2d(mine, guide.parameters[0][:, :, None, None], guide.parameters[1]), other
        ),
    }
    total = 0.7 * F.cross_entropy(student(inputs), labels)
    total += 0.3 * sum(terms[term]() for term in kind.split("+"))
    torch.testing.assert_close(guide.loss(student, inputs, labels), total)


class Asked(nn.Module):
    """A teacher that remembers how many examples it was asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.asked = small(norm=False).eval(), 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.asked += len(inputs)
        return self.layers(inputs)


VIEWS = [(), (0, 1), (1, 0), (-1, 2)]


def views_of(batches: list[tuple[int, list[int]]]) -> list[tuple[torch.Tensor, Seen]]:
    """Batches of ten examples, each in one of four views, which change them."""
    examples = torch.randn((10, 1, 4, 4), generator=torch_generator(0, "examples"))
    found: list[tuple[torch.Tensor, Seen]] = []
    for view, chosen in batches:
        shifted = examples[chosen] + view
        found.append((shifted, Seen(torch.tensor(chosen), VIEWS[view])))
    return found


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.lists(st.integers(0, 9), min_size=1, unique=True)),
        min_size=1,
        max_size=12,
    )
)
def test_a_teacher_is_asked_once_about_an_example_in_a_view(
    batches: list[tuple[int, list[int]]],
) -> None:
    torch.manual_seed(0)
    teacher = Asked()
    answers = Answers(teacher, 2.0, 10)
    for inputs, seen in views_of(batches):
        found = answers(inputs, seen)
        torch.testing.assert_close(found, softened(teacher.layers, inputs, 2.0))
    assert teacher.asked == len({(view, one) for view, chosen in batches for one in chosen})


def test_answers_beyond_the_memory_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    teacher = Asked()
    monkeypatch.setattr("reticent.compression.distill._MOST_REMEMBERED", 2 * 10 * 4)
    answers = Answers(teacher, 2.0, 10)
    for inputs, seen in views_of([(0, [1, 2]), (1, [3]), (2, [4]), (2, [4]), (0, [2]), (1, [3])]):
        torch.testing.assert_close(answers(inputs, seen), softened(teacher.layers, inputs, 2.0))
    assert teacher.asked == 5  # the third view's twice


def test_a_guide_that_compares_layers_asks_its_teacher_each_time() -> None:
    torch.manual_seed(0)
    for kind, asked in (("response", 3), ("response+relation", 6)):
        teacher, student = Asked(), small()
        distill = Distill.model_validate({"kind": kind})
        guide = Guide(teacher, distill, student, torch.ones(1, 1, 4, 4), torch_generator(0), 10)
        teacher.asked = 0
        for inputs, seen in views_of([(1, [1, 2, 3]), (1, [3, 2, 1])]):
            remembered = guide.loss(student, inputs, torch.zeros(3, dtype=torch.int64), seen)
        count = teacher.asked
        plain = guide.loss(student, inputs, torch.zeros(3, dtype=torch.int64))
        torch.testing.assert_close(remembered, plain)
        assert count == asked


def test_a_guide_leaves_no_hooks_and_no_statistics_behind() -> None:
    student, teacher = small(), small().eval()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    guide = Guide(
        teacher, Distill(kind="feature"), student, torch.ones(1, 1, 4, 4), torch_generator(0)
    )
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    guide.loss(student, torch.randn(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)).backward()
    assert all(not m._forward_hooks for m in (*student.modules(), *teacher.modules()))  # pyright: ignore[reportPrivateUsage]
    assert student.training and all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in guide.parameters)


def test_a_model_without_hidden_layers_is_refused() -> None:
    flat = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(PlanError, match='kind="feature": the student has no hidden layer'):
        Guide(small(), Distill(kind="feature"), flat, torch.ones(1, 4), torch_generator(0))
