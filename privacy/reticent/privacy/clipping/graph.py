"""Gradients of single examples of known layers that are joined in any way: one recorded pass.

Residual connections and attention are no chain, so :mod:`.ghost` does not know the way back
through them; autograd does. A forward pass records, for every layer with parameters, its input and
the place of its output in autograd's graph. One backward pass then asks for the gradients at those
places alone: autograd computes no gradient of a parameter. From a layer's input and its output's
gradient follow its :class:`~.terms.Term`, and the clipped sum is a product of the two, without a
second backward pass (Bu et al. 2023, "Differentially private optimization on large model at small
cost": book-keeping).

That is right only where every parameter is used through its layer, once. :mod:`.trial` finds out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F

from reticent.core.errors import DataError

from .convolutions import convolution_terms, rows_of
from .ghost import is_hooked, is_known
from .group_norms import over_places
from .layers import linear_terms, orders_of
from .positions import LookedUp, Positions
from .terms import Rows, Term


class Call(NamedTuple):
    """One use of a layer.

    Attributes:
        inputs: What it was given, without history.
        version: How often that had been changed in place by then.
        output: The place of its output in autograd's graph; later changes in place do not move it.
        rows: Rows of its output.
    """

    inputs: torch.Tensor
    version: int
    output: GradientEdge
    rows: int


class GraphGradients:
    """Gradients of single examples of a model's layers, nothing of which is kept afterwards.

    Hooks are on the layers during a forward pass only, and what they record is not on the model.

    Attributes:
        orders: For each parameter, how its term permutes its dimensions; None if it does not.
    """

    def __init__(self, model: nn.Module) -> None:
        """Use ``model``, against which :func:`unsuited` has nothing."""
        self._model = model
        self._layers = layers_of(model)
        self.orders = [order for _, layer in self._layers for order in orders_of(layer)]

    def terms(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> list[Term]:
        """Return the gradients of every parameter, in order.

        Raises:
            DataError: If a layer is not used exactly once, takes other rows than the examples, has
                its input changed in place, or the loss does not depend on it; it is named.
        """
        calls: list[list[Call]] = [[] for _ in self._layers]
        with torch.enable_grad():
            with _recorded(self._layers, calls):
                total = loss(self._model(inputs), labels)
            used = [
                _only(name, found, len(labels))
                for (name, _), found in zip(self._layers, calls, strict=True)
            ]
            backs = _backs(total, used)
        terms: list[Term] = []
        with torch.no_grad():
            for (name, layer), call, back in zip(self._layers, used, backs, strict=True):
                if back is None:
                    raise DataError(
                        f"no per-example gradient for layer {name}: the loss must depend on every "
                        "layer's output"
                    )
                if call.inputs._version != call.version:
                    raise DataError(f"the input of layer {name} is changed in place after its use")
                terms += TERMS[type(layer)](layer, call.inputs, back)
        return terms


def layers_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules that have parameters of their own, named, in the parameters' order."""
    found = [(n, m) for n, m in model.named_modules() if any(True for _ in m.parameters(False))]
    return [(name or "(the model)", module) for name, module in found]


def unsuited(model: nn.Module) -> str | None:
    """Return why ``model`` cannot be recorded, by the kinds of its layers; None if it can.

    Modules without parameters of their own may do anything; :mod:`.trial` looks at that.
    """
    seen: set[int] = set()
    for name, layer in layers_of(model):
        if not _suits(layer):
            return f"layer {name} ({type(layer).__name__}) has no closed form here"
        for parameter in layer.parameters(False):
            if not parameter.requires_grad:
                return f"layer {name} has a parameter that is not trained"
            if id(parameter) in seen:
                return f"layer {name} shares a parameter with another"
            seen.add(id(parameter))
    if any(is_hooked(m) for m in model.modules()):
        return "there are hooks on the student's modules"
    return None


def _suits(layer: nn.Module) -> bool:
    if type(layer) is nn.Embedding:
        return layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse
    if type(layer) is nn.LayerNorm:
        return set(layer._parameters) == {"weight", "bias"}
    return type(layer) in TERMS and is_known(layer)


@contextmanager
def _recorded(layers: list[tuple[str, nn.Module]], calls: list[list[Call]]) -> Iterator[None]:
    with ExitStack() as stack:
        for (name, layer), found in zip(layers, calls, strict=True):
            stack.callback(layer.register_forward_hook(partial(_record, name, found)).remove)
        yield


def _record(
    name: str, found: list[Call], layer: nn.Module, given: tuple[Any, ...], output: torch.Tensor
) -> None:
    if len(given) != 1:
        raise DataError(f"layer {name} must be called with its input alone, not by keyword")
    if not output.requires_grad:
        raise DataError(f"layer {name} is used without gradients")
    inputs = given[0].detach()
    found.append(Call(inputs, inputs._version, get_gradient_edge(output), len(output)))


def _only(name: str, found: list[Call], count: int) -> Call:
    if len(found) != 1:
        raise DataError(
            f"no per-example gradient for layer {name}, which is used {len(found)} times: every "
            "layer must be used exactly once"
        )
    if found[0].rows != count:
        raise DataError(
            f"layer {name} took {found[0].rows} rows for {count} examples: the first dimension "
            "must be the batch in every layer"
        )
    return found[0]


def _backs(total: torch.Tensor, used: list[Call]) -> tuple[torch.Tensor | None, ...]:
    if not total.requires_grad:
        return (None,) * len(used)
    return torch.autograd.grad(total, [call.output for call in used], allow_unused=True)


def _linear(layer: nn.Linear, inputs: torch.Tensor, back: torch.Tensor) -> list[Term]:
    if back.dim() == 2:
        return linear_terms(layer, inputs, back)
    back, inputs = back.flatten(1, -2), inputs.flatten(1, -2)
    weight = Positions(back, inputs)
    return [weight] if layer.bias is None else [weight, Rows(back.sum(dim=1))]


def _convolution(layer: nn.Conv2d, inputs: torch.Tensor, back: torch.Tensor) -> list[Term]:
    return convolution_terms(layer, inputs, rows_of(back))


def _group_norm(layer: nn.GroupNorm, inputs: torch.Tensor, back: torch.Tensor) -> list[Term]:
    plain = F.group_norm(inputs, layer.num_groups, eps=layer.eps)
    return [Rows(over_places(plain * back)), Rows(over_places(back))]


def _layer_norm(layer: nn.LayerNorm, inputs: torch.Tensor, back: torch.Tensor) -> list[Term]:
    plain = F.layer_norm(inputs, layer.normalized_shape, eps=layer.eps)
    size = layer.weight.numel()
    products = [plain * back] if layer.bias is None else [plain * back, back]
    return [Rows(p.reshape(len(back), -1, size).sum(dim=1)) for p in products]


def _embedding(layer: nn.Embedding, inputs: torch.Tensor, back: torch.Tensor) -> list[Term]:
    codes = inputs.reshape(len(inputs), -1).long()
    back = back.reshape(*codes.shape, -1)
    if layer.padding_idx is not None:  # a row that is not trained
        back = back.masked_fill((codes == layer.padding_idx)[..., None], 0)
    return [LookedUp(back, codes, layer.num_embeddings)]


TERMS: dict[type[nn.Module], Callable[..., list[Term]]] = {
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
}
"""The known layers, each with what makes its terms of its input and its output's gradient."""
