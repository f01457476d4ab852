"""Which way gradients are computed: what the layers and a trial on random inputs say."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import pytest
import torch
from graph_students import (
    Alternating,
    Averaged,
    Block,
    Bypassed,
    Centred,
    Companion,
    Faint,
    Folding,
    Functional,
    Keyword,
    Overwriting,
    Places,
    Residual,
    Scaled,
    Shuffled,
    Squeezed,
    Stochastic,
    Summed,
    Token,
    Twice,
    Ungraded,
    Unused,
    Weighed,
    With,
)
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from reticent.core.errors import DataError
from reticent.core.sequences import Attention
from reticent.core.update import Layout
from reticent.privacy.clipping import ClippedGradients, choice, graph, method_of
from reticent.privacy.clipping.terms import Owners, Term
from reticent.privacy.clipping.trial import misfit

Make = Callable[[], nn.Module]
IMAGE = (2, 8, 8)


def square() -> nn.Linear:
    return nn.Linear(4, 4)


def tied() -> nn.Module:
    model = nn.Sequential(With(square(), 4), nn.Linear(3, 3))
    model.again = With(square(), 4)
    model.again.layer.weight = model[0].layer.weight  # pyright: ignore
    return model


def frozen() -> nn.Module:
    model = With(square(), 4)
    model.layer.bias.requires_grad_(False)  # pyright: ignore
    return model


def hooked() -> nn.Module:
    model = With(square(), 4)
    model.layer.register_forward_hook(lambda module, inputs, output: -output)
    return model


class Doubling(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return 2 * w


def parametrized() -> nn.Module:
    model = With(square(), 4)
    parametrize.register_parametrization(model.layer, "weight", Doubling())
    return model


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: Attention(5, 4, 8), (5,)),
        (Block, (5,)),
        (Residual, IMAGE),
        (Places, (2, 8, 7)),
        (lambda: With(nn.Sequential(square(), nn.Dropout()), 4), (4,)),
        (lambda: With(nn.Embedding(4, 4), 20), (5,)),
    ],
)
def test_known_layers_joined_in_any_way_are_recorded(make: Make, shape: tuple[int, ...]) -> None:
    class Coded(nn.Module):
        """Tables take whole numbers only, which the second draw of the trial has."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            table = isinstance(self.inner, With) and isinstance(self.inner.layer, nn.Embedding)
            return self.inner(x.long() if table else x)

    model = Coded(make())
    assert ClippedGradients(model, Layout.of(model), shape=shape).method == "graph"
    assert method_of(model, None)[0] == "hooks"


@pytest.mark.parametrize(
    ("make", "shape", "reason"),
    [
        (lambda: Twice(square(), 4), (4,), "layer layer, which is used 2 times|layer.weight"),
        (lambda: Functional(square(), 4), (4,), "parameter layer.weight is used 2 times"),
        (lambda: Bypassed(square(), 4), (4,), "layer layer, which is used 0 times"),
        (lambda: Unused(square(), 4), (4,), "parameter layer.weight is used 0 times"),
        (lambda: Overwriting(square(), 4), (4,), "input of layer layer is changed in place"),
        (lambda: Keyword(square(), 4), (4,), "layer layer must be called with its input alone"),
        (lambda: Ungraded(square(), 4), (4,), "parameter layer.weight is used 0 times"),
        (lambda: Folding(nn.Linear(2, 2), 4), (2, 2), "layer layer took 6 rows for 3 examples"),
        (lambda: Stochastic(square(), 4), (4,), "gradient of layer.weight is not that of"),
        (Token, (4,), r"layer \(the model\) \(Token\) has no closed form"),
        (tied, (4,), "layer again.layer shares a parameter"),
        (frozen, (4,), "layer layer has a parameter that is not trained"),
        (hooked, (4,), "hooks on the student's modules"),
        (parametrized, (4,), r"layer layer \(ParametrizedLinear\) has no closed form"),
        (
            lambda: With(nn.Conv2d(2, 4, 3, groups=2), 144),
            IMAGE,
            r"layer layer \(Conv2d\) has no closed form",
        ),
        (
            lambda: With(nn.Conv2d(2, 4, 3, padding="same"), 256),
            IMAGE,
            r"layer layer \(Conv2d\) has no closed form",
        ),
        (lambda: With(nn.Conv1d(2, 4, 3), 24), (2, 8), r"layer layer \(Conv1d\) has no"),
        (lambda: With(nn.PReLU(), 4), (4,), r"layer layer \(PReLU\) has no closed form"),
        (lambda: With(nn.Embedding(4, 4, sparse=True), 20), (5,), r"layer \(Embedding\) has no"),
        (lambda: With(square(), 5), (4,), "shapes cannot be multiplied"),
    ],
)
def test_anything_else_is_left_to_the_hooks_and_the_reason_names_the_layer(
    make: Make, shape: tuple[int, ...], reason: str
) -> None:
    method, found = method_of(make(), shape)
    assert method == "hooks"
    assert re.search(reason, found), found
    with pytest.raises(DataError, match='method="graph"'):
        ClippedGradients(make(), Layout.of(make()), method="graph", shape=shape)


def test_the_reason_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    choice._say.cache_clear()
    with caplog.at_level(logging.WARNING, "reticent.privacy"):
        for _ in range(2):
            model = With(nn.PReLU(), 4)
            assert ClippedGradients(model, Layout.of(model), shape=(4,)).method == "hooks"
    assert [r.getMessage() for r in caplog.records] == [
        "gradients of single examples by Opacus' hooks, which is slower: layer layer (PReLU) has "
        "no closed form here"
    ]


@pytest.mark.parametrize("method", [None, "hooks", "graph"])
@pytest.mark.parametrize("kind", [Centred, Summed, Shuffled, Faint])
def test_a_student_that_mixes_examples_is_refused(kind: type[With], method: None) -> None:
    model = kind(square(), 4)
    # A mean over one example is another function, which is no longer recorded as the examples' own.
    with pytest.raises(DataError, match=r"mixes examples|is not that of a pass over one example"):
        ClippedGradients(model, Layout.of(model), method=method, shape=(4,))
    if method is None:
        with pytest.raises(DataError, match="the student mixes examples"):
            ClippedGradients(model, Layout.of(model), shape=(4,))


@pytest.mark.parametrize("method", [None, "hooks", "graph"])
@pytest.mark.parametrize("inner", [square, lambda: nn.Sequential(square(), nn.Dropout())])
@pytest.mark.parametrize("kind", [Averaged, Alternating, Squeezed, Companion])
def test_a_student_that_depends_on_how_many_examples_there_are_is_refused(
    kind: type[With], inner: Make, method: choice.Method | None
) -> None:
    """Adding an example would change the gradients of the others."""
    model = kind(inner(), 4)
    refusal = "depends on how many examples are in the batch"
    if method == "graph":
        refusal += '|method="graph"'
    with pytest.raises(DataError, match=refusal):
        ClippedGradients(model, Layout.of(model), method=method, shape=(4,))


def test_a_student_whose_gradients_alone_depend_on_how_many_there_are_is_refused() -> None:
    model = Weighed(square(), 4)
    with pytest.raises(DataError, match="gradients of 2 random examples are not the sum"):
        ClippedGradients(model, Layout.of(model), shape=(4,))


@pytest.mark.parametrize("always", [False, True])
def test_a_student_that_draws_does_not_depend_on_how_many_there_are(always: bool) -> None:
    class Drawing(With):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(F.dropout(x, 0.5, always or self.training))

    model = Drawing(square(), 4)
    assert ClippedGradients(model, Layout.of(model), shape=(4,)).method == (
        "hooks" if always else "graph"
    )


def test_a_student_that_mixes_only_before_a_layer_of_zeros_is_refused() -> None:
    class Late(Centred):
        def __init__(self) -> None:
            super().__init__(square(), 4)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.layer.weight)  # pyright: ignore

    with pytest.raises(DataError, match="the student mixes examples"):
        ClippedGradients(Late(), Layout.of(Late()), shape=(4,))


def test_a_student_that_refuses_random_inputs_is_left_to_the_hooks() -> None:
    class Picky(With):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if (x < 5).any():
                raise ArithmeticError("too small")
            return super().forward(x)

    model = Picky(square(), 4)
    assert method_of(model, (4,)) == ("hooks", "too small")
    assert ClippedGradients(model, Layout.of(model), shape=(4,)).method == "hooks"


@pytest.mark.parametrize("scale", [torch.log1p, torch.sqrt])
def test_a_student_of_which_some_numbers_say_nothing_is_tried_on_others(
    scale: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Its gradients at negative numbers are not finite; those at codes 0 and 1 are."""
    model = Scaled(scale, square())
    assert ClippedGradients(model, Layout.of(model), shape=(4,)).method == "graph"


def test_a_student_that_is_finite_nowhere_is_said_to_be_so() -> None:
    said = "its gradients at random inputs are not finite"
    assert method_of(Scaled(torch.log, square()), (4,)) == ("hooks", said)


def test_the_trial_changes_neither_weights_nor_mode_nor_what_is_drawn_next() -> None:
    model = With(nn.Sequential(square(), nn.Dropout()), 4).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    ClippedGradients(model, Layout.of(model), shape=(4,))
    assert torch.equal(torch.rand(3), expected)
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_trial_keys_no_other_device(monkeypatch: pytest.MonkeyPatch) -> None:
    keyed: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", keyed.append)
    model = With(nn.Sequential(square(), nn.Dropout()), 4)
    ClippedGradients(model, Layout.of(model), shape=(4,))
    assert not keyed


def test_a_layer_that_takes_other_rows_than_the_examples_is_refused_at_once() -> None:
    model = Folding(nn.Linear(2, 2), 4)
    with pytest.raises(DataError, match="took 6 rows for 3 examples"):
        ClippedGradients(model, Layout.of(model), shape=(2, 2))


class Wrong:
    """A term that forgets, or is a hundredth too large."""

    def __init__(self, term: Term, factor: float) -> None:
        self.term, self.factor = term, factor

    def squares(self, mask: torch.Tensor | None) -> torch.Tensor:
        return self.term.squares(mask)

    def add_weighted(
        self,
        total: torch.Tensor,
        kept: torch.Tensor | None,
        factors: torch.Tensor,
        owners: Owners,
    ) -> None:
        self.term.add_weighted(total, kept, self.factor * factors, owners)


@pytest.mark.parametrize("factor", [0.0, 1.01])
@pytest.mark.parametrize(
    ("layer", "shape", "inputs"),
    [
        (lambda: nn.Linear(7, 3), (7,), 3),
        (lambda: nn.Linear(7, 3), (4, 7), 12),
        (lambda: nn.Conv2d(2, 3, 3), IMAGE, 108),
        (lambda: nn.GroupNorm(1, 2), IMAGE, 128),
        (lambda: nn.LayerNorm(8), IMAGE, 128),
    ],
)
@pytest.mark.parametrize("which", [0, 1])
def test_the_trial_finds_a_layer_whose_weight_or_bias_is_wrong(
    layer: Make,
    shape: tuple[int, ...],
    inputs: int,
    which: int,
    factor: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(With(layer(), inputs))
    assert misfit(model, shape) is None
    kind = type(model[0].layer)
    real = graph.TERMS[kind]

    def wrong(module: nn.Module, given: torch.Tensor, back: torch.Tensor) -> list[Term]:
        terms = real(module, given, back)
        if given.shape[1:] == shape:  # not the head, which may be of the same kind
            terms[which] = Wrong(terms[which], factor)
        return terms

    monkeypatch.setitem(graph.TERMS, kind, wrong)
    name = ("weight", "bias")[which]
    assert misfit(model, shape) == (
        f"the gradient of 0.layer.{name} is not that of a pass over one example alone"
    )


def test_sums_of_a_wrong_term_are_not_those_of_the_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparisons of the contract can fail."""
    torch.manual_seed(0)
    model = Block()
    real = graph.TERMS[nn.LayerNorm]
    monkeypatch.setitem(
        graph.TERMS,
        nn.LayerNorm,
        lambda *given: [Wrong(term, 1.01) for term in real(*given)],
    )
    inputs, labels = torch.randint(0, 4, (6, 5)).float(), torch.arange(6) % 3
    found = [
        ClippedGradients(model, Layout.of(model), method=method).sum(
            inputs, labels, lambda a, b: F.cross_entropy(a, b, reduction="sum"), 0.5
        )
        for method in ("graph", "hooks")
    ]
    assert abs(found[0] - found[1]).max() > 1e-4
