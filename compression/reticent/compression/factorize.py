"""Low-rank factorization of a folded public student: one layer becomes two that are smaller.

A Linear of weight W (out x in) of rank r becomes Linear(in, r) and Linear(r, out); a Conv2d, with W
its kernel as an (out x in*k*k) matrix, becomes a convolution to r channels with the same window and
a 1x1 convolution (Denton et al. 2014 approximate weights by singular values; Zhang et al. 2016,
section 3.1, have this pair of layers). The singular values are split evenly, so that both factors
have the same scale, which suits one clip and one integer range for both. Between the two there is
no activation: with all singular values the function is the same.

The ranks are made from the weights alone, which must be public or released.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import nn

from reticent.core.errors import PlanError

from .fold import is_chain

Rule = Literal["energy", "size"]


@dataclass(frozen=True)
class Split:
    """What was done to one layer: parameters of its weight before and after, and the rank."""

    name: str
    rank: int
    before: int
    after: int

    def __str__(self) -> str:
        """Say the rank."""
        return f"layer {self.name} to rank {self.rank}"


def factorized(model: nn.Module, rule: Rule, keep: float) -> tuple[nn.Sequential, list[Split]]:
    """Return a copy of a folded chain with layers replaced by two factors where that is smaller.

    Args:
        model: The student; not changed.
        rule: ``energy``: the smallest rank whose singular values hold a share of at least ``keep``
            of the sum of the squares of all; ``size``: the largest rank with at most ``keep`` of
            the weight's parameters.
        keep: In (0, 1].

    Returns:
        The copy, in evaluation mode with default names, and what was replaced. Layers for which two
        factors would not be smaller, and convolutions with groups, are copied as they are.

    Raises:
        PlanError: If the model is no chain, ``keep`` is out of range, a weight is not finite, or a
            layer would get rank 0; the layer and the smallest ``keep`` are named.
    """
    if not is_chain(model):
        raise PlanError(
            f"student.factorize: student {type(model).__name__} is not an nn.Sequential of layers; "
            'write it as one, or use student.factorize.kind="none"'
        )
    if not 0 < keep <= 1:
        raise PlanError(f"student.factorize.keep={keep}: must be above 0 and at most 1")
    layers: list[nn.Module] = []
    splits: list[Split] = []
    for name, layer in model.named_children():
        rank = _rank(name, layer, rule, keep)
        if rank is None or not isinstance(layer, nn.Conv2d | nn.Linear):
            layers.append(copy.deepcopy(layer))
            continue
        layers += _factors(layer, rank)
        rows, columns = _matrix(layer).shape
        splits.append(Split(name, rank, rows * columns, rank * (rows + columns)))
    named = OrderedDict((str(index), layer) for index, layer in enumerate(layers))
    return nn.Sequential(named).eval(), splits


def _rank(name: str, layer: nn.Module, rule: Rule, keep: float) -> int | None:
    """Return the rank that a layer is replaced with, or None if it stays as it is."""
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        return None
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return None
    matrix = _matrix(layer)
    if not torch.isfinite(matrix).all():
        raise PlanError(f"student layer {name} has weights that are not finite")
    rows, columns = matrix.shape
    smallest = (rows + columns) / (rows * columns)  # the share that rank 1 takes
    if smallest >= 1:
        return None
    rank = _energy_rank(matrix, keep) if rule == "energy" else _size_rank(matrix, keep)
    if rank == 0:
        remedy = f"must be at least {smallest:.4f}" if rule == "size" else "its weights are zero"
        raise PlanError(f"student.factorize.keep={keep}: layer {name} would get rank 0; {remedy}")
    return rank if rank * smallest < 1 else None


def _energy_rank(matrix: torch.Tensor, keep: float) -> int:
    energy = torch.linalg.svdvals(matrix).square().cumsum(0)
    if float(energy[-1]) == 0:
        return 0
    # A share that rounding puts a hair above what all values hold must still be reached.
    target = min(keep * float(energy[-1]), float(energy[-1]))
    return int((energy < target).sum()) + 1


def _size_rank(matrix: torch.Tensor, keep: float) -> int:
    rows, columns = matrix.shape
    # The small number is for shares like 1/3, whose product may fall a hair short of an integer.
    return math.floor(keep * rows * columns / (rows + columns) + 1e-9)


def _matrix(layer: nn.Conv2d | nn.Linear) -> torch.Tensor:
    return layer.weight.detach().double().flatten(1)


@torch.no_grad()
def _factors(layer: nn.Conv2d | nn.Linear, rank: int) -> tuple[nn.Module, nn.Module]:
    left, values, right = torch.linalg.svd(_matrix(layer), full_matrices=False)
    root = values[:rank].sqrt()
    up, down = left[:, :rank] * root, root[:, None] * right[:rank]
    first, second = _empty_factors(layer, rank)
    for part, weight in ((first, down), (second, up)):
        part.weight = nn.Parameter(weight.to(layer.weight.dtype).reshape(part.weight.shape))
    if layer.bias is not None:
        second.bias = nn.Parameter(layer.bias.detach().clone())
    return first, second


def _empty_factors(
    layer: nn.Conv2d | nn.Linear, rank: int
) -> tuple[nn.Conv2d | nn.Linear, nn.Conv2d | nn.Linear]:
    """Return two layers of the right shapes; nothing is drawn that lasts."""
    with torch.random.fork_rng(devices=[]):
        if isinstance(layer, nn.Linear):
            return (
                nn.Linear(layer.in_features, rank, bias=False),
                nn.Linear(rank, layer.out_features, bias=False),
            )
        first = nn.Conv2d(
            layer.in_channels,
            rank,
            cast(tuple[int, int], layer.kernel_size),
            cast(tuple[int, int], layer.stride),
            cast(tuple[int, int], layer.padding),
            cast(tuple[int, int], layer.dilation),
            bias=False,
            padding_mode=layer.padding_mode,
        )
        return first, nn.Conv2d(rank, layer.out_channels, 1, bias=False)
