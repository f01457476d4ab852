"""Bounds on the gradient of one example: one for all parameters, or one for each tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from reticent.core.errors import PlanError
from reticent.core.update import Layout

Clipping = Literal["flat", "per-layer"]

SMALLEST, LARGEST = 1e-12, 1e12
"""Bounds outside of this range are refused: float32 could not keep the promise."""

LIMIT = 1e18
"""Anything larger in an example's gradient counts as non-finite: its square would overflow."""


@dataclass(frozen=True)
class Bounds:
    """How an L2 bound C on one example's gradient is kept.

    Guarantee: with the factors of :meth:`factors`, every example's scaled gradient has L2 norm at
    most C over all tensors, whatever the gradient was; ``per-layer``: at most C_l in tensor l,
    with the sum of C_l^2 equal to C^2 (McMahan et al. 2018, "Learning differentially private
    recurrent language models", section 3.1). So both have sensitivity C under add-or-remove-one.

    The bound is split by kept size, C_l = C sqrt(d_l / d) for a tensor with d_l of the d kept
    coordinates: a public constant of the student. The noise is the same in every coordinate, so
    every tensor then has the same ratio of largest signal to noise; with the equal split of that
    paper a bias of ten coordinates would get the bound of a weight of thousands, and most of it
    would stay unused. (On ``tiny`` with ``fashion``, untrained and after 2 and 12 epochs on public
    data, the clipped sum kept 1.3 to 1.7 times as much of the true gradient as with equal shares.)

    Attributes:
        clipping: ``flat`` or ``per-layer``.
        shares: C_l / C of each tensor, float64 ``(tensors,)``; 0 where nothing is kept.
    """

    clipping: Clipping
    shares: NDArray[np.float64]

    @staticmethod
    def of(layout: Layout, clipping: Clipping = "flat") -> Bounds:
        """Return the bounds for the tensors of ``layout``.

        Raises:
            PlanError: If there is no such clipping.
        """
        if clipping not in ("flat", "per-layer"):
            raise PlanError(f'privacy.clipping="{clipping}": must be flat or per-layer')
        return Bounds(clipping, np.sqrt(np.array(layout.blocks) / max(1, layout.size)))

    def factors(
        self, squares: torch.Tensor, clip: float
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return which examples count, and what their gradients are multiplied by.

        Args:
            squares: Squared norms, float64 ``(n, tensors)``; of any value, NaN included.
            clip: The bound C, as :func:`check_clip` accepts it.

        Returns:
            Positions of the examples whose norm is finite, or None when all are; and float32
            factors ``(kept, tensors)``.
        """
        totals = squares.sum(dim=1)
        finite = totals <= LIMIT**2  # False for NaN too
        kept = None if bool(finite.all()) else finite.nonzero().flatten()
        if kept is not None:
            squares, totals = squares[kept], totals[kept]
        if self.clipping == "flat":
            flat = clip / totals.sqrt().clamp(min=clip)
            return kept, flat.float()[:, None].expand(-1, squares.shape[1])
        bounds = clip * torch.from_numpy(self.shares)
        norms = squares.sqrt()
        # Nothing to scale where the norm is 0, which is so in every tensor that is pruned whole.
        return kept, torch.where(norms > bounds, bounds / norms, 1.0).float()


def check_clip(clip: float) -> None:
    """Check that a bound can be kept in float32.

    Raises:
        PlanError: If ``clip`` is not between 1e-12 and 1e12.
    """
    if not SMALLEST <= clip <= LARGEST:
        raise PlanError(f"privacy.clip={clip}: must be between {SMALLEST} and {LARGEST}")
