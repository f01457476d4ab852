"""Ghost norms and book-keeping for plain chains of layers: one backward pass, few gradients.

One forward pass, then one backward pass to the layers' *outputs* only. A linear layer's gradient
of one example is the outer product of its output's gradient and its input, of which the norm has
a closed form (Goodfellow 2015, "Efficient per-example gradient computations"), and the clipped sum
is one matrix product (Bu et al. 2023, "Differentially private optimization on large model at small
cost": no second backward pass). Convolutions and GroupNorm, whose gradients are small next to
their activations, are written out, and so are recurrent layers (see :mod:`.recurrent`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from reticent.core.errors import DataError
from reticent.core.sequences import OneHot

from .recurrent import RECURRENT, Unrolled, unrolled
from .terms import Outer, Rows, Term

PLAIN = (
    nn.Flatten,
    nn.Identity,
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Tanh,
    nn.Softplus,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    OneHot,
)
"""Layers without parameters that treat every example on its own."""


def chain_of(model: nn.Module) -> tuple[nn.Module, ...] | None:
    """Return the layers of ``model`` in order, or None if it is not a plain chain.

    The rule looks at the kinds of the layers and their options only, never at data: the model is a
    layer, or nested ``nn.Sequential`` of layers, each of a known kind, used once, changing nothing
    in place, and with parameters that are trained and shared with no other.
    """
    layers = tuple(_flatten(model))
    parameters = [p for layer in layers for p in layer.parameters()]
    distinct = len(set(map(id, parameters))) == len(parameters)
    trained = all(p.requires_grad for p in parameters)
    known = all(map(_known, layers)) and not any(_hooked(m) for m in model.modules())
    return layers if known and distinct and trained else None


class GhostGradients:
    """Gradients of single examples of a chain of layers, nothing of which is kept afterwards.

    No hooks are attached and nothing is stored on the model, so an aborted pass leaves nothing.
    """

    def __init__(self, model: nn.Module, layers: tuple[nn.Module, ...]) -> None:
        """Use ``layers``, which :func:`chain_of` gave for ``model``."""
        self._model = model
        self._layers = layers

    def terms(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        swap: Callable[[nn.Module], AbstractContextManager[object]],
    ) -> list[Term]:
        """Return the gradients of every parameter, in order.

        Raises:
            DataError: If the loss does not depend on a layer, or a layer mixes examples.
        """
        taken: list[_Taken] = []
        with swap(self._model):
            values = inputs
            for layer in self._layers:
                step = _taken(layer, values)
                values = step.after
                if layer._parameters:
                    taken.append(step)
            outputs = [output for step in taken for output in step.outputs]
            found = iter(torch.autograd.grad(loss(values, labels), outputs, allow_unused=True))
            terms: list[Term] = []
            for step in taken:
                back = [_checked(step.layer, next(found), len(labels)) for _ in step.outputs]
                terms += step.terms(back)
        return terms


@dataclass(frozen=True)
class _Taken:
    """A layer that was applied, and the outputs that a gradient is needed of."""

    layer: nn.Module
    before: torch.Tensor
    after: torch.Tensor
    unrolled: Unrolled | None = None

    @property
    def outputs(self) -> tuple[torch.Tensor, ...]:
        return self.unrolled.outputs if self.unrolled else (self.after,)

    def terms(self, back: list[torch.Tensor]) -> Iterator[Term]:
        if self.unrolled:
            return self.unrolled.terms(back)
        return _terms(self.layer, self.before, back[0])


def _taken(layer: nn.Module, values: torch.Tensor) -> _Taken:
    if isinstance(layer, RECURRENT):
        whole = unrolled(layer, values)
        return _Taken(layer, values.detach(), whole.last, whole)
    return _Taken(layer, values.detach(), layer(values))


def _flatten(module: nn.Module) -> Iterator[nn.Module]:
    if type(module) is nn.Sequential:
        for child in module:
            yield from _flatten(child)
    else:
        yield module


def _known(layer: nn.Module) -> bool:
    if type(layer) in RECURRENT:
        return True
    if set(layer._parameters) - {"weight", "bias"}:
        return False
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and layer.padding_mode == "zeros" and layer.padding != "same"
    if type(layer) is nn.Flatten:
        return layer.start_dim == 1
    if type(layer) is nn.GroupNorm:
        return layer.affine
    if type(layer) is nn.Linear:
        return True
    return type(layer) in PLAIN and not getattr(layer, "inplace", False)


def _hooked(module: nn.Module) -> bool:
    """Return whether somebody's hooks are on ``module``; they could do anything."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks)


def _checked(layer: nn.Module, back: torch.Tensor | None, count: int) -> torch.Tensor:
    if back is None:
        raise DataError(
            f"no per-example gradient for {layer}: the loss must depend on every layer's output"
        )
    if len(back) != count:
        raise DataError(
            f"{layer} gave {len(back)} rows for {count} examples: the first dimension must be the "
            "batch in every layer"
        )
    return back


def _terms(layer: nn.Module, inputs: torch.Tensor, back: torch.Tensor) -> Iterator[Term]:
    """Yield the weight's gradients, then the bias's if there is one."""
    if type(layer) is nn.Linear:
        yield _linear(inputs, back)
        bias = back.flatten(1, -2).sum(dim=1) if back.dim() > 2 else back
    elif type(layer) is nn.Conv2d:
        yield _convolution(layer, inputs, back)
        bias = back.flatten(2).sum(dim=2)
    else:
        norm = cast(nn.GroupNorm, layer)
        plain = F.group_norm(inputs, norm.num_groups, eps=norm.eps)
        yield Rows(_over_places(plain * back))
        bias = _over_places(back)
    if layer.bias is not None:
        yield Rows(bias)


def _over_places(values: torch.Tensor) -> torch.Tensor:
    """Sum ``(n, channels, *places)`` to ``(n, channels)``; there may be no places."""
    return values.flatten(2).sum(dim=2) if values.dim() > 2 else values


def _linear(inputs: torch.Tensor, back: torch.Tensor) -> Term:
    if back.dim() == 2:
        return Outer(back, inputs)
    # A layer that is used at many places of one example: its gradient is a sum of products.
    back, inputs = back.flatten(1, -2), inputs.flatten(1, -2)
    return Rows((back.transpose(1, 2) @ inputs).flatten(1))


def _convolution(layer: nn.Conv2d, inputs: torch.Tensor, back: torch.Tensor) -> Rows:
    padding = cast(tuple[int, int], (0, 0) if layer.padding == "valid" else layer.padding)
    size = cast(tuple[int, int], layer.kernel_size)
    dilation, stride = cast(tuple[int, int], layer.dilation), cast(tuple[int, int], layer.stride)
    columns = F.unfold(inputs, size, dilation, padding, stride)
    return Rows(torch.bmm(back.flatten(2), columns.transpose(1, 2)).flatten(1))
