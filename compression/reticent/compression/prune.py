"""Magnitude pruning of a public student, before any private data are used (Han et al. 2015)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import nn

from reticent.core.errors import PlanError
from reticent.core.update import Layout, Vector

Mask = NDArray[np.bool_]


def magnitude_mask(model: nn.Module, sparsity: float) -> Mask:
    """Return which coordinates of ``model`` to keep, in the order of :class:`Layout`.

    Exactly ``round(sparsity * prunable)`` weights are dropped: those of smallest magnitude over all
    layers together; of equal magnitudes the earlier coordinate goes first. Only parameters with two
    or more dimensions can be pruned; biases and norm parameters are always kept.

    A layer may lose whole output channels (a channel of zeros costs nothing in an integer layer)
    but never all its weights: that would cut the network, so it is refused.

    The mask is made from the weights alone. It costs no privacy if they were trained on public data
    or released by a mechanism, and must not be taken from private weights.

    Args:
        model: The student; its values are read and not changed.
        sparsity: Share of the prunable weights to drop, in [0, 1).

    Returns:
        A bool array of shape ``(total,)``, true where the coordinate is kept.

    Raises:
        PlanError: If ``sparsity`` is out of range, a weight is not finite, or a layer would lose
            every weight; the message names the layer and the largest sparsity that is possible.
    """
    if not 0 <= sparsity < 1:
        raise PlanError(f"student.prune.sparsity={sparsity}: must be at least 0 and below 1")
    layout = Layout.of(model)
    index = np.flatnonzero(_prunable(layout))
    magnitudes = np.abs(layout.read(model)[index])
    if not np.isfinite(magnitudes).all():
        raise PlanError("the student has weights that are not finite: it cannot be pruned")
    # Stable, so that ties are broken by position and the mask does not depend on the platform.
    order = index[np.argsort(magnitudes, kind="stable")]
    count = round(sparsity * len(index))
    _refuse_empty(layout, order, count, sparsity)
    keep = np.ones(layout.total, dtype=np.bool_)
    keep[order[:count]] = False
    return keep


def apply_mask(model: nn.Module, mask: Mask) -> None:
    """Set the coordinates of ``model`` that ``mask`` does not keep to zero, in place."""
    layout = Layout.of(model, mask)
    values: Vector = layout.read(model)
    layout.write(model, values)


def _prunable(layout: Layout) -> Mask:
    wide = [len(shape) >= 2 for shape in layout.shapes]
    return np.repeat(np.array(wide, dtype=np.bool_), layout.sizes)


def _refuse_empty(layout: Layout, order: NDArray[np.int64], count: int, sparsity: float) -> None:
    owner = np.repeat(np.arange(len(layout.sizes)), layout.sizes)[order]
    # A layer is empty once its largest weight is gone, so only its last rank matters.
    last = {int(layer): rank for rank, layer in enumerate(owner)}
    if not last:
        return
    layer, rank = min(last.items(), key=lambda item: item[1])
    if count > rank:
        raise PlanError(
            f"student.prune.sparsity={sparsity}: would drop every weight of {layout.names[layer]}; "
            f"must be at most {rank / len(order):.4f} for this student"
        )
