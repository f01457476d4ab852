"""Ghost norms and book-keeping for plain chains of layers: one backward pass, few gradients.

One forward pass, then one backward pass, layer by layer (:mod:`.layers`). A linear layer's gradient
of one example is the outer product of its output's gradient and its input, of which the norm has
a closed form (Goodfellow 2015, "Efficient per-example gradient computations"), and the clipped sum
is one matrix product. Convolutions and GroupNorm, whose gradients are small next to their
activations, are written out, and so are recurrent layers (see :mod:`.recurrent`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from reticent.core.errors import DataError
from reticent.core.sequences import OneHot

from .layers import Backward, applied, orders_of
from .recurrent import RECURRENT
from .terms import Term

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
    known = all(map(is_known, layers)) and not any(is_hooked(m) for m in model.modules())
    return layers if known and distinct and trained else None


def pooled_first(layers: Sequence[nn.Module]) -> tuple[nn.Module, ...]:
    """Return ``layers`` with every ReLU behind the max pooling that follows it.

    The same values and gradients to the bit, from a pass over the pooled values alone: a ReLU keeps
    the order of what is above zero, and hands nothing back where nothing is.
    """
    found = list(layers)
    for i in range(len(found) - 1):
        if type(found[i]) is nn.ReLU and type(found[i + 1]) is nn.MaxPool2d:
            found[i], found[i + 1] = found[i + 1], found[i]
    return tuple(found)


class GhostGradients:
    """Gradients of single examples of a chain of layers, nothing of which is kept afterwards.

    No hooks are attached and nothing is stored on the model, so an aborted pass leaves nothing.

    Attributes:
        orders: For each parameter, how its term permutes its dimensions; None if it does not.
    """

    def __init__(self, layers: tuple[nn.Module, ...]) -> None:
        """Use ``layers``, which :func:`chain_of` gave."""
        self._layers = pooled_first(layers)
        self.orders = [order for layer in layers for order in orders_of(layer)]

    @torch.no_grad()
    def terms(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> list[Term]:
        """Return the gradients of every parameter, in order.

        Raises:
            DataError: If the loss does not depend on the last layer, or a layer mixes examples.
        """
        values, needed = inputs, False
        passed: list[Backward] = []
        for layer in self._layers:
            values, backward = applied(layer, values, needed)
            needed = needed or bool(layer._parameters)
            passed.append(backward)
            if layer._parameters and len(values) != len(labels):
                raise DataError(
                    f"{layer} gave {len(values)} rows for {len(labels)} examples: the first "
                    "dimension must be the batch in every layer"
                )
        back = of_outputs(loss, values, labels)
        terms: list[list[Term]] = []
        while passed and back is not None:
            back, found = passed.pop()(back)
            terms.append(found)
        return [term for found in reversed(terms) for term in found]


def of_outputs(
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    outputs: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    """Return the gradient of the loss by the model's outputs."""
    leaf = outputs.detach().requires_grad_()
    with torch.enable_grad():
        (back,) = torch.autograd.grad(loss(leaf, labels), leaf, allow_unused=True)
    if back is None:
        raise DataError("no per-example gradient: the loss must depend on every layer's output")
    return back


def _flatten(module: nn.Module) -> Iterator[nn.Module]:
    if type(module) is nn.Sequential:
        for child in module:
            yield from _flatten(child)
    else:
        yield module


def is_known(layer: nn.Module) -> bool:
    """Return whether a chain may have ``layer``, by its type and its options."""
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


def is_hooked(module: nn.Module) -> bool:
    """Return whether somebody's hooks are on ``module``; they could do anything."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks)
