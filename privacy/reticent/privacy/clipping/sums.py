"""Clipped sums of per-example gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from reticent.core.errors import DataError
from reticent.core.update import Layout

from .bounds import Bounds, Clipping, check_clip
from .choice import Method, Shape, chosen
from .terms import Owners, Term

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Maps logits ``(n, classes)`` and labels ``(n,)`` to the *sum* of the examples' losses."""


class ClippedGradients:
    """Sums of clipped per-example gradients of one model.

    Guarantee: for every batch, parameters and clip C, adding or removing one example changes the
    returned vector by at most C in L2 norm (add-or-remove-one relation; Abadi et al. 2016,
    section 3.1), and replacing one by at most 2C (replace-one). This bounds, it does not hide: the
    caller adds the noise, and the promise is against whoever sees noised sums only. It holds
    because

    ============================  =================================================
    input                         what enters the sum
    ============================  =================================================
    flat: norm > C                the gradient scaled to norm C (in float32)
    flat: norm <= C               the gradient itself
    per-layer: norm of l > C_l    tensor l scaled to norm C_l = C sqrt(d_l / d)
    per-layer: norm of l <= C_l   tensor l itself
    anything non-finite           zero, in all tensors, also if it is in one only
    pruned coordinate             nothing, and no share of the norm
    tensor that is pruned whole   nothing; its bound is zero
    empty batch                   the zero vector (the caller still adds noise)
    pass that was aborted         nothing, neither then nor in the next sum
    ============================  =================================================

    and no layer may mix examples (batch normalisation is refused) or hold buffers. A gradient of
    norm above 1e18 counts as non-finite, and so does, with ``ghost``, such an input of a layer.
    Float32 rounding of the sum is not part of the guarantee.

    Attributes:
        method: ``ghost`` for a plain chain of layers (see :mod:`.ghost`), ``graph`` for known
            layers that are joined in any other way (see :mod:`.graph`), which are faster, else
            ``hooks``. All give the same sums up to float32 rounding.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        microbatch: int = 64,
        clipping: Clipping = "flat",
        method: Method | None = None,
        shape: Shape = None,
    ) -> None:
        """Prepare ``model``; ``microbatch`` bounds the memory of one pass.

        Args:
            model: The student, every parameter of which is in ``layout``.
            layout: Names, shapes and mask of the parameters.
            microbatch: Most examples in one forward and backward pass.
            clipping: ``flat`` or ``per-layer``.
            method: Given only to compare them; otherwise the layers decide, and a trial on random
                inputs where they are no plain chain.
            shape: Of one example, for that trial; without it there is none, and no ``graph``
                unless it is asked for.

        Raises:
            DataError: If the model holds buffers, or layers that mix examples or are changed by
                them, or ``method`` is not one that is right for it.
            PlanError: If there is no such clipping.
        """
        require_bare(model)
        if microbatch < 1:
            raise DataError(f"microbatch={microbatch}: must be at least 1")
        self._model = model
        self._layout = layout
        self._microbatch = microbatch
        self._bounds = Bounds.of(layout, clipping)
        self.method, self._gradients = chosen(model, method, shape)
        self._masks = masks_of(layout, self._gradients.orders)

    def sum(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        loss: Loss,
        clip: float,
        swap: Callable[[nn.Module], AbstractContextManager[object]] = nullcontext,
    ) -> NDArray[np.float32]:
        """Return the sum of the examples' gradients, each clipped to ``clip``, float32 ``(size,)``.

        Nothing is kept between calls: after an exception the next call is as the first.

        Args:
            inputs: ``(n, *input_shape)``.
            labels: ``(n,)``.
            loss: The sum of the examples' losses.
            clip: L2 bound C of one example's gradient.
            swap: Entered around forward and backward (a weight swap for quantization-aware
                training).

        Raises:
            DataError: If there are not as many inputs as labels, or a parameter has no gradient
                for each example.
            PlanError: If ``clip`` is not between 1e-12 and 1e12.
        """
        return self.sums(inputs, labels, (len(labels),), loss, clip, swap)[0]

    def sums(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        counts: Sequence[int],
        loss: Loss,
        clip: float,
        swap: Callable[[nn.Module], AbstractContextManager[object]] = nullcontext,
    ) -> NDArray[np.float32]:
        """Return the sums of many owners' examples at the same weights, float32 ``(owners, size)``.

        Each row is what :meth:`sum` returns for the examples of one owner alone, up to float32
        rounding: passes go through the examples of several owners. The same call gives the same
        bits.

        Args:
            inputs: ``(n, *input_shape)``, one owner's after another's.
            labels: ``(n,)``.
            counts: How many of the examples are each owner's; some may have none.
            loss: The sum of the examples' losses.
            clip: L2 bound C of one example's gradient.
            swap: See :meth:`sum`.

        Raises:
            DataError: If there are not as many inputs as labels and as the owners have, or a
                parameter has no gradient for each example.
            PlanError: If ``clip`` is not between 1e-12 and 1e12.
        """
        if len(inputs) != len(labels):
            raise DataError(f"{len(inputs)} inputs and {len(labels)} labels: must be as many")
        if min(counts, default=0) < 0 or sum(counts) != len(labels):
            raise DataError(f"counts={list(counts)}: must be whole and sum to {len(labels)}")
        check_clip(clip)
        owners = Owners.of(counts)
        total = torch.zeros((len(counts), self._layout.total), dtype=torch.float32)
        self._model.train()
        with swap(self._model):
            for start in range(0, len(labels), self._microbatch):
                stop = min(start + self._microbatch, len(labels))
                present, their = present_in(owners.part(start, stop))
                part = slice(start, stop)
                # No name is given to the terms: they would live on during the next pass.
                add_clipped(
                    total[present],
                    self._gradients.terms(inputs[part], labels[part], loss),
                    self._masks,
                    self._bounds,
                    self._layout.sizes,
                    clip,
                    their,
                )
        values = total.numpy()
        return values[:, self._layout.index] if self._layout.kept else values


def require_bare(model: nn.Module) -> None:
    """Check that a student neither mixes examples by batch normalisation nor is changed by them.

    Buffers store them, and tables with ``max_norm`` shorten the rows that examples look up.

    Raises:
        DataError: If it does.
    """
    mixing = [n for n, m in model.named_modules() if "BatchNorm" in type(m).__name__]
    buffers = [n for n, _ in model.named_buffers()]
    if mixing or buffers:
        raise DataError(
            f"the student has batch normalisation or buffers ({', '.join(mixing + buffers)}): "
            "they would mix or store private examples; fold them or use GroupNorm"
        )
    for name, module in model.named_modules():
        if getattr(module, "max_norm", None) is not None:
            raise DataError(
                f"student layer {name} has max_norm={module.max_norm}: it changes its weights by "
                "what it looks up, and so by private examples, before any noise"
            )


def add_clipped(
    total: torch.Tensor,
    terms: Sequence[Term],
    masks: Sequence[torch.Tensor | None],
    bounds: Bounds,
    sizes: Sequence[int],
    clip: float,
    owners: Owners,
) -> None:
    """Add each owner's clipped sum to its row of ``total``, in place.

    Args:
        total: float32 ``(owners, sum of sizes)``; coordinates that are pruned get something, too:
            the caller leaves them out.
        terms: The gradients of every parameter, in order.
        masks: As :func:`masks_of` gives them for ``terms``.
        bounds: How long one example's gradient may be.
        sizes: Coordinates of every parameter.
        clip: L2 bound C of one example's gradient.
        owners: Of the examples.
    """
    masked = zip(terms, masks, strict=True)
    squares = torch.stack([term.squares(mask) for term, mask in masked], dim=1)
    kept, factors = bounds.factors(squares, clip)
    owners = owners if kept is None else owners.among(kept)
    blocks = total.split(list(sizes), dim=1)
    for i, (term, block) in enumerate(zip(terms, blocks, strict=True)):
        term.add_weighted(block, kept, factors[:, i], owners)


def present_in(owners: Owners) -> tuple[slice, Owners]:
    """Return which owners have examples, and those alone; between them all may have none."""
    found = [i for i, span in enumerate(owners.spans) if span.stop > span.start]
    present = slice(found[0], found[-1] + 1)
    return present, Owners(owners.ends[present.start : present.stop + 1])


def masks_of(layout: Layout, orders: Sequence[tuple[int, ...] | None]) -> list[torch.Tensor | None]:
    """Return 1 and 0 for each parameter, its dimensions ordered; None where all of it is kept."""
    flat = torch.from_numpy(layout.mask.astype(np.float32)).split(list(layout.sizes))
    shaped = zip(flat, layout.shapes, layout.blocks, orders, strict=True)
    return [
        None
        if kept == len(m)
        else m.view(shape).permute(order or tuple(range(len(shape)))).contiguous()
        for m, shape, kept, order in shaped
    ]
