"""Gradients of single examples for one parameter tensor, in two forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import torch

from .bounds import LIMIT

BLOCK = 8192
"""Coordinates whose squares are added up in float32, before float64 takes over."""


@dataclass(frozen=True)
class Owners:
    """Whose the examples are: each owner's stand in a row, and the owners in order.

    Attributes:
        ends: Where the examples of each owner begin, and where those of the last one end.
    """

    ends: tuple[int, ...]

    @staticmethod
    def of(counts: Sequence[int]) -> Owners:
        """Return the owners of so many examples each."""
        ends = [0]
        for count in counts:
            ends.append(ends[-1] + count)
        return Owners(tuple(ends))

    def among(self, kept: torch.Tensor) -> Owners:
        """Return the same owners of the examples at ``kept`` (ascending) only."""
        edges = torch.tensor(self.ends)
        return Owners(tuple(torch.searchsorted(kept, edges).tolist()))

    def part(self, start: int, stop: int) -> Owners:
        """Return the same owners of the examples from ``start`` to before ``stop`` only."""
        return Owners(tuple(min(max(end, start), stop) - start for end in self.ends))

    @property
    def spans(self) -> list[slice]:
        """The examples of each owner."""
        return [slice(*pair) for pair in pairwise(self.ends)]

    @cached_property
    def index(self) -> torch.Tensor:
        """Whose each example is, int64 ``(n,)``."""
        counts = torch.tensor([span.stop - span.start for span in self.spans], dtype=torch.int64)
        return torch.arange(len(counts)).repeat_interleave(counts)

    @cached_property
    def matrix(self) -> torch.Tensor | None:
        """1 where an owner has an example, else 0, float32 ``(owners, n)``; None with one owner."""
        if len(self.ends) == 2:
            return None
        found = torch.zeros(len(self.ends) - 1, self.ends[-1])
        for row, span in zip(found, self.spans, strict=True):
            row[span] = 1
        return found


class Term(Protocol):
    """What ``n`` examples contribute to the gradient of one parameter tensor."""

    def squares(self, mask: torch.Tensor | None) -> torch.Tensor:
        """Return squared norms over the coordinates of ``mask``, float64 ``(n,)``.

        Args:
            mask: 1 where a coordinate is kept, else 0, float32, with the dimensions of the
                parameter in the order in which the term has them; None when all are kept.

        Returns:
            NaN or infinity for an example with anything non-finite in it, masked or not.
        """
        ...

    def add_weighted(
        self,
        total: torch.Tensor,
        kept: torch.Tensor | None,
        factors: torch.Tensor,
        owners: Owners,
    ) -> None:
        """Add each owner's sum of the examples at ``kept``, times ``factors``, to ``total``.

        Other examples are not touched: zero times infinity would be NaN.

        Args:
            total: float32 ``(owners, coordinates)``, in the parameter's own order; rows of a larger
                array, each of which has its coordinates in a row.
            kept: Positions of the examples that count, ascending; None when all do.
            factors: Of those examples.
            owners: Of those examples.
        """
        ...


@dataclass(frozen=True)
class Rows:
    """Gradients written out.

    Attributes:
        values: float32 ``(n, coordinates)``.
        shape: Given where the coordinates are those of a convolution's weight as ``(height, width,
            inputs, outputs)``: these four.
    """

    values: torch.Tensor
    shape: tuple[int, ...] | None = None

    def squares(self, mask: torch.Tensor | None) -> torch.Tensor:
        """See :class:`Term`."""
        values = self.values if mask is None else self.values * mask.flatten()
        if values.shape[1] <= BLOCK:
            return torch.linalg.vector_norm(values, dim=1).double().square()
        parts = [torch.linalg.vector_norm(b, dim=1) for b in values.split(BLOCK, dim=1)]
        return torch.stack(parts, dim=1).double().square().sum(dim=1)

    def add_weighted(
        self,
        total: torch.Tensor,
        kept: torch.Tensor | None,
        factors: torch.Tensor,
        owners: Owners,
    ) -> None:
        """See :class:`Term`."""
        values = self.values if kept is None else self.values[kept]
        weights = factors[None] if owners.matrix is None else owners.matrix * factors
        if self.shape is None:
            total.addmm_(weights, values)
            return
        add_kernels(total, weights @ values, self.shape)


def add_kernels(total: torch.Tensor, sums: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Add sums of a convolution's gradients to ``total``, in place.

    Args:
        total: float32 ``(owners, coordinates)``, in the parameter's own order.
        sums: ``(owners, coordinates)``, in the order of ``shape``.
        shape: ``(height, width, inputs, outputs)``.
    """
    ordered = sums.view(-1, *shape).permute(0, 4, 3, 1, 2)
    total.unflatten(1, ordered.shape[1:]).add_(ordered)


@dataclass(frozen=True)
class Outer:
    """Gradients as outer products g aT of a linear layer's weight, never written out.

    The squared norm is |g|^2 |a|^2 (Goodfellow 2015, "Efficient per-example gradient
    computations"), and under a mask M the sum of M_ij g_i^2 a_j^2: one matrix product. Both are
    taken in float64, where no square of a float32 overflows or vanishes.

    Attributes:
        back: Gradients of the layer's output, g, float32 ``(n, outputs)``.
        inputs: The layer's input, a, float32 ``(n, inputs)``.
    """

    back: torch.Tensor
    inputs: torch.Tensor

    def squares(self, mask: torch.Tensor | None) -> torch.Tensor:
        """See :class:`Term`; also infinite where a factor alone is beyond the limit."""
        back, inputs = self.back.double().square(), self.inputs.double().square()
        largest = torch.maximum(back.amax(dim=1), inputs.amax(dim=1))  # NaN stays NaN
        if mask is None:
            products = back.sum(dim=1) * inputs.sum(dim=1)
        else:
            products = ((back @ mask.double()) * inputs).sum(dim=1)
        return torch.where(largest <= LIMIT**2, products, torch.inf)

    def add_weighted(
        self,
        total: torch.Tensor,
        kept: torch.Tensor | None,
        factors: torch.Tensor,
        owners: Owners,
    ) -> None:
        """See :class:`Term`."""
        back, inputs = self.back, self.inputs
        if kept is not None:
            back, inputs = back[kept], inputs[kept]
        back = factors[:, None] * back
        add_products(total, back, inputs, owners)


def add_products(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, owners: Owners
) -> None:
    """Add each owner's product leftT right over its rows to ``total``, in place.

    Args:
        total: float32 ``(owners, k m)``.
        left: ``(n, k)``.
        right: ``(n, m)``.
        owners: Of the ``n`` rows.
    """
    blocks = total.unflatten(1, (left.shape[1], right.shape[1]))
    for block, span in zip(blocks, owners.spans, strict=True):
        if span.stop > span.start:
            block.addmm_(left[span].T, right[span])
