"""Gradient sums of many owners, each at weights of its own, in common passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from reticent.core.errors import DataError
from reticent.core.update import Layout

from .bounds import Bounds, Clipping, check_clip
from .ghost import chain_of, of_outputs, pooled_first
from .layers import orders_of
from .own_layers import Backward, Found, applied_own
from .recurrent import RECURRENT
from .sums import Loss, add_clipped, masks_of, present_in
from .terms import Owners

Weights = list[torch.Tensor]
"""Every owner's value of each parameter, float32 ``(owners, *shape)``."""


def own_chain_of(model: nn.Module) -> tuple[nn.Module, ...] | None:
    """Return the layers of ``model`` in order if owners can have weights of their own in them.

    None if it is no plain chain (:func:`~.ghost.chain_of`), or has a recurrent layer.
    """
    layers = chain_of(model)
    return None if layers is None or any(isinstance(m, RECURRENT) for m in layers) else layers


class OwnGradients:
    """Sums of per-example gradients, clipped or not, of owners with weights of their own.

    Guarantee, with a clip C: row i of the result depends on the examples and weights of owner i
    alone, up to float32 rounding, and is what :meth:`ClippedGradients.sum` returns for them at
    those weights. So for every batch, weights and C, adding or removing one example of an owner
    changes that owner's row by at most C in L2 norm (add-or-remove-one; Abadi et al. 2016, section
    3.1), replacing one by at most 2C, and no other row by more than rounding; bounds, masks and
    what is not finite are treated as that class says, by the same code. Examples are never padded:
    an owner without any gets the zero vector, to which the caller still adds noise.

    Without a clip a row is the plain sum of its owner's gradients, and what is not finite stays so
    in it, and in no other.

    The model gives the kinds and the shapes of the layers; its own weights are not used, and
    nothing is stored on it.
    """

    def __init__(
        self, model: nn.Module, layout: Layout, microbatch: int = 256, clipping: Clipping = "flat"
    ) -> None:
        """Prepare for ``model``; ``microbatch`` bounds the memory of one pass.

        Args:
            model: The student, every parameter of which is in ``layout``.
            layout: Names, shapes and mask of the parameters.
            microbatch: Most examples in one forward and backward pass.
            clipping: ``flat`` or ``per-layer``.

        Raises:
            DataError: If the model is not one that :func:`own_chain_of` takes.
            PlanError: If there is no such clipping.
        """
        layers = own_chain_of(model)
        if layers is None:
            raise DataError("the student is not a plain chain of layers that owners can have alone")
        if microbatch < 1:
            raise DataError(f"microbatch={microbatch}: must be at least 1")
        self._layers, self._layout, self._microbatch = pooled_first(layers), layout, microbatch
        self._bounds = Bounds.of(layout, clipping)
        self._masks = masks_of(layout, [order for layer in layers for order in orders_of(layer)])

    def sums(
        self,
        weights: NDArray[np.float32],
        inputs: torch.Tensor,
        labels: torch.Tensor,
        counts: Sequence[int],
        loss: Loss,
        clip: float | None,
        rounding: Callable[[Weights], Weights] = list,
    ) -> NDArray[np.float32]:
        """Return each owner's sum at its weights, float32 ``(owners, size)``.

        The same call gives the same bits.

        Args:
            weights: Of every owner, float32 ``(owners, size)``.
            inputs: ``(n, *input_shape)``, one owner's after another's.
            labels: ``(n,)``.
            counts: How many of the examples are each owner's; some may have none.
            loss: The sum of the examples' losses.
            clip: L2 bound C of one example's gradient; None for plain sums.
            rounding: What the weights go through before they are used (for quantization-aware
                training); gradients are those at the rounded weights.

        Raises:
            DataError: If there are not as many inputs as labels and as the owners have, not as many
                weights as owners have parameters, or a layer mixes examples.
            PlanError: If ``clip`` is not between 1e-12 and 1e12.
        """
        check_owned(self._layout, weights, inputs, labels, counts)
        if clip is not None:
            check_clip(clip)
        held = [i for i, count in enumerate(counts) if count]
        everyone = len(held) == len(counts)
        if not held:
            return np.zeros(weights.shape, dtype=np.float32)
        with torch.no_grad():
            used = rounding(unpacked(self._layout, weights if everyone else weights[held]))
            owners = Owners.of([counts[i] for i in held])
            values = self._summed(used, inputs, labels, owners, loss, clip).numpy()
        values = values[:, self._layout.index] if self._layout.kept else values
        if everyone:
            return values
        found = np.zeros(weights.shape, dtype=np.float32)
        found[held] = values
        return found

    def _summed(
        self,
        weights: Weights,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        owners: Owners,
        loss: Loss,
        clip: float | None,
    ) -> torch.Tensor:
        """Return each owner's sum, float32 ``(owners, total)``, pruned coordinates included."""
        total = torch.zeros((len(owners.spans), self._layout.total), dtype=torch.float32)
        for start in range(0, len(labels), self._microbatch):
            part = slice(start, min(start + self._microbatch, len(labels)))
            present, their = present_in(owners.part(part.start, part.stop))
            own = [weight[present] for weight in weights]
            # No name is given to what was found: it would live on during the next pass.
            self._add(
                total[present],
                self._found(own, inputs[part], labels[part], loss, their),
                clip,
                their,
            )
        return total

    def _found(
        self,
        weights: Weights,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        loss: Loss,
        owners: Owners,
    ) -> list[Found]:
        """Go forward and backward once, and return what that says about each layer's parameters."""
        values, needed, left = inputs, False, iter(weights)
        passed: list[Backward] = []
        for layer in self._layers:
            own = [next(left) for _ in layer.parameters()]
            if own and len(values) != len(labels):
                raise DataError(
                    f"{layer} got {len(values)} rows for {len(labels)} examples: the first "
                    "dimension must be the batch in every layer"
                )
            values, backward = applied_own(layer, own, values, needed, owners)
            needed = needed or bool(own)
            passed.append(backward)
        back: torch.Tensor | None = of_outputs(loss, values, labels)
        found: list[list[Found]] = []
        while passed and back is not None:
            back, these = passed.pop()(back)
            found.append(these)
        return [one for these in reversed(found) for one in these]

    def _add(
        self, total: torch.Tensor, found: list[Found], clip: float | None, owners: Owners
    ) -> None:
        """Add each owner's sum to its row of ``total``, in place."""
        sizes = self._layout.sizes
        if clip is None:
            parts = (part for one in found for part in one.sums(owners))
            for block, part in zip(total.split(list(sizes), dim=1), parts, strict=True):
                block += part
            return
        terms = [term for one in found for term in one.terms()]
        add_clipped(total, terms, self._masks, self._bounds, sizes, clip, owners)


def check_owned(
    layout: Layout,
    weights: NDArray[np.float32],
    inputs: torch.Tensor,
    labels: torch.Tensor,
    counts: Sequence[int],
) -> None:
    """Check that owners have as many examples and weights as are given, as ``sums`` takes them.

    Raises:
        DataError: If they have not.
    """
    if len(inputs) != len(labels):
        raise DataError(f"{len(inputs)} inputs and {len(labels)} labels: must be as many")
    if min(counts, default=0) < 0 or sum(counts) != len(labels):
        raise DataError(f"counts={list(counts)}: must be whole and sum to {len(labels)}")
    wanted = (len(counts), layout.size)
    if weights.shape != wanted:
        raise DataError(f"weights have shape {weights.shape}: must be {wanted}")


def unpacked(layout: Layout, weights: NDArray[np.float32]) -> Weights:
    """Return every owner's parameters; coordinates that are not kept are zero.

    Args:
        layout: Names, shapes and mask of the parameters.
        weights: Of every owner, float32 ``(owners, size)``.
    """
    flat = np.ascontiguousarray(weights, dtype=np.float32)
    if layout.kept:
        flat = np.zeros((len(weights), layout.total), dtype=np.float32)
        flat[:, layout.index] = weights
    parts = torch.from_numpy(flat).split(list(layout.sizes), dim=1)
    return [p.reshape(-1, *shape) for p, shape in zip(parts, layout.shapes, strict=True)]
