"""Group normalisation and its backward pass, in few passes over values with channels innermost.

What convolutions of this package give has its channels innermost, and there torch's own kernels
take up to three times as long as the sums and products that the formulas ask for (16 channels of
28 by 28; with 32 of 14 by 14 as long; Wu and He 2018, "Group normalization", section 3.1). The
variance is taken of the centered values, so it does not cancel where the mean is large.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F


class Gradients(NamedTuple):
    """Of one layer, at the gradient of its output.

    Attributes:
        before: By its input, ``(n, channels, *places)``; None if that is not needed.
        scale: Of single examples by the scale, ``(n, channels)``.
        shift: Of single examples by the shift, ``(n, channels)``.
    """

    before: torch.Tensor | None
    scale: torch.Tensor
    shift: torch.Tensor


Backward = Callable[[torch.Tensor], Gradients]


def normalised(
    layer: nn.GroupNorm,
    before: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    needed: bool,
) -> tuple[torch.Tensor, Backward]:
    """Apply ``layer`` with other weights; to be called, like what it returns, without gradients.

    Args:
        layer: Gives the number of groups and epsilon.
        before: Its input ``(n, channels, *places)``.
        scale: ``(n, channels)``, or ``(1, channels)`` for all examples.
        shift: Likewise.
        needed: Whether the gradient of the input is needed.
    """
    inner = before.dim() == 4 and not before.is_contiguous()
    if inner and before.is_contiguous(memory_format=torch.channels_last):
        return _by_passes(layer, before, scale, shift, needed)
    return _by_torch(layer, before, scale, shift, needed)


def _by_torch(
    layer: nn.GroupNorm,
    before: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    needed: bool,
) -> tuple[torch.Tensor, Backward]:
    leaf = before.detach().requires_grad_(needed)
    with torch.enable_grad():
        found = F.group_norm(leaf, layer.num_groups, eps=layer.eps)
    plain, places = found.detach(), [1] * (before.dim() - 2)
    scale, shift = (weight.view(*weight.shape, *places) for weight in (scale, shift))

    def backward(back: torch.Tensor) -> Gradients:
        of_input = torch.autograd.grad(found, leaf, back * scale)[0] if needed else None
        return Gradients(of_input, over_places(plain * back), over_places(back))

    return torch.addcmul(shift, plain, scale), backward


def _by_passes(
    layer: nn.GroupNorm,
    before: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    needed: bool,
) -> tuple[torch.Tensor, Backward]:
    n, channels = before.shape[:2]
    count = before[0].numel() // layer.num_groups

    def mean(sums: torch.Tensor) -> torch.Tensor:
        """Return the mean over a group from sums over places, for each of its channels."""
        whole = sums.view(n, layer.num_groups, -1).sum(dim=2, keepdim=True) / count
        return whole.expand(-1, -1, channels // layer.num_groups).reshape(n, channels)

    centered = before - _spread(mean(over_places(before)))
    inverse = (mean(over_places(centered * centered)) + layer.eps).rsqrt()
    slope = scale * inverse

    def backward(back: torch.Tensor) -> Gradients:
        of_scale, of_shift = over_places(back * centered), over_places(back)
        before = None
        if needed:
            before = centered * _spread(-mean(slope * of_scale) * inverse.square())
            before -= _spread(mean(slope * of_shift))
            before.addcmul_(back, _spread(slope))
        return Gradients(before, of_scale * inverse, of_shift)

    return torch.addcmul(_spread(shift), centered, _spread(slope)), backward


def over_places(values: torch.Tensor) -> torch.Tensor:
    """Sum ``(n, channels, *places)`` to ``(n, channels)``; there may be no places."""
    return values.sum(dim=tuple(range(2, values.dim()))) if values.dim() > 2 else values


def _spread(values: torch.Tensor) -> torch.Tensor:
    return values[:, :, None, None]
