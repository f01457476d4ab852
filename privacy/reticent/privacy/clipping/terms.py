"""Gradients of single examples for one parameter tensor, in two forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from .bounds import LIMIT

BLOCK = 8192
"""Coordinates whose squares are added up in float32, before float64 takes over."""


class Term(Protocol):
    """What ``n`` examples contribute to the gradient of one parameter tensor."""

    def squares(self, mask: torch.Tensor | None) -> torch.Tensor:
        """Return squared norms over the coordinates of ``mask``, float64 ``(n,)``.

        Args:
            mask: 1 where a coordinate is kept, else 0, float32 of the parameter's shape; None when
                all are kept.

        Returns:
            NaN or infinity for an example with anything non-finite in it, masked or not.
        """
        ...

    def weighted(self, kept: torch.Tensor | None, factors: torch.Tensor) -> torch.Tensor:
        """Return the sum of the examples at ``kept``, times ``factors``, flat, float32.

        Other examples are not touched: zero times infinity would be NaN.
        """
        ...


@dataclass(frozen=True)
class Rows:
    """Gradients written out: ``values`` is float32 ``(n, coordinates)``."""

    values: torch.Tensor

    def squares(self, mask: torch.Tensor | None) -> torch.Tensor:
        """See :class:`Term`."""
        values = self.values if mask is None else self.values * mask.flatten()
        parts = [torch.linalg.vector_norm(b, dim=1) for b in values.split(BLOCK, dim=1)]
        return torch.stack(parts, dim=1).double().square().sum(dim=1)

    def weighted(self, kept: torch.Tensor | None, factors: torch.Tensor) -> torch.Tensor:
        """See :class:`Term`."""
        return factors @ (self.values if kept is None else self.values[kept])


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

    def weighted(self, kept: torch.Tensor | None, factors: torch.Tensor) -> torch.Tensor:
        """See :class:`Term`."""
        back, inputs = self.back, self.inputs
        if kept is not None:
            back, inputs = back[kept], inputs[kept]
        return ((factors[:, None] * back).T @ inputs).flatten()
