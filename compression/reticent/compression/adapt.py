"""Low-rank adapters: the public student is frozen, and only small factors are trained and sent.

An adapted layer of weight W (out x in, or out x in*k*k of a convolution) computes with W + B A,
where A (rank x in) and B (out x rank) alone are parameters (Hu et al. 2021, section 4.1, with their
scale alpha / rank fixed at 1). B starts at zero, so the student starts as the public one, exactly.
After the run B A is added to W, and what is deployed is a plain chain of the size it had.

Everything else, and W itself, is *held*: kept outside torch's registers, so that it is no parameter
and no buffer, and nothing that lists, clips, noises or sends parameters can see it.

Per-example gradients are those of the plain model. The value comes from the one merged weight, and
the way back to the factors from a branch B(A x) of ordinary layers, added with the same value
subtracted: the branch adds zero, and hooks on its layers see each example's own activations and
gradients. With int8 weights in training the merged weight is what is rounded, as it is deployed,
and its gradient is passed straight through to the factors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from reticent.core.errors import PayloadError, PlanError
from reticent.core.update import Vector

from .fold import is_chain

Weights = Callable[[torch.Tensor], torch.Tensor]


def _same(weight: torch.Tensor) -> torch.Tensor:
    return weight


class Frozen(nn.Module):
    """A layer with parameters that are held, and none that are trained.

    Attributes:
        rounding: What the weight of a Conv2d or Linear goes through before it is used.
    """

    def __init__(self, layer: nn.Module) -> None:
        """Hold ``layer``, whose parameters get no gradients from now on."""
        super().__init__()
        # In a tuple, where torch does not look for parameters.
        self._held = (layer.requires_grad_(False),)
        self.rounding: Weights = _same

    @property
    def layer(self) -> nn.Module:
        """The layer that is held."""
        return self._held[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the held layer returns, with its weight rounded."""
        if isinstance(self.layer, nn.Conv2d | nn.Linear):
            return _applied(self.layer, self.rounding(self.layer.weight), x)
        return self.layer(x)


class Adapted(Frozen):
    """A held Conv2d or Linear and its two factors, ``down`` (A) and ``up`` (B)."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, rank: int) -> None:
        """Hold ``layer`` and make factors of zeros."""
        super().__init__(layer)
        with torch.random.fork_rng(devices=[]):
            self.down, self.up = _factors(layer, rank)
        for factor in (self.down, self.up):
            nn.init.zeros_(factor.weight)

    @property
    def rank(self) -> int:
        """Rank of the change."""
        return len(self.down.weight)

    def merged(self) -> torch.Tensor:
        """Return W + B A, in the shape of W."""
        weight = cast(nn.Conv2d | nn.Linear, self.layer).weight
        change = self.up.weight.detach().flatten(1) @ self.down.weight.detach().flatten(1)
        return weight + change.view_as(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what a layer with the merged, rounded weight returns."""
        layer = cast(nn.Conv2d | nn.Linear, self.layer)
        value = _applied(layer, self.rounding(self.merged()), x)
        # The way back to x is through the merged weight, so the branch must not have one.
        branch = self.up(self.down(x.detach()))
        return value + (branch - branch.detach())


def adapted(model: nn.Module, ranks: dict[int, int]) -> nn.Sequential:
    """Return a frozen copy of a folded chain with factors at the positions in ``ranks``.

    All factors are zero; the layers without parameters are copied as they are.

    Raises:
        PlanError: If the model is no chain, or a layer cannot be adapted; it is named.
    """
    _require_chain(model)
    layers: list[nn.Module] = []
    for position, (name, given) in enumerate(model.named_children()):
        layer = copy.deepcopy(given)
        if position in ranks:
            if not isinstance(layer, nn.Conv2d | nn.Linear) or getattr(layer, "groups", 1) != 1:
                raise PlanError(
                    f"student.adapt: layer {name} ({type(layer).__name__}) cannot be adapted: only "
                    "Linear, and Conv2d without groups"
                )
            layers.append(Adapted(layer, ranks[position]))
        else:
            layers.append(Frozen(layer) if list(layer.parameters()) else layer)
    return nn.Sequential(*layers).eval()


def ranks_of(model: nn.Module, rank: int, chosen: tuple[str, ...]) -> dict[int, int]:
    """Return the rank of the factors of each layer, by position.

    Args:
        model: A folded chain.
        rank: Rank of every change.
        chosen: Names of the layers; empty for every layer whose factors are smaller than itself.

    Raises:
        PlanError: If there is no such layer, its factors would not be smaller than itself, or no
            layer is left.
    """
    _require_chain(model)
    names = [name for name, _ in model.named_children()]
    unknown = [name for name in chosen if name not in names]
    if unknown:
        raise PlanError(
            f"student.adapt.layers: no layer {unknown[0]}: there are {', '.join(names)}"
        )
    ranks: dict[int, int] = {}
    for position, (name, layer) in enumerate(model.named_children()):
        largest = largest_rank(layer)
        if chosen and name in chosen and rank > largest:
            raise PlanError(
                f"student.adapt.rank={rank}: the factors of layer {name} ({type(layer).__name__}) "
                f"would not be smaller than itself; must be at most {largest} for it"
            )
        if rank <= largest and (not chosen or name in chosen):
            ranks[position] = rank
    if not ranks:
        raise PlanError(
            f"student.adapt.rank={rank}: no layer is larger than its factors would be; must be at "
            f"most {max(map(largest_rank, model.children()))} for this student"
        )
    return ranks


def begin(model: nn.Module, generator: torch.Generator) -> None:
    """Draw every A from a uniform distribution of variance 1 / (3 fan-in); every B stays zero.

    It is the distribution that torch gives the weights of a layer of this shape (LoRA's reference
    implementation uses it as well).
    """
    for layer in _adapted_layers(model):
        weight = layer.down.weight
        bound = weight[0].numel() ** -0.5
        draws = torch.rand(weight.shape, generator=generator)
        weight.data = (2 * draws - 1) * bound


def held_values(model: nn.Module) -> Vector:
    """Return all held parameters in order, float32 ``(n,)``."""
    parts = [p.detach().flatten() for p in _held_parameters(model)]
    return torch.cat(parts).numpy() if parts else np.zeros(0, dtype=np.float32)


@torch.no_grad()
def hold_values(model: nn.Module, values: Vector) -> None:
    """Set all held parameters from ``values``.

    Raises:
        PayloadError: If there are not as many values as held parameters.
    """
    held = _held_parameters(model)
    count = sum(p.numel() for p in held)
    if values.shape != (count,):
        raise PayloadError(f"{len(values)} parameters are held: must be {count} for this student")
    parts = torch.from_numpy(values.copy()).split([p.numel() for p in held])
    for parameter, part in zip(held, parts, strict=True):
        parameter.copy_(part.view_as(parameter))


@torch.no_grad()
def merged(model: nn.Module) -> nn.Module:
    """Return a plain chain that computes what an adapted one does; any other model itself."""
    if not is_chain(model) or not any(isinstance(layer, Frozen) for layer in model):
        return model
    layers: list[nn.Module] = []
    for layer in model:
        plain = copy.deepcopy(layer.layer if isinstance(layer, Frozen) else layer)
        if isinstance(layer, Adapted):
            cast(Any, plain).weight.copy_(layer.merged())
        layers.append(plain.requires_grad_(True))
    return nn.Sequential(*layers).train(model.training)


def _require_chain(model: nn.Module) -> None:
    if not is_chain(model):
        raise PlanError(
            f"student.adapt: student {type(model).__name__} is not an nn.Sequential of layers; "
            'write it as one, or use student.adapt.kind="none"'
        )


def _applied(layer: nn.Conv2d | nn.Linear, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    conv: Any = layer  # torch types its pairs as tuples of any length
    return F.conv2d(x, weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _factors(
    layer: nn.Conv2d | nn.Linear, rank: int
) -> tuple[nn.Conv2d | nn.Linear, nn.Conv2d | nn.Linear]:
    if isinstance(layer, nn.Linear):
        down = nn.Linear(layer.in_features, rank, bias=False)
        return down, nn.Linear(rank, layer.out_features, bias=False)
    conv: Any = layer
    window = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    down = nn.Conv2d(conv.in_channels, rank, *window, bias=False)
    return down, nn.Conv2d(rank, conv.out_channels, 1, bias=False)


def is_adapted(model: nn.Module) -> bool:
    """Return whether some layer has factors."""
    return bool(_adapted_layers(model))


def largest_rank(layer: nn.Module) -> int:
    """Return the largest rank whose factors are smaller than the layer's weight; 0 if none is."""
    if not isinstance(layer, nn.Conv2d | nn.Linear) or getattr(layer, "groups", 1) != 1:
        return 0
    rows = len(layer.weight)
    columns = layer.weight[0].numel()
    return (rows * columns - 1) // (rows + columns)


def _adapted_layers(model: nn.Module) -> list[Adapted]:
    return [m for m in model.modules() if isinstance(m, Adapted)]


def _held_parameters(model: nn.Module) -> list[nn.Parameter]:
    frozen = [m for m in model.modules() if isinstance(m, Frozen)]
    return [p for m in frozen for p in m.layer.parameters()]
