"""Per-example gradients of any model, from Opacus' hooks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from reticent.core.errors import DataError

from .terms import Rows

LEFTOVERS = ("activations", "max_batch_len")
"""What the hooks leave on a layer between its forward and its backward pass."""


class HookedGradients:
    """Writes out the gradient of every example, layer by layer, by Opacus' hooks.

    Opacus keeps what it has seen on the layers and parameters themselves, where a pass that is
    aborted leaves it for the next. Here every pass starts and ends with none of it.
    """

    def __init__(self, model: nn.Module) -> None:
        """Attach the hooks to ``model``.

        Raises:
            DataError: If a convolution pads with anything but zeros, or a table has a row for
                padding: Opacus' formula for the gradient of an example takes them for zeros and for
                a row like others, and what is summed would not be it.
        """
        for name, module in model.named_modules():
            if getattr(module, "padding_mode", "zeros") != "zeros":
                raise DataError(
                    f"student layer {name} has padding_mode={module.padding_mode!r}: gradients of "
                    'single examples are known for "zeros" only'
                )
            if getattr(module, "padding_idx", None) is not None:
                raise DataError(
                    f"student layer {name} has padding_idx={module.padding_idx}: Opacus' hooks, "
                    "which this student's other layers need, would train that row"
                )
        # Brings scipy and torch.distributed along: 90 MB that the other ways never need.
        from opacus.grad_sample import GradSampleHooks

        self._model = model
        self._hooks = GradSampleHooks(model, loss_reduction="sum")
        self.orders = [None] * len(list(model.parameters()))

    def terms(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> list[Rows]:
        """Return the gradients of every parameter, in order.

        Raises:
            DataError: If a parameter has no gradient for each example.
        """
        with self._clean(), warnings.catch_warnings():
            # The first layer's input needs no gradient, which torch remarks on every time.
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            loss(self._model(inputs), labels).backward()
            return [_rows(p, len(labels)) for p in self._model.parameters()]

    @contextmanager
    def _clean(self) -> Iterator[None]:
        self._reset()  # also if an interrupt fell into the clean-up below
        try:
            yield
        finally:
            self._reset()

    def _reset(self) -> None:
        for module in self._model.modules():
            for name in LEFTOVERS:
                vars(module).pop(name, None)
        for parameter in self._model.parameters():
            parameter.grad = None
            vars(parameter).pop("_current_grad_sample", None)
            vars(parameter).update(grad_sample=None, _forward_counter=0)


def _rows(parameter: nn.Parameter, count: int) -> Rows:
    sample = getattr(parameter, "grad_sample", None)
    if not isinstance(sample, torch.Tensor):
        raise DataError(
            f"no per-example gradient for a parameter of shape {tuple(parameter.shape)}: "
            "every parameter must be used exactly once by a layer that Opacus supports"
        )
    if len(sample) != count:
        raise DataError(
            f"a layer with a parameter of shape {tuple(parameter.shape)} took {len(sample)} rows "
            f"for {count} examples: the first dimension must be the batch in every layer"
        )
    return Rows(sample.flatten(1))
