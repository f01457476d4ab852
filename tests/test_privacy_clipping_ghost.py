"""Ghost norms: which models get them, and that they say what written-out gradients say."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from reticent.compression.fold import fold_batchnorm
from reticent.compression.quantize import quantized_weights
from reticent.core.errors import DataError
from reticent.core.models import student
from reticent.core.update import Layout
from reticent.privacy.clipping import ClippedGradients
from reticent.privacy.clipping.bounds import Clipping
from reticent.privacy.clipping.ghost import chain_of
from reticent.privacy.clipping.terms import Outer, Rows


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


def linear_twice() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.ReLU(), layer)


def tied() -> nn.Module:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return nn.Sequential(first, second)


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    return model


def hooked() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda module, inputs, output: -output)
    return nn.Sequential(layer)


class Doubling(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return 2 * w


def parametrized() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    parametrize.register_parametrization(model[0], "weight", Doubling())
    return model


class Backwards(nn.Sequential):
    """A chain by its type, but not by what it does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in reversed(self):
            x = layer(x)
        return x


@pytest.mark.parametrize("kind", ["tiny", "tiny-gn", "wide", "wide-gn"])
def test_every_built_in_student_gets_ghost_norms(kind: str) -> None:
    model = student(kind, (1, 28, 28), 10)
    assert isinstance(model, nn.Sequential)
    folded = fold_batchnorm(model.eval())
    assert ClippedGradients(folded, Layout.of(folded)).method == "ghost"


def test_a_single_layer_and_nested_chains_get_ghost_norms() -> None:
    assert chain_of(nn.Linear(3, 2)) is not None
    nested = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    layers = chain_of(nested)
    assert layers is not None and [type(x).__name__ for x in layers] == ["Linear", "ReLU", "Linear"]


@pytest.mark.parametrize(
    "make",
    [
        linear_twice,
        tied,
        frozen,
        hooked,
        parametrized,
        lambda: Backwards(nn.Linear(4, 4), nn.Linear(4, 4)),
        lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)),
        lambda: nn.Sequential(nn.Flatten(0), nn.Linear(4, 4)),
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2)),
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding_mode="reflect", padding=1)),
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding="same")),
        lambda: nn.Sequential(nn.Embedding(4, 4)),
        lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)),
    ],
)
def test_anything_else_is_left_to_the_hooks(make: Callable[[], nn.Module]) -> None:
    assert chain_of(make()) is None


def test_ghost_norms_can_be_asked_for_only_where_they_are_right() -> None:
    model = linear_twice()
    with pytest.raises(DataError, match="not a plain chain"):
        ClippedGradients(model, Layout.of(model), method="ghost")


def test_the_choice_does_not_depend_on_data() -> None:
    """It is made before any data are seen, and never again."""
    model = nn.Sequential(nn.Linear(4, 2))
    gradients = ClippedGradients(model, Layout.of(model))
    for inputs in (torch.zeros(0, 4), torch.full((3, 4), float("nan")), torch.full((3, 4), 1e30)):
        gradients.sum(inputs, torch.zeros(len(inputs), dtype=torch.int64), cross_entropy, 1.0)
        assert gradients.method == "ghost"


LAYERS: list[Callable[[], nn.Sequential]] = [
    lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3 * 6 * 5, 4)),
    lambda: nn.Sequential(nn.Conv2d(2, 3, (3, 2), (2, 1), (1, 0), bias=False), nn.Flatten()),
    lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding="valid", dilation=2), nn.GELU(), nn.Flatten()),
    lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4), nn.MaxPool2d(2), nn.Flatten()),
    lambda: nn.Sequential(nn.Conv2d(2, 24, (7, 6)), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4)),
    lambda: nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3, bias=False), nn.Flatten()),
    lambda: nn.Sequential(nn.Flatten(), nn.Linear(112, 9), nn.SiLU(), nn.Linear(9, 4)),
    lambda: nn.Sequential(nn.Flatten(), nn.Linear(112, 8), nn.GroupNorm(2, 8), nn.Linear(8, 4)),
]


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("clipping", ["flat", "per-layer"])
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_ghost_and_hooks_give_the_same_sum(
    make: Callable[[], nn.Sequential], clipping: Clipping, share: float
) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(9, 2, 8, 7)
    sums = []
    for method in ("hooks", "ghost"):
        torch.manual_seed(1)
        model = make()
        mask = np.random.default_rng(0).random(Layout.of(model).total) < share
        layout = Layout.of(model, mask)
        gradients = ClippedGradients(model, layout, 4, clipping, method)
        labels = torch.arange(9) % 3
        sums.append(gradients.sum(inputs, labels, cross_entropy, 0.5, quantized_weights))
    np.testing.assert_allclose(sums[0], sums[1], atol=2e-6)
    assert np.linalg.norm(sums[0]) > 0.5


finite = st.floats(-(2.0**56), 2.0**56, width=32)


@settings(max_examples=60, deadline=None)
@given(
    back=st.lists(finite, min_size=3, max_size=3),
    inputs=st.lists(finite, min_size=4, max_size=4),
    seed=st.integers(0, 50),
)
def test_the_masked_norm_of_an_outer_product_is_that_of_the_product_written_out(
    back: list[float], inputs: list[float], seed: int
) -> None:
    mask = (np.random.default_rng(seed).random((3, 4)) < 0.5).astype(np.float32)
    term = Outer(torch.tensor([back]), torch.tensor([inputs]))
    written = np.outer(np.array(back), np.array(inputs))
    found = term.squares(torch.from_numpy(mask)), term.squares(None)
    for squares, kept in zip(found, (mask, np.ones_like(mask)), strict=True):
        expected = (written**2 * kept).sum()
        np.testing.assert_allclose(squares.numpy(), [expected], rtol=1e-9)


def test_norms_of_long_rows_are_right_to_five_digits() -> None:
    """A plain float32 norm of a million tenths is off by 4 in ten thousand, as is the bound."""
    values = torch.full((1, 1_000_000), 0.1)
    plain = torch.linalg.vector_norm(values, dim=1).item()
    assert abs(plain / 100 - 1) > 1e-4
    assert Rows(values).squares(None).sqrt().item() == pytest.approx(100, rel=1e-5)


def test_a_loss_that_ignores_a_layer_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    constant = torch.zeros(1, requires_grad=True)
    with pytest.raises(DataError, match="the loss must depend on every layer"):
        ClippedGradients(model, Layout.of(model)).sum(
            torch.randn(3, 4), torch.zeros(3), lambda logits, labels: constant.sum(), 1.0
        )
