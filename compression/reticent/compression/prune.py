"""Pruning of single weights of a public student, before any private data are used.

A criterion scores coordinates, :func:`lowest_dropped` makes a mask of scores, and
:func:`sparsities` says how many go at each step of a schedule.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from reticent.core.errors import PlanError
from reticent.core.tasks import Examples
from reticent.core.update import Layout, Vector

Mask = NDArray[np.bool_]
Scores = NDArray[np.float64]

_BATCH = 250


def magnitude_mask(model: nn.Module, sparsity: float) -> Mask:
    """Return which coordinates of ``model`` to keep by magnitude (Han et al. 2015).

    As :func:`lowest_dropped` with the scores of :func:`magnitudes`.
    """
    return lowest_dropped(model, magnitudes(model), sparsity)


def magnitudes(model: nn.Module) -> Scores:
    """Score coordinates by their magnitudes: float64 ``(total,)``."""
    return np.abs(Layout.of(model).read(model)).astype(np.float64)


def taylor(model: nn.Module, public: Examples) -> Scores:
    """Score coordinates by |weight x gradient of the mean loss|: float64 ``(total,)``.

    To first order it is how much the loss changes when the weight becomes zero (Molchanov et al.
    2019, section 3.1; they square it, which orders alike).

    Args:
        model: The student, in evaluation mode; it is not changed.
        public: Public examples. Never private ones: the mask is sent in the clear.
    """
    total = [torch.zeros(p.shape, dtype=torch.float64) for p in model.parameters()]
    for start in range(0, len(public.labels), _BATCH):
        part = slice(start, start + _BATCH)
        loss = F.cross_entropy(model(public.inputs[part]), public.labels[part], reduction="sum")
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for sums, gradient in zip(total, gradients, strict=True):
            sums += gradient
    changes = [
        (p.detach() * sums / len(public.labels)).abs().flatten()
        for p, sums in zip(model.parameters(), total, strict=True)
    ]
    return torch.cat(changes).numpy()


def sparsities(target: float, steps: int, schedule: str) -> list[float]:
    """Return the sparsity after each step; the last is ``target``.

    ``gradual`` follows target * (1 - (1 - t)^3) for t from 1/steps to 1 (Zhu and Gupta 2017,
    section 3, from zero); other schedules drop the same share of what is left at each step, as
    iterative magnitude pruning does (Frankle and Carbin 2019, section 2).
    """
    times = [step / steps for step in range(1, steps)]
    if schedule == "gradual":
        return [*(target * (1 - (1 - t) ** 3) for t in times), target]
    return [*(1 - (1 - target) ** t for t in times), target]


def lowest_dropped(
    model: nn.Module, scores: Scores, sparsity: float, before: Mask | None = None
) -> Mask:
    """Return which coordinates of ``model`` to keep, in the order of :class:`Layout`.

    Exactly ``round(sparsity * prunable)`` weights are dropped: first those that ``before`` dropped,
    then those of smallest score over all layers together; of equal scores the earlier coordinate
    goes first. Only parameters with two
    or more dimensions can be pruned; biases and norm parameters are always kept.

    A layer may lose whole output channels (a channel of zeros costs nothing in an integer layer)
    but never all its weights: that would cut the network, so it is refused.

    The mask is made from the weights alone. It costs no privacy if they were trained on public data
    or released by a mechanism, and must not be taken from private weights.

    Args:
        model: The student; its shapes are read.
        scores: At least 0, one for each coordinate: float64 ``(total,)``.
        sparsity: Share of the prunable weights to drop, in [0, 1).
        before: What was kept before, when pruning goes on from there.

    Returns:
        A bool array of shape ``(total,)``, true where the coordinate is kept.

    Raises:
        PlanError: If ``sparsity`` is out of range, a score is not finite, or a layer would lose
            every weight; the message names the layer and the largest sparsity that is possible.
    """
    if not 0 <= sparsity < 1:
        raise PlanError(f"student.prune.sparsity={sparsity}: must be at least 0 and below 1")
    layout = Layout.of(model)
    index = np.flatnonzero(_prunable(layout))
    scores = scores if before is None else np.where(before, scores, -1.0)
    if not np.isfinite(scores[index]).all():
        raise PlanError("the student has scores that are not finite: it cannot be pruned")
    # Stable, so that ties are broken by position and the mask does not depend on the platform.
    order = index[np.argsort(scores[index], kind="stable")]
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


def require_weights_left(model: nn.Module, sparsity: float) -> None:
    """Check that every layer can keep one weight, whichever weights are scored lowest.

    Raises:
        PlanError: If fewer weights are kept than there are layers to keep one.
    """
    layout = Layout.of(model)
    layers = sum(len(shape) >= 2 for shape in layout.shapes)
    weights = int(_prunable(layout).sum())
    kept = weights - round(sparsity * weights)
    if kept < layers:
        raise PlanError(
            f"student.prune.sparsity={sparsity}: keeps {kept} of {weights} weights, and the "
            f"student has {layers} layers with weights: must be at most "
            f"{_floor(1 - layers / weights)}"
        )


def _floor(share: float) -> str:
    return f"{int(share * 1e4) / 1e4:.4f}"


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
