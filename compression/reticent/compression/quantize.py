"""Fake quantization of weights that is safe under DP-SGD (straight-through by weight swap).

Two properties matter under differential privacy:

- The straight-through gradient (Bengio et al. 2013) is taken in its plain form: the gradient at the
  rounded weights is the update of the float weights, of all of them, also where a weight lies
  beyond the range. It is then what stock layers, per-example gradient hooks and ghost norms compute
  exactly: nothing about them has to know of quantization. (Setting it to zero beyond the range
  would have to be done to each example's gradient before its norm is taken.) A weight cannot drift
  away unseen, because the range is a function of the weights and follows them.
- There are no observers. An observer is a buffer that remembers the extremes of what passed
  through it, private activations included; it sits in ``state_dict`` beside the noised weights and
  leaves the device with no noise at all. Here the scale is a function of the current weights only.

Grids by bits; ``s`` is the step, one for each output channel or one for the whole tensor:

======  ======================  ================================================================
bits    integers                step
======  ======================  ================================================================
8       -127 ... 127            max|w| / 127: nothing is clipped
4       -7 ... 7                least squared error, of 32 shares of max|w| / 7
3       -3 ... 3                the same, of max|w| / 3
2       -1, 0, 1                the same, of max|w|
1       -1, 1                   mean|w|: the least squared error in closed form
======  ======================  ================================================================

At 1 bit that is the scale of XNOR-Net (Rastegari et al. 2016, section 3.1), which follows from the
weights. Learning it, as XNOR-Net++ does (Bulat and Tzimiropoulos 2019), would add a parameter that
is noised and sent. A weight of exactly zero was pruned: it stays zero at 1 bit too, and the mean is
of the others (of those of at least 1e-30, to be exact).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import cast, get_args

import torch
from torch import nn

from reticent.core.errors import PlanError
from reticent.core.plan import Bits, Granularity, Quantize

from .adapt import Adapted, Frozen

_SPARE_BITS = 7
_TINY = 1e-30
_SHARES = 32


@dataclass(frozen=True)
class WeightGrid:
    """Which integers stand for weights, and what shares a step.

    Attributes:
        bits: 8, 4, 3, 2 or 1; the table of this module says what each means.
        granularity: One step for each output ``channel`` (first dimension) or for the ``tensor``.
    """

    bits: Bits = 8
    granularity: Granularity = "channel"

    def __post_init__(self) -> None:
        """Refuse other numbers of bits.

        Raises:
            PlanError: If ``bits`` is not one of the five.
        """
        if self.bits not in get_args(Bits):
            raise PlanError(f"student.quantize.bits={self.bits}: must be 8, 4, 3, 2 or 1")

    @property
    def top(self) -> int:
        """Largest integer magnitude; the grid is symmetric, so -128 is not used at 8 bits."""
        return max(1, 2 ** (self.bits - 1) - 1)


INT8 = WeightGrid()


DEFAULTS = Quantize()


def layer_grids(model: nn.Module, section: Quantize) -> dict[str, WeightGrid]:
    """Return the grid of each conv and linear layer's weights, by the layer's name, in order.

    ``section.edges`` says which of the first and the last layer keep 8 bits: they are few weights
    or decide most (Rastegari et al. 2016 leave both in full precision).
    """
    names = list(_rounded_layers(model))
    kept = {"none": (), "first": names[:1], "both": [*names[:1], *names[-1:]]}[section.edges]
    return {
        name: WeightGrid(8 if name in kept else section.bits, section.granularity) for name in names
    }


Swap = Callable[[nn.Module], AbstractContextManager[None]]


def training_swap(section: Quantize) -> Swap:
    """Return what goes around forward and backward while a plan's student trains."""
    return evaluation_swap(section) if section.kind == "qat" else nullcontext


def evaluation_swap(section: Quantize) -> Swap:
    """Return what goes around forward so that weights are as deployed.

    Nothing for ``none``, and for ``dynamic``, whose 8 bits are as good as float.
    """
    if section.kind in ("none", "dynamic"):
        return nullcontext
    return partial(quantized_weights, section=section)


def channel_scales(weight: torch.Tensor, grid: WeightGrid = INT8) -> torch.Tensor:
    """Return the step of each output channel (first dimension): float32, shape ``(out,)``.

    The step is rounded *up* to 17 significant bits (a relative change below 2**-16). Every integer
    up to 127 times such a step is exact in float32, which is why quantizing to 8 bits a second time
    changes no bit. A channel of zeros (or below 1e-30, where float32 runs out of bits) gets step 1,
    and all its weights become zero.
    """
    rows = weight.detach().to(torch.float32).flatten(1)
    groups = rows if grid.granularity == "channel" else rows.reshape(1, -1)
    limit = groups.abs().amax(dim=1)
    steps = torch.where(limit < _TINY, torch.ones_like(limit), _steps(groups, limit, grid))
    return steps.expand(len(rows)).contiguous()


def to_int8(weight: torch.Tensor, grid: WeightGrid = INT8) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``weight`` as int8 of the same shape, and the float32 step of each output channel.

    The integers are those of ``grid``, whatever its bits: an int8 engine computes with them as they
    are, and a file packs them.
    """
    steps = channel_scales(weight, grid)
    return _integers(weight, steps, grid).to(torch.int8), steps


def from_int8(integers: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Return the float32 weights that ``integers`` and ``steps`` stand for (an exact product)."""
    return integers.to(torch.float32) * _per_channel(steps, integers)


def fake_quantize(weight: torch.Tensor, grid: WeightGrid = INT8) -> torch.Tensor:
    """Return ``weight`` rounded to ``grid``, as float32 without gradient history.

    Rounding is to nearest, ties to even; at 1 bit it is the sign. The result equals
    ``from_int8(*to_int8(weight, grid))``. At 8 bits it is a fixed point: ``fake_quantize`` of it is
    the same, bit for bit. Values that are not finite stay so.

    Args:
        weight: Weights with the output channel first, at least 2 dimensions.
        grid: The integers and steps.
    """
    steps = channel_scales(weight, grid)
    # Adding zero turns -0.0 into 0.0, as the way through int8 does.
    return _integers(weight, steps, grid) * _per_channel(steps, weight) + 0.0


@contextmanager
def quantized_weights(model: nn.Module, section: Quantize = DEFAULTS) -> Iterator[None]:
    """Swap the weights of conv and linear layers for fake-quantized ones; restore them after.

    Put it around forward *and* backward, and take the optimizer's step outside: gradients are
    those of the rounded weights, the step moves the float weights (straight-through). What is
    restored is the storage itself, so every bit comes back, also after an exception. Values
    written to these parameters inside the context are lost. Of an adapted layer the merged weight
    is rounded, not its factors.

    >>> layer = nn.Linear(2, 1)
    >>> with quantized_weights(layer):
    ...     layer(torch.ones(1, 2)).sum().backward()
    """
    grids = layer_grids(model, section)
    saved = {id(w): (w, w.data, grids[name]) for name, w in reversed(list(_weighted(model)))}
    modules = dict(model.named_modules())
    frozen = [(n, m, m.rounding) for n in grids if isinstance(m := modules[n], Frozen)]
    try:
        for name, layer, _ in frozen:
            layer.rounding = partial(fake_quantize, grid=grids[name])
        for weight, data, grid in saved.values():
            weight.data = fake_quantize(data, grid)
        yield
    finally:
        for weight, data, _ in saved.values():
            weight.data = data
        for _, layer, rounding in frozen:
            layer.rounding = rounding


def _rounded_layers(model: nn.Module) -> Iterator[str]:
    """Yield the names of the layers whose weights are rounded, in order; held ones too."""
    plain = {name for name, _ in _weighted(model)}
    for name, module in model.named_modules():
        held = isinstance(module, Frozen) and isinstance(module.layer, nn.Conv2d | nn.Linear)
        if held or name in plain:
            yield name


def _weighted(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    adapted = [layer for layer in model.modules() if isinstance(layer, Adapted)]
    factors = {id(factor) for layer in adapted for factor in (layer.down, layer.up)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and id(module) not in factors:
            yield name, cast(nn.Parameter, module.weight)


def _steps(groups: torch.Tensor, limit: torch.Tensor, grid: WeightGrid) -> torch.Tensor:
    """Return the step of each row of ``groups``, whose largest magnitudes are ``limit``."""
    if grid.bits == 8:
        return _rounded_up(limit / grid.top)
    if grid.bits == 1:
        kept = (groups.abs() >= _TINY).sum(dim=1).clamp(min=1)
        return _rounded_up(groups.abs().sum(dim=1) / kept)
    shares = torch.arange(1, _SHARES + 1, device=limit.device) / _SHARES
    tried = _rounded_up(limit / grid.top * shares[:, None])
    # In place, because this is the larger part of a training step's overhead.
    error = _nearest(groups, tried[..., None], grid).mul_(tried[..., None]).sub_(groups)
    best = error.square_().sum(dim=2).argmin(dim=0)
    return tried.gather(0, best[None])[0]


def _rounded_up(steps: torch.Tensor) -> torch.Tensor:
    mask = (1 << _SPARE_BITS) - 1
    return ((steps.view(torch.int32) + mask) & ~mask).view(torch.float32)


def _integers(weight: torch.Tensor, steps: torch.Tensor, grid: WeightGrid) -> torch.Tensor:
    return _nearest(weight.detach().to(torch.float32), _per_channel(steps, weight), grid)


def _nearest(weight: torch.Tensor, steps: torch.Tensor, grid: WeightGrid) -> torch.Tensor:
    if grid.bits == 1:
        return torch.where(weight.abs() < _TINY, torch.zeros_like(weight), torch.sign(weight))
    nearest = (weight / steps).round_()
    # At 8 bits nothing can lie beyond the range.
    return nearest if grid.bits == 8 else nearest.clamp_(-grid.top, grid.top)


def _per_channel(steps: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return steps.view(-1, *[1] * (weight.dim() - 1))
