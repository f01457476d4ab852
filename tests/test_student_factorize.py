"""Low-rank factorization: the best approximation of its rank, and only where it is smaller."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reticent.compression.factorize import Rule, factorized
from reticent.compression.fold import folded
from reticent.compression.structure import build, describe
from reticent.core.errors import PlanError
from reticent.core.models import STUDENTS, student
from reticent.core.seeds import torch_generator


def model() -> nn.Sequential:
    chain = nn.Sequential(
        nn.Conv2d(3, 12, 3, stride=2, padding=2, dilation=2),
        nn.ReLU(),
        nn.Conv2d(12, 8, (3, 1), bias=False),
        nn.GroupNorm(2, 8),
        nn.Flatten(),
        nn.Linear(32, 20),
        nn.ReLU(),
        nn.Linear(20, 3),
    )
    generator = torch_generator(5, "factorize")
    for p in chain.parameters():
        p.data = 0.5 * torch.randn(p.shape, generator=generator)
    return chain.eval()


def inputs() -> torch.Tensor:
    return torch.randn(6, 3, 8, 4, generator=torch_generator(1, "inputs"))


def matrices(chain: nn.Sequential) -> list[np.ndarray]:
    weights = [m.weight.detach() for m in chain if isinstance(m, nn.Conv2d | nn.Linear)]
    return [w.double().flatten(1).numpy() for w in weights]


def products(chain: nn.Sequential) -> list[np.ndarray]:
    """Return the matrices that pairs of factors stand for, and single layers' own."""
    layers = list(chain)
    found: list[np.ndarray] = []
    position = 0
    while position < len(layers):
        own = matrices(nn.Sequential(layers[position]))
        after = matrices(nn.Sequential(*layers[position + 1 : position + 2]))
        position += 1
        if own and after:
            found.append(after[0] @ own[0])
            position += 1
        elif own:
            found.append(own[0])
    return found


@pytest.mark.parametrize(("rule", "keep"), [("energy", 0.6), ("energy", 0.9), ("size", 0.5)])
def test_every_product_is_the_best_of_its_rank_by_numpy(rule: Rule, keep: float) -> None:
    dense = model()
    small, splits = factorized(dense, rule, keep)
    assert len(splits) >= 2
    ranks = {s.name: s.rank for s in splits}
    names = [n for n, m in dense.named_children() if isinstance(m, nn.Conv2d | nn.Linear)]
    for name, whole, product in zip(names, matrices(dense), products(small), strict=True):
        left, values, right = np.linalg.svd(whole, full_matrices=False)
        rank = ranks.get(name, len(values))
        expected = (left[:, :rank] * values[:rank]) @ right[:rank]
        assert np.allclose(product, expected, atol=1e-5)
        if name in ranks and rule == "energy":
            shares = np.cumsum(values**2) / np.sum(values**2)
            assert shares[rank - 1] >= keep and (rank == 1 or shares[rank - 2] < keep)
        if name in ranks and rule == "size":
            assert rank * sum(whole.shape) <= keep * whole.size < (rank + 1) * sum(whole.shape)


def test_with_full_rank_the_function_is_the_same() -> None:
    """A wide enough layer of low rank loses nothing."""
    dense = model()
    layer = dense[5]
    assert isinstance(layer, nn.Linear)
    generator = torch_generator(2, "rank")
    layer.weight.data = torch.randn(20, 2, generator=generator) @ torch.randn(
        2, 32, generator=generator
    )
    small, splits = factorized(dense, "energy", 1 - 1e-9)
    assert [(s.name, s.rank) for s in splits] == [("5", 2)]
    assert torch.allclose(small(inputs()), dense(inputs()), atol=1e-4)
    worse, _ = factorized(dense, "energy", 0.5)
    assert not torch.allclose(worse(inputs()), dense(inputs()), atol=1e-2)


def test_only_layers_that_get_smaller_are_replaced() -> None:
    small, splits = factorized(model(), "energy", 1.0)
    assert splits == [] and describe(small) == describe(model())


@settings(deadline=None, max_examples=30)
@given(st.floats(0.2, 1), st.sampled_from(["energy", "size"]), st.sampled_from(sorted(STUDENTS)))
def test_no_model_grows_and_every_one_can_be_sent(keep: float, rule: Rule, kind: str) -> None:
    dense = folded(student(kind, (1, 8, 8), 10).eval())
    small, splits = factorized(dense, rule, keep)
    counts = [sum(p.numel() for p in m.parameters()) for m in (dense, small)]
    assert counts[0] - counts[1] == sum(s.before - s.after for s in splits)
    assert all(s.after < s.before for s in splits)
    assert describe(build(describe(small), (1, 8, 8), 10)) == describe(small)


def test_the_model_that_is_given_and_the_generator_do_not_change() -> None:
    dense, before = model(), torch.random.get_rng_state()
    factorized(dense, "size", 0.5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(
        torch.equal(a, b) for a, b in zip(dense.parameters(), model().parameters(), strict=True)
    )


def test_rank_zero_is_refused_by_name_and_the_named_limit_works() -> None:
    with pytest.raises(PlanError, match=r"layer 7 .* rank 0; must be at least 0\.38") as caught:
        factorized(model(), "size", 0.3)
    limit = float(str(caught.value).split("at least ")[1]) + 1e-4
    _, splits = factorized(model(), "size", limit)
    assert {s.name: s.rank for s in splits}["7"] == 1
    dense = model()
    next(dense.parameters()).data.zero_()
    with pytest.raises(PlanError, match="layer 0 would get rank 0; its weights are zero"):
        factorized(dense, "energy", 0.5)


def test_what_cannot_be_factorized_is_refused() -> None:
    with pytest.raises(PlanError, match=r"not an nn\.Sequential"):
        factorized(nn.Linear(2, 2), "size", 0.5)
    for keep in (0.0, 1.5, float("nan")):
        with pytest.raises(PlanError, match="at most 1"):
            factorized(model(), "size", keep)
    dense = model()
    next(dense.parameters()).data[0] = float("inf")
    with pytest.raises(PlanError, match="layer 0 has weights that are not finite"):
        factorized(dense, "size", 0.5)


def test_grouped_convolutions_stay() -> None:
    chain = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 64, 1))
    _, splits = factorized(chain, "size", 0.9)
    assert [s.name for s in splits] == ["1"]
