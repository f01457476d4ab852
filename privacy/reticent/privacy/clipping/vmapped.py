"""What ``vmap`` takes wrongly, or not at all, in a form that it can take."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .recurrent import RECURRENT, Recurrent, unrolled


class Tables(TorchFunctionMode):
    """Looks codes up in a table's own rows, and tells whether all were there.

    ``vmap`` lays the tables of all sets of weights end to end: a code beyond one would read, and
    move, the rows of another set, and the row for padding would be that of the first set only.

    Attributes:
        inside: For each look-up, whether its codes are codes of its table.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[torch.Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.embedding:
            return func(*args, **kwargs)
        codes, table = args
        kept = codes.clamp(0, len(table) - 1)
        self.inside.append((codes == kept).all())
        padding = kwargs.pop("padding_idx")
        found = func(kept, table, **kwargs)
        if padding is None:
            return found
        return torch.where((kept == padding % len(table))[..., None], found.detach(), found)


class _Unrolled(nn.Module):
    """A recurrent layer, place by place: ``vmap`` knows no way through torch's own kernels."""

    def __init__(self, layer: Recurrent) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return unrolled(self.layer, x).last


def without_kernels(model: nn.Module) -> nn.Module:
    """Return ``model``, changed in place, with recurrent layers that ``vmap`` can take."""
    if isinstance(model, RECURRENT):
        return _Unrolled(model)
    for name, child in model.named_children():
        setattr(model, name, without_kernels(child))
    return model
