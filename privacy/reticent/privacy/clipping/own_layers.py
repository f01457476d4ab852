"""Layers applied to the examples of many owners, each owner with weights of its own.

Examples stand in one row after another, as :class:`~.terms.Owners` says, and are never padded: what
treats every example alike is computed for all of them at once (:mod:`.layers`), and the matrix
products and convolutions of a layer owner by owner, each on its own span. So nobody's rows meet
anybody else's weights, and an owner without examples takes part in nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from .convolutions import columns_of, convolution_terms, convolved, input_gradient, rows_of
from .group_norms import normalised
from .layers import applied, linear_terms
from .terms import Owners, Rows, Term


class Found(Protocol):
    """What a backward pass found out about the gradients of one layer's parameters."""

    def terms(self) -> list[Term]:
        """Return the gradients of single examples, one term a parameter."""
        ...

    def sums(self, owners: Owners) -> list[torch.Tensor]:
        """Return each owner's sum over its examples, ``(owners, coordinates)`` a parameter."""
        ...


Backward = Callable[[torch.Tensor], tuple[torch.Tensor | None, list[Found]]]
"""From the gradient of a layer's output: that of its input, if needed, and its parameters'."""


def applied_own(
    layer: nn.Module,
    weights: Sequence[torch.Tensor],
    before: torch.Tensor,
    needed: bool,
    owners: Owners,
) -> tuple[torch.Tensor, Backward]:
    """Apply ``layer`` with each owner's weights; to be called without gradient mode.

    Args:
        layer: Of a kind that :mod:`.ghost` knows, and not recurrent.
        weights: Of each parameter, float32 ``(owners, *shape)``; empty for a layer without any.
        before: Its input ``(n, ...)``.
        needed: Whether the gradient of the input is needed: whether a layer before has parameters.
        owners: Of the ``n`` examples.
    """
    if type(layer) is nn.Linear:
        return _linear(layer, weights, before, needed, owners)
    if type(layer) is nn.Conv2d:
        return _convolution(layer, weights, before, needed, owners)
    if type(layer) is nn.GroupNorm:
        return _group_norm(layer, weights, before, needed, owners)
    after, backward = applied(layer, before, needed)
    return after, lambda back: (backward(back)[0], [])


@dataclass(frozen=True)
class _OfLinear:
    layer: nn.Linear
    before: torch.Tensor
    back: torch.Tensor

    def terms(self) -> list[Term]:
        return linear_terms(self.layer, self.before, self.back)

    def sums(self, owners: Owners) -> list[torch.Tensor]:
        weight = _outer(_by_place(self.back), _by_place(self.before), owners).flatten(1)
        bias = _sums(_by_place(self.back).sum(dim=1), owners)
        return [weight] if self.layer.bias is None else [weight, bias]


@dataclass(frozen=True)
class _OfConvolution:
    layer: nn.Conv2d
    before: torch.Tensor
    rows: torch.Tensor

    def terms(self) -> list[Term]:
        return convolution_terms(self.layer, self.before, self.rows)

    def sums(self, owners: Owners) -> list[torch.Tensor]:
        out, inputs, *size = self.layer.weight.shape
        weight = self.rows.new_zeros(len(owners.spans), *self.layer.weight.shape)
        for owner, span in _present(owners):
            columns, _ = columns_of(self.layer, self.before[span])
            products = columns.flatten(0, 1).T @ self.rows[span].flatten(0, 1)
            weight[owner] = products.view(*size, inputs, out).permute(3, 2, 0, 1)
        bias = None if self.layer.bias is None else _sums(self.rows.sum(dim=1), owners)
        return [weight.flatten(1)] if bias is None else [weight.flatten(1), bias]


@dataclass(frozen=True)
class _OfNorm:
    scale: torch.Tensor
    shift: torch.Tensor

    def terms(self) -> list[Term]:
        return [Rows(self.scale), Rows(self.shift)]

    def sums(self, owners: Owners) -> list[torch.Tensor]:
        return [_sums(self.scale, owners), _sums(self.shift, owners)]


def _linear(
    layer: nn.Linear,
    weights: Sequence[torch.Tensor],
    before: torch.Tensor,
    needed: bool,
    owners: Owners,
) -> tuple[torch.Tensor, Backward]:
    weight, bias = weights[0], weights[1] if layer.bias is not None else None
    after = _products(_by_place(before), weight.transpose(1, 2), bias, owners)

    def backward(back: torch.Tensor) -> tuple[torch.Tensor | None, list[Found]]:
        found: list[Found] = [_OfLinear(layer, before, back)]
        if not needed:
            return None, found
        return _products(_by_place(back), weight, None, owners).view_as(before), found

    return after.view(*before.shape[:-1], layer.out_features), backward


def _convolution(
    layer: nn.Conv2d,
    weights: Sequence[torch.Tensor],
    before: torch.Tensor,
    needed: bool,
    owners: Owners,
) -> tuple[torch.Tensor, Backward]:
    biases = None if layer.bias is None else weights[1]
    after = torch.cat(
        [
            convolved(layer, weights[0][i], None if biases is None else biases[i], before[span])
            for i, span in _present(owners)
        ]
    )

    def backward(back: torch.Tensor) -> tuple[torch.Tensor | None, list[Found]]:
        found: list[Found] = [_OfConvolution(layer, before, rows_of(back))]
        if not needed:
            return None, found
        parts = [
            input_gradient(layer, weights[0][i], before[span], back[span])
            for i, span in _present(owners)
        ]
        return torch.cat(parts), found

    return after, backward


def _group_norm(
    layer: nn.GroupNorm,
    weights: Sequence[torch.Tensor],
    before: torch.Tensor,
    needed: bool,
    owners: Owners,
) -> tuple[torch.Tensor, Backward]:
    scale, shift = (weight[owners.index] for weight in weights)
    after, of_output = normalised(layer, before, scale, shift, needed)

    def backward(back: torch.Tensor) -> tuple[torch.Tensor | None, list[Found]]:
        found = of_output(back)
        return found.before, [_OfNorm(found.scale, found.shift)]

    return after, backward


def _by_place(values: torch.Tensor) -> torch.Tensor:
    """Return ``(n, ..., features)`` as ``(n, places, features)``."""
    return values[:, None] if values.dim() == 2 else values.flatten(1, -2)


def _products(
    rows: torch.Tensor, matrices: torch.Tensor, bias: torch.Tensor | None, owners: Owners
) -> torch.Tensor:
    """Return each example's ``(places, k)`` times its owner's ``(k, m)``, ``(n, places, m)``."""
    n, places, k = rows.shape
    after = rows.new_empty(n, places, matrices.shape[2])
    for owner, span in _present(owners):
        flat, into = rows[span].reshape(-1, k), after[span].view(-1, after.shape[2])
        if bias is None:
            torch.mm(flat, matrices[owner], out=into)
        else:
            torch.addmm(bias[owner], flat, matrices[owner], out=into)
    return after


def _outer(left: torch.Tensor, right: torch.Tensor, owners: Owners) -> torch.Tensor:
    """Return each owner's sum of leftT right over its examples, ``(owners, k, m)``.

    Args:
        left: ``(n, places, k)``.
        right: ``(n, places, m)``.
        owners: Of the ``n`` examples.
    """
    k, m = left.shape[2], right.shape[2]
    found = left.new_zeros(len(owners.spans), k, m)
    for owner, span in _present(owners):
        torch.mm(left[span].reshape(-1, k).T, right[span].reshape(-1, m), out=found[owner])
    return found


def _sums(rows: torch.Tensor, owners: Owners) -> torch.Tensor:
    """Return each owner's sum of its rows; one owner's NaN is not another's, as in a product."""
    found = rows.new_zeros(len(owners.spans), rows.shape[1])
    return found.index_add_(0, owners.index, rows)


def _present(owners: Owners) -> list[tuple[int, slice]]:
    """Return the owners that have examples, and these."""
    return [(i, span) for i, span in enumerate(owners.spans) if span.stop > span.start]
