"""Clipped sums of per-example gradients, from Opacus' hooks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleHooks
from torch import nn

from reticent.core.errors import DataError
from reticent.core.update import Layout

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Maps logits ``(n, classes)`` and labels ``(n,)`` to the *sum* of the examples' losses."""


class ClippedGradients:
    """Sums of clipped per-example gradients of one model.

    Guarantee: for every batch, parameters and clip C, adding or removing one example changes the
    returned vector by at most C in L2 norm (add-or-remove-one relation; Abadi et al. 2016,
    section 3.1), because

    ========================  =====================================================
    input                     what enters the sum
    ========================  =====================================================
    gradient norm > C         the gradient scaled to norm C (at most, in float32)
    gradient norm <= C        the gradient itself
    non-finite gradient       zero
    empty batch               the zero vector (the caller still adds noise to it)
    ========================  =====================================================

    and no layer may mix examples (batch normalisation is refused) or hold buffers. Norms are
    taken over the coordinates that the layout keeps. Float32 rounding of the sum is not part of
    the guarantee.
    """

    def __init__(self, model: nn.Module, layout: Layout, microbatch: int = 64) -> None:
        """Attach Opacus' hooks to ``model``; ``microbatch`` bounds the memory of one pass.

        Raises:
            DataError: If the model holds buffers or layers that mix examples.
        """
        mixing = [n for n, m in model.named_modules() if "BatchNorm" in type(m).__name__]
        buffers = [n for n, _ in model.named_buffers()]
        if mixing or buffers:
            raise DataError(
                f"the student has batch normalisation or buffers ({', '.join(mixing + buffers)}): "
                "they would mix or store private examples; fold them or use GroupNorm"
            )
        self._model = model
        self._layout = layout
        self._microbatch = microbatch
        self._kept = torch.from_numpy(layout.mask.astype(np.float32)) if layout.kept else None
        self._hooks = GradSampleHooks(model, loss_reduction="sum")

    def sum(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        loss: Loss,
        clip: float,
        swap: Callable[[nn.Module], AbstractContextManager[object]] = nullcontext,
    ) -> NDArray[np.float64]:
        """Return the sum of the examples' gradients, each clipped to ``clip``, float64 ``(size,)``.

        ``swap`` is entered around forward and backward (a weight swap for quantization-aware
        training).
        """
        total = torch.zeros(self._layout.total, dtype=torch.float32)
        self._model.train()
        for start in range(0, len(labels), self._microbatch):
            part = slice(start, start + self._microbatch)
            with swap(self._model), warnings.catch_warnings():
                # The first layer's input needs no gradient, which torch remarks on every time.
                warnings.filterwarnings("ignore", "Full backward hook is firing")
                loss(self._model(inputs[part]), labels[part]).backward()
            total += self._clip_and_add(self._take(), clip)
        return total.numpy()[self._layout.index].astype(np.float64)

    def _take(self) -> torch.Tensor:
        """Return the per-example gradients ``(n, total)`` and clear them from the model."""
        rows: list[torch.Tensor] = []
        for parameter in self._model.parameters():
            sample = getattr(parameter, "grad_sample", None)
            if not isinstance(sample, torch.Tensor):
                raise DataError(
                    f"no per-example gradient for a parameter of shape {tuple(parameter.shape)}: "
                    "every parameter must be used exactly once by a layer that Opacus supports"
                )
            rows.append(sample.flatten(1))
            parameter.grad_sample = None  # pyright: ignore[reportAttributeAccessIssue]
            parameter.grad = None
        return torch.cat(rows, dim=1)

    def _clip_and_add(self, rows: torch.Tensor, clip: float) -> torch.Tensor:
        if self._kept is not None:
            rows = rows * self._kept
        norms = torch.linalg.vector_norm(rows, dim=1)
        finite = torch.isfinite(norms)
        if not bool(finite.all()):
            rows, norms = rows[finite], norms[finite]
        factors = (clip / norms.clamp(min=clip)).to(rows.dtype)
        return factors @ rows
