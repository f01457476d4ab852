"""Sums of many owners in common passes: each is the owner's own, whatever else is in the pass."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from owned_students import (
    CLIP,
    MODELS,
    batch_of,
    cross_entropy,
    distilling,
    layout_of,
    made,
    one_by_one,
)

from reticent.compression.quantize import quantized_weights
from reticent.core.errors import DataError
from reticent.core.update import Layout
from reticent.privacy.clipping import ClippedGradients
from reticent.privacy.clipping.bounds import Clipping
from reticent.privacy.clipping.terms import Owners


@pytest.mark.parametrize("kind", list(MODELS))
@settings(max_examples=8, deadline=None)
@given(
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    clipping=st.sampled_from(["flat", "per-layer"]),
    share=st.sampled_from([1.0, 0.4]),
    rounded=st.booleans(),
    microbatch=st.sampled_from([1, 4, 64]),
    seed=st.integers(0, 1000),
)
def test_every_owner_gets_the_sum_that_opacus_hooks_and_a_loop_over_examples_give(
    kind: str,
    counts: list[int],
    clipping: Clipping,
    share: float,
    rounded: bool,
    microbatch: int,
    seed: int,
) -> None:
    model, twin = made(kind), made(kind)
    layout = layout_of(model, share)
    inputs, labels = batch_of(kind, sum(counts), seed)
    swap = [quantized_weights] if rounded else []
    gradients = ClippedGradients(model, layout, microbatch, clipping, shape=MODELS[kind][0])
    found = gradients.sums(inputs, labels, counts, distilling, CLIP, *swap)
    assert found.shape == (len(counts), layout.size) and found.dtype == np.float32
    assert (found == gradients.sums(inputs, labels, counts, distilling, CLIP, *swap)).all()
    # Opacus has no hooks for torch's recurrent layers, and trains rows for padding.
    without = ("lstm", "gru", "padded")
    hooked = kind not in without and ClippedGradients(twin, layout, 64, clipping, "hooks")
    for row, span in zip(found, Owners.of(counts).spans, strict=True):
        own = (inputs[span], labels[span])
        if hooked:
            np.testing.assert_allclose(row, hooked.sum(*own, distilling, CLIP, *swap), atol=5e-6)
        np.testing.assert_allclose(row, gradients.sum(*own, distilling, CLIP, *swap), atol=5e-6)
        if not rounded and kind != "attention":
            expected = one_by_one(made(kind), layout, own, clipping)
            np.testing.assert_allclose(row, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["two-linear", "group-norm"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_what_is_not_finite_is_left_out_for_its_owner_and_changes_nothing_for_others(
    kind: str, bad: float
) -> None:
    model = made(kind)
    gradients = ClippedGradients(model, Layout.of(model))
    inputs, labels = batch_of(kind, 9, 0)
    spoilt = inputs.clone()
    spoilt[4, 0, 0, 0] = bad
    counts = (2, 4, 3)
    found = gradients.sums(spoilt, labels, counts, cross_entropy, CLIP)
    clean = gradients.sums(inputs, labels, counts, cross_entropy, CLIP)
    np.testing.assert_allclose(found[[0, 2]], clean[[0, 2]], atol=2e-6)
    kept = [2, 3, 5]
    without = gradients.sum(inputs[kept], labels[kept], cross_entropy, CLIP)
    if bad == 1e30 and kind == "group-norm":  # a norm makes it finite again
        return
    np.testing.assert_allclose(found[1], without, atol=2e-6)


@pytest.mark.parametrize("counts", [(3,), (2, 3), (5, -1), ()])
def test_owners_must_have_all_the_examples(counts: tuple[int, ...]) -> None:
    model = made("linear")
    with pytest.raises(DataError, match=r"counts=.*must be whole and sum to 4"):
        ClippedGradients(model, Layout.of(model)).sums(
            *batch_of("linear", 4, 0), counts, cross_entropy, CLIP
        )


def test_owners_without_any_example_get_zeros() -> None:
    model = made("convolution")
    layout = Layout.of(model)
    found = ClippedGradients(model, layout).sums(
        *batch_of("convolution", 0, 0), (0, 0), cross_entropy, CLIP
    )
    assert (found == np.zeros((2, layout.size))).all()
