"""Gradient sums of many owners by :mod:`torch.func`: any student without buffers, on any device.

:mod:`.own` knows a few layers and how their gradients follow from what passed through them. Here
nothing is known: the student is a function of its weights (``functional_call``), made one of many
sets of weights by ``vmap``, and differentiated. With a clip each example has a copy of its owner's
weights, so that the gradient of a copy is that of an example; without one, each owner's weights
meet a batch that is filled up with examples of the owner's own, whose answers are left out of the
loss. A graphics processor does the passes of a whole cohort at once that way. On a CPU it pays in
small batches of students that :mod:`.own` does not know (``benchmarks/together.py``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from reticent.core.errors import DataError
from reticent.core.update import Layout

from .bounds import Bounds, Clipping, check_clip
from .own import Weights, check_owned, unpacked
from .sums import Loss, masks_of, present_in, require_bare
from .terms import Owners, Rows
from .vmapped import Tables, without_kernels

CPU = torch.device("cpu")

Piece = tuple[int, slice]
"""An owner, and some of its examples."""


class FunctionalGradients:
    """Sums of per-example gradients, clipped or not, of owners with weights of their own.

    Guarantee, with a clip C: row i of the result depends on the examples and weights of owner i
    alone, up to float32 rounding, and is what :meth:`ClippedGradients.sum` returns for them at
    those weights. So for every batch, weights and C, adding or removing one example of an owner
    changes that owner's row by at most C in L2 norm (add-or-remove-one; Abadi et al. 2016, section
    3.1), replacing one by at most 2C, and no other row by more than rounding; bounds, masks and
    what is not finite are treated as that class says, by the same code. An example is passed by
    itself, as a batch of one, so that a student cannot mix it with another. An owner without any
    gets the zero vector, to which the caller still adds noise. A code outside a table gives no sums
    at all, but an IndexError, as in that class.

    Without a clip a row is the plain sum of its owner's gradients, and what is not finite stays so
    in it, and in no other. This holds for students that treat the examples of a batch alike and
    apart, as :func:`~.functional_trial.unfit` finds out on random inputs.

    The model gives the function; its own weights are not used, and nothing is stored on it.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        microbatch: int = 64,
        clipping: Clipping = "flat",
        device: torch.device = CPU,
        training: bool = True,
    ) -> None:
        """Prepare for ``model``; ``microbatch`` bounds the memory of one pass.

        Args:
            model: The student, every parameter of which is in ``layout``.
            layout: Names, shapes and mask of the parameters.
            microbatch: Most examples in one forward and backward pass, filled-up ones included;
                with a clip each takes a few times the memory of the parameters.
            clipping: ``flat`` or ``per-layer``.
            device: Where passes are computed.
            training: Whether layers do what they do in training: dropout draws, for each example.

        Raises:
            DataError: If the model holds buffers or mixes examples by batch normalisation.
            PlanError: If there is no such clipping.
        """
        require_bare(model)
        if microbatch < 1:
            raise DataError(f"microbatch={microbatch}: must be at least 1")
        self._model = without_kernels(copy.deepcopy(model)).to(device).train(training)
        self._names = [name for name, _ in self._model.named_parameters()]
        self._layout, self._microbatch, self._device = layout, microbatch, device
        self._bounds = Bounds.of(layout, clipping)
        masks = masks_of(layout, [None] * len(self._names))
        self._masks = [None if mask is None else mask.to(device) for mask in masks]

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
        """Return each owner's sum at its weights, float32 ``(owners, size)``, on the host.

        The same call gives the same bits on the CPU; other devices may promise less.

        Args:
            weights: Of every owner, float32 ``(owners, size)``.
            inputs: ``(n, *input_shape)``, one owner's after another's.
            labels: ``(n,)``.
            counts: How many of the examples are each owner's; some may have none.
            loss: The sum of the examples' losses; it gets tensors of the device.
            clip: L2 bound C of one example's gradient; None for plain sums.
            rounding: What the weights go through before they are used, on the host (for
                quantization-aware training); gradients are those at the rounded weights.

        Raises:
            DataError: If there are not as many inputs as labels and as the owners have, not as many
                weights as owners have parameters, or the model returns not one row an example.
            IndexError: If a code is looked up that is not in its table.
            PlanError: If ``clip`` is not between 1e-12 and 1e12.
        """
        check_owned(self._layout, weights, inputs, labels, counts)
        if clip is not None:
            check_clip(clip)
        found = np.zeros(weights.shape, dtype=np.float32)
        held = [i for i, count in enumerate(counts) if count]
        if not held:
            return found
        with torch.no_grad(), _exactly():
            rounded = rounding(unpacked(self._layout, weights[held]))
            used = self._moved(*rounded)
            owners = Owners.of([counts[i] for i in held])
            if clip is None:
                total = self._plain(used, inputs, labels, owners, loss)
            else:
                total = self._clipped(used, inputs, labels, owners, loss, clip)
        values = total.cpu().numpy()
        found[held] = values[:, self._layout.index] if self._layout.kept else values
        return found

    def _clipped(
        self,
        weights: Weights,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        owners: Owners,
        loss: Loss,
        clip: float,
    ) -> torch.Tensor:
        """Return each owner's clipped sum, float32 ``(owners, total)``, pruned coordinates too."""
        total = torch.zeros((len(owners.spans), self._layout.total), device=self._device)
        for start in range(0, len(labels), self._microbatch):
            part = slice(start, min(start + self._microbatch, len(labels)))
            present, their = present_in(owners.part(part.start, part.stop))
            index = their.index.to(self._device)
            copies = [weight[present][index] for weight in weights]
            x, y = self._moved(inputs[part], labels[part])
            # No name is given to the rows: they would live on during the next pass.
            self._add(total[present], self._gradients(copies, x[:, None], y, loss), clip, their)
        return total

    def _plain(
        self,
        weights: Weights,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        owners: Owners,
        loss: Loss,
    ) -> torch.Tensor:
        """Return each owner's plain sum, float32 ``(owners, total)``."""
        total = torch.zeros((len(owners.spans), self._layout.total), device=self._device)
        for pieces in passes(owners.spans, self._microbatch):
            index, counted = filled(pieces)
            whose = torch.tensor([owner for owner, _ in pieces], device=self._device)
            own = [weight[whose] for weight in weights]
            y = labels[index.flatten()[counted]]
            x, y, counted = self._moved(inputs[index], y, counted)
            rows = self._gradients(own, x, y, loss, counted)
            total[whose] += torch.cat(rows, dim=1)  # nobody is in one pass twice
        return total

    def _gradients(
        self,
        weights: Weights,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        loss: Loss,
        counted: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Return the gradient of each set of weights, ``(sets, coordinates)`` a parameter.

        Args:
            weights: Of each parameter, ``(sets, *shape)``; of which nobody else has a part.
            inputs: A batch for each set, ``(sets, m, *input_shape)``.
            labels: Of the examples that count, set by set.
            loss: The sum of their losses.
            counted: Positions of those, if they are not all of the ``sets * m``.
        """
        # The device is for students and losses that make tensors of their own.
        # Attention is written out: vmap goes through its kernels one set after another.
        with torch.enable_grad(), self._device, sdpa_kernel(SDPBackend.MATH):
            leaves = [weight.requires_grad_() for weight in weights]
            outputs, inside = vmap(self._answers, randomness="different")(leaves, inputs)
            rows = outputs.flatten(0, 1) if counted is None else outputs.flatten(0, 1)[counted]
            found = torch.autograd.grad(loss(rows, labels), leaves, materialize_grads=True)
        if not all(bool(one.all().cpu()) for one in inside):
            raise IndexError("an example has a code that is not in the table it is looked up in")
        return [gradient.flatten(1) for gradient in found]

    def _moved(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.to(self._device) for tensor in tensors]

    def _answers(
        self, weights: Weights, inputs: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the model's outputs at one set of weights, ``(m, ...)``, and ``Tables.inside``."""
        named = dict(zip(self._names, weights, strict=True))
        with Tables() as tables:
            outputs = functional_call(self._model, named, (inputs,))
        if len(outputs) != len(inputs):
            raise DataError(
                f"the student returned {len(outputs)} rows for {len(inputs)} examples: the first "
                "dimension must be the batch"
            )
        return outputs, tables.inside

    def _add(
        self, total: torch.Tensor, rows: list[torch.Tensor], clip: float, owners: Owners
    ) -> None:
        """Add each owner's clipped sum to its row of ``total``, in place."""
        pairs = zip(rows, self._masks, strict=True)
        squares = torch.stack([Rows(row).squares(mask) for row, mask in pairs], dim=1)
        kept, factors = self._bounds.factors(squares.cpu(), clip)
        if kept is not None:
            owners = owners.among(kept)
            rows = [row[kept.to(self._device)] for row in rows]
        # A product, because additions by index come in any order on a graphics processor.
        whose = (owners.index == torch.arange(len(owners.spans))[:, None]).float()
        blocks = total.split(list(self._layout.sizes), dim=1)
        for i, (row, block) in enumerate(zip(rows, blocks, strict=True)):
            block += (whose * factors[:, i]).to(self._device) @ row


def passes(spans: Sequence[slice], most: int) -> Iterator[list[Piece]]:
    """Yield pieces of owners' examples such that a pass is of ``most`` examples when filled up.

    Filled up, each piece has as many examples as the longest of its pass. Every example is in one
    piece, and no owner has two in a pass.
    """
    found: list[Piece] = []
    longest = 0
    for owner, span in enumerate(spans):
        for start in range(span.start, span.stop, most):
            piece = slice(start, min(start + most, span.stop))
            size = max(longest, piece.stop - piece.start)
            if found and (len(found) + 1) * size > most:
                yield found
                found, size = [], piece.stop - piece.start
            found.append((owner, piece))
            longest = size
    if found:
        yield found


def filled(pieces: Sequence[Piece]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positions of examples, int64 ``(pieces, longest)``, and of those that count in them.

    Short pieces are filled up with their last example, over and over: an example of its owner's, so
    that what it spoils, by being not finite, is spoilt already.
    """
    starts = torch.tensor([span.start for _, span in pieces])
    sizes = torch.tensor([span.stop - span.start for _, span in pieces])
    places = torch.arange(int(sizes.max()))
    index = starts[:, None] + torch.minimum(places, sizes[:, None] - 1)
    return index, (places < sizes[:, None]).flatten().nonzero().flatten()


def _exactly() -> AbstractContextManager[None]:
    """Keep CUDA from computing convolutions with 11 bits (TF32), or in a random order."""
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
