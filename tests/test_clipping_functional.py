"""Sums by torch.func: those of the other ways, for any student, clip, mask and rounding."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from graph_students import LENGTH, Block, Centred, Scaled
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from owned_students import CLIP, MODELS, batch_of, distilling, layout_of, made, one_by_one
from torch import nn
from torch.nn import functional as F

from reticent.compression.quantize import training_swap
from reticent.compression.stacked import stacked_rounding
from reticent.core.errors import DataError, PlanError
from reticent.core.plan import Quantize
from reticent.core.update import Layout
from reticent.privacy.clipping import (
    ClippedGradients,
    FunctionalGradients,
    OwnGradients,
    own_chain_of,
    unfit,
)
from reticent.privacy.clipping.bounds import Clipping
from reticent.privacy.clipping.functional import filled, passes
from reticent.privacy.clipping.own import unpacked
from reticent.privacy.clipping.terms import Owners

PLAIN = Quantize(kind="none")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here")
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=needs_cuda)]
BOUND = 2e-4
"""Most by which a sum may differ, of its largest coordinate: between ways, and between devices."""


def weights_of(layout: Layout, owners: int, seed: int = 0) -> NDArray[np.float32]:
    drawn = np.random.default_rng(seed).standard_normal((owners, layout.size))
    return (0.3 * drawn).astype(np.float32)


def close(found: NDArray[np.floating], expected: NDArray[np.floating]) -> None:
    largest = np.abs(expected).max(initial=0.0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=BOUND * largest + 1e-6)


def alone(
    model: nn.Module,
    layout: Layout,
    batch: Sequence[torch.Tensor],
    clip: float | None,
    clipping: Clipping,
    section: Quantize,
    shape: tuple[int, ...],
) -> NDArray[np.floating]:
    """What an owner gets at the weights in ``model`` from the code for common weights."""
    swap = training_swap(section)
    if clip is not None:
        gradients = ClippedGradients(model, layout, clipping=clipping, shape=shape)
        return gradients.sum(batch[0], batch[1], distilling, clip, swap)
    with swap(model):
        loss = distilling(model(batch[0]), batch[1])
        found = torch.autograd.grad(loss, list(model.parameters()))
    return layout.gather(list(found))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", list(MODELS))
@settings(max_examples=8, deadline=None)
@given(
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    clip=st.sampled_from([CLIP, None]),
    clipping=st.sampled_from(["flat", "per-layer"]),
    share=st.sampled_from([1.0, 0.4]),
    section=st.sampled_from([PLAIN, Quantize(bits=8), Quantize(bits=2, granularity="tensor")]),
    microbatch=st.sampled_from([1, 4, 64]),
    seed=st.integers(0, 1000),
)
def test_every_owner_gets_the_sum_of_every_other_way(
    kind: str,
    device: str,
    counts: list[int],
    clip: float | None,
    clipping: Clipping,
    share: float,
    section: Quantize,
    microbatch: int,
    seed: int,
) -> None:
    """One owner after another, in common passes where these know the layers, and in a loop."""
    model = made(kind)
    layout = layout_of(model, share)
    inputs, labels = batch_of(kind, sum(counts), seed)
    weights = weights_of(layout, len(counts), seed)
    gradients = FunctionalGradients(model, layout, microbatch, clipping, torch.device(device))
    given_ = (weights, inputs, labels, counts, distilling, clip, stacked_rounding(model, section))
    before = [p.clone() for p in model.parameters()]
    found = gradients.sums(*given_)
    assert found.shape == (len(counts), layout.size) and found.dtype == np.float32
    if device == "cpu":
        assert (found == gradients.sums(*given_)).all()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    if own_chain_of(model):
        close(found, OwnGradients(model, layout, microbatch, clipping).sums(*given_))
    for row, own, span in zip(found, weights, Owners.of(counts).spans, strict=True):
        twin, batch = made(kind), (inputs[span], labels[span])
        layout.write(twin, own)
        if span.stop == span.start:
            assert (row == 0).all()
            continue
        close(row, alone(twin, layout, batch, clip, clipping, section, MODELS[kind][0]))
        if clip is not None and section.kind == "none":
            close(row, one_by_one(twin, layout, batch, clipping))


def row_of(kind: str, counts: Sequence[int], clip: float | None) -> NDArray[np.float32]:
    model = made(kind)
    layout = Layout.of(model)
    inputs, labels = batch_of(kind, 12, 0)
    given_ = (inputs[: sum(counts)], labels[: sum(counts)], counts, distilling, clip)
    return FunctionalGradients(model, layout).sums(weights_of(layout, len(counts)), *given_)


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("clip", [CLIP, None])
def test_one_more_example_changes_its_owners_row_alone_and_by_no_more_than_the_clip(
    kind: str, clip: float | None
) -> None:
    before, after = row_of(kind, (2, 3, 4), clip), row_of(kind, (2, 3, 5), clip)
    close(after[:2], before[:2])
    moved = float(np.linalg.norm(after[2] - before[2]))
    assert moved > 1e-3
    assert clip is None or moved <= clip * (1 + 1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["two-linear", "convolution", "group-norm", "residual"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("clip", [CLIP, None])
def test_what_is_not_finite_is_its_owners_alone(
    kind: str, bad: float, clip: float | None, device: str
) -> None:
    """With a clip it counts zero; without one it stays what it is, in its owner's row."""
    model = made(kind)
    layout = Layout.of(model)
    gradients = FunctionalGradients(model, layout, device=torch.device(device))
    (inputs, labels), weights = batch_of(kind, 9, 0), weights_of(layout, 3)
    spoilt = inputs.clone()
    spoilt[5, 0, 0, 0] = bad  # the last of its owner's: what fills up
    found = gradients.sums(weights, spoilt, labels, (2, 4, 3), distilling, clip)
    clean = gradients.sums(weights, inputs, labels, (2, 4, 3), distilling, clip)
    close(found[[0, 2]], clean[[0, 2]])
    if bad == 1e30 and kind in ("group-norm", "residual"):  # a norm makes it finite again
        return
    if clip is None:
        assert not np.isfinite(found[1]).all() or np.abs(found[1]).max() > 1e20
        return
    kept = [0, 1, 2, 3, 4, 6, 7, 8]
    without = gradients.sums(weights, inputs[kept], labels[kept], (2, 3, 3), distilling, clip)
    close(found[1], without[1])


def test_weights_that_are_not_finite_are_their_owners_alone() -> None:
    model = made("attention")
    layout, gradients = Layout.of(model), FunctionalGradients(model, Layout.of(model))
    batch, weights = batch_of("attention", 6, 0), weights_of(layout, 3)
    clean = gradients.sums(weights, *batch, (2, 2, 2), distilling, CLIP)
    weights[1] = np.inf
    found = gradients.sums(weights, *batch, (2, 2, 2), distilling, CLIP)
    close(found[[0, 2]], clean[[0, 2]])
    assert (found[1] == 0).all()


class Looking(nn.Module):
    """Looks up what it is given, by its layer or with the layer's weight."""

    def __init__(self, direct: bool) -> None:
        super().__init__()
        self.table, self.head, self.direct = nn.Embedding(8, 4), nn.Linear(4, 3), direct

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes = x.long()
        found = F.embedding(codes, self.table.weight) if self.direct else self.table(codes)
        return self.head(found.mean(dim=1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("code", [-1, 8, 15])
@pytest.mark.parametrize("clip", [CLIP, None])
def test_a_code_beyond_the_table_moves_no_other_row(
    clip: float | None, code: int, direct: bool, device: str
) -> None:
    """It is an error, as where gradients are those of one set of weights."""
    torch.manual_seed(0)
    model, labels = Looking(direct), torch.tensor([0, 1])
    layout, good = Layout.of(model), torch.tensor([[1.0, 7.0], [0.0, 4.0]])
    gradients = FunctionalGradients(model, layout, device=torch.device(device))
    weights = weights_of(layout, 2)
    found = gradients.sums(weights, good, labels, (1, 1), distilling, clip)
    for own, row, one, label in zip(weights, found, good, labels, strict=True):
        layout.write(model, own)
        section, batch = PLAIN, (one[None], label[None])
        if not direct:
            close(row, alone(model, layout, batch, clip, "flat", section, (2,)))
    bad = torch.tensor([[1.0, code], [0.0, 4.0]])
    with pytest.raises(IndexError):
        gradients.sums(weights, bad, labels, (1, 1), distilling, clip)
    with pytest.raises(IndexError):
        alone(Looking(False), layout, (bad, labels), clip, "flat", PLAIN, (2,))


@pytest.mark.parametrize("clip", [CLIP, None])
def test_the_comparison_tells_weights_of_a_neighbour_and_examples_that_count_twice(
    clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = row_of("residual", (2, 3, 4), clip)
    with monkeypatch.context() as patch:
        name = "reticent.privacy.clipping.functional.unpacked"
        patch.setattr(name, lambda *given: [w.roll(1, 0) for w in unpacked(*given)])
        with pytest.raises(AssertionError):
            close(row_of("residual", (2, 3, 4), clip), right)
    if clip is None:
        name = "reticent.privacy.clipping.functional.filled"
        monkeypatch.setattr(name, lambda pieces: every_filling_counts(pieces))
        with pytest.raises(AssertionError):
            close(row_of("residual", (2, 3, 4), clip), right)


def every_filling_counts(pieces: list[tuple[int, slice]]) -> tuple[torch.Tensor, torch.Tensor]:
    index, _ = filled(pieces)
    return index, torch.arange(index.numel())


@given(counts=st.lists(st.integers(0, 40), max_size=12), most=st.integers(1, 50))
def test_passes_hold_every_example_once_and_no_more_than_fit(counts: list[int], most: int) -> None:
    spans, seen = Owners.of(counts).spans, list[int]()
    for pieces in passes(spans, most):
        index, counted = filled(pieces)
        assert index.numel() <= most
        assert len({owner for owner, _ in pieces}) == len(pieces)
        for (owner, _), row in zip(pieces, index, strict=True):
            assert all(spans[owner].start <= one < spans[owner].stop for one in row.tolist())
        seen += index.flatten()[counted].tolist()
    assert seen == list(range(sum(counts)))


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("clip", [CLIP, None])
def test_nothing_of_a_pass_stays_on_the_host(
    kind: str, clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On torch's device without any memory, where most operations refuse a tensor of the host.

    What comes back from there is made up; of some examples it is not finite.
    """

    def back(tensor: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.rand(tensor.shape) < 0.1, torch.nan, 1.0).to(tensor.dtype)

    monkeypatch.setattr(torch.Tensor, "cpu", back)
    model, meta = made(kind), torch.device("meta")
    layout, batch = layout_of(model, 0.7), batch_of(kind, 9, 0)
    gradients = FunctionalGradients(model, layout, 4, device=meta)
    found = gradients.sums(weights_of(layout, 3), *batch, (3, 0, 6), on_device, clip)
    assert found.shape == (3, layout.size) and (found[1] == 0).all()


def on_device(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    assert logits.is_meta and labels.is_meta
    return distilling(logits, labels)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", list(MODELS))
def test_a_trial_has_nothing_against_students_that_are_right(kind: str, device: str) -> None:
    model = made(kind)
    before = [p.clone() for p in model.parameters()]
    assert unfit(model, MODELS[kind][0], torch.device(device)) is None
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


class Asking(nn.Linear):
    """Looks at a value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore
        return super().forward(x) if float(x.sum()) > 0 else super().forward(-x)


class Several(nn.Linear):
    """Gives two rows for an example."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore
        return super().forward(x).repeat(2, 1)


class Recurrent(nn.Module):
    """torch's own recurrent layer, which is not unrolled."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(4, 3, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x[:, None])[1][0]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Asking(4, 3), "item"),
        (Several(4, 3), "2 rows for 1 examples"),
        (Recurrent(), "gru"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "batch normalisation"),
        (nn.Linear(5, 3), "torch.func cannot take it"),
        (Centred(nn.Linear(4, 4), 4), "not that of plain passes"),
        (Scaled(torch.log, nn.Linear(4, 4)), "its gradients at random inputs are not finite"),
    ],
    ids=lambda given: given if isinstance(given, str) else type(given).__name__,
)
def test_a_trial_says_what_is_against_a_student(model: nn.Module, reason: str) -> None:
    said = unfit(model, (4,))
    assert said is not None and reason in said and "\n" not in said


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_trial_computes_nothing_of_codes_that_the_host_refuses(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a graphics processor they would end every later computation."""
    seen: list[torch.Tensor] = []
    sums = FunctionalGradients.sums

    def followed(self: FunctionalGradients, weights: Any, inputs: Any, *given: Any) -> Any:
        seen.append(inputs)
        return sums(self, weights, inputs, *given)

    monkeypatch.setattr(FunctionalGradients, "sums", followed)
    assert unfit(Looking(direct=False), (length,)) is None
    codes = torch.cat(seen).long()
    assert len(seen) == 2 and codes.min() >= 0 and codes.max() < 8


def test_a_trial_passes_over_warnings_that_are_not_of_a_slow_loop() -> None:
    class Warned(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore
            warnings.warn("there was no current CUDA context", stacklevel=1)
            return super().forward(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert unfit(Warned(4, 3), (4,)) is None


def test_a_trial_goes_on_to_inputs_that_say_something() -> None:
    assert unfit(Scaled(torch.log1p, nn.Linear(4, 4)), (4,)) is None


def test_attention_by_torchs_kernel_is_written_out_and_no_slow_loop() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert unfit(Block(), (LENGTH,)) is None


def test_dropout_draws_for_every_example() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 3))
    layout = Layout.of(model)
    inputs, labels = torch.ones(2, 4), torch.zeros(2, dtype=torch.int64)
    weights = np.stack([layout.read(model)] * 2)
    found = FunctionalGradients(model, layout).sums(weights, inputs, labels, (1, 1), distilling, 1)
    assert np.abs(found[0] - found[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("counts", "owners", "clip", "error"),
    [
        ((3,), 1, CLIP, DataError),
        ((5, -1), 2, CLIP, DataError),
        ((2, 2), 3, CLIP, DataError),
        ((2, 2), 2, 0.0, PlanError),
    ],
)
def test_owners_must_have_all_the_examples_and_weights(
    counts: tuple[int, ...], owners: int, clip: float, error: type[Exception]
) -> None:
    model = made("linear")
    layout = Layout.of(model)
    weights, batch = weights_of(layout, owners), batch_of("linear", 4, 0)
    with pytest.raises(error, match="must be"):
        FunctionalGradients(model, layout).sums(weights, *batch, counts, distilling, clip)


def test_a_pass_must_hold_an_example() -> None:
    with pytest.raises(DataError, match="microbatch=0: must be at least 1"):
        FunctionalGradients(made("linear"), Layout.of(made("linear")), 0)
