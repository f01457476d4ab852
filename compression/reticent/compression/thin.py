"""Structured pruning: filters and neurons that are removed for real, from public data.

The network becomes narrower: what is left is dense, so memory, time and the number of noised
coordinates all shrink. Removing unit c of a layer is the same as multiplying its output by zero
where the next layer takes it in; the criteria ``taylor`` and ``shapley`` measure just that, with a
*gate* on every unit in front of the next layer.

Chains need no dependency graph, so this is written out here: in a chain a filter has one reader.

Scores are made from public data and public weights. They must never see private examples: which
filters are left is sent in the clear.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from reticent.core.errors import PlanError
from reticent.core.tasks import Examples

from .fold import is_chain

Scores = NDArray[np.float64]
Score = Callable[[nn.Sequential, "Span", Examples, np.random.Generator], Scores]

_BATCH = 250
_SHAPLEY_EXAMPLES = 200
_PASSING = (
    nn.ReLU,
    nn.GELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Tanh,
    nn.Identity,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
)


@dataclass(frozen=True)
class Span:
    """A layer whose outputs can be removed, and the one layer that reads them.

    Attributes:
        name: Name of the layer.
        producer: Its position in the chain.
        gate: Position in front of which a gate on channels acts: a Flatten, or the reader.
        reader: Position of the next Conv2d or Linear.
        norm: Position of the GroupNorm between them, if there is one.
        channels: Outputs of the layer.
        width: Channels that can only be removed together: those of one GroupNorm group, so that
            the statistics of the groups that stay do not change. 1 without GroupNorm, and with one
            group for all channels, whose statistics do change.
        fan: Inputs of the reader for each channel: more than 1 behind a Flatten.
    """

    name: str
    producer: int
    gate: int
    reader: int
    norm: int | None
    channels: int
    width: int
    fan: int

    @property
    def units(self) -> int:
        """How many things can be removed."""
        return self.channels // self.width


@dataclass(frozen=True)
class Cut:
    """What was asked and what was done to one layer, in channels."""

    name: str
    before: int
    after: int
    asked: float
    width: int

    def __str__(self) -> str:
        """Say what is kept, and whether it had to be rounded to whole groups."""
        text = f"layer {self.name} keeps {self.after} of {self.before}"
        off = abs(self.before - self.after - self.asked * self.before) > 0.5
        return f"{text} (in whole groups of {self.width})" if self.width > 1 and off else text


def spans(model: nn.Module) -> list[Span]:
    """Return the layers of a folded chain that can lose outputs: every weighted one but the last.

    Raises:
        PlanError: If the model is no chain, or a layer is of a kind or shape for which the reader
            of each output is not known; the layer is named.
    """
    if not is_chain(model):
        raise PlanError(
            f"student.thin: student {type(model).__name__} is not an nn.Sequential of layers; "
            'write it as one, or use student.thin.kind="none"'
        )
    layers = list(model)
    names = [name for name, _ in model.named_children()]
    weighted = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d | nn.Linear)]
    if len(weighted) < 2:
        raise PlanError("student.thin: the student has no layer that another one reads")
    return [_span(layers, names, first, second) for first, second in pairwise(weighted)]


def thinned(
    model: nn.Module,
    score: Score,
    shares: float | Sequence[float],
    public: Examples,
    generator: np.random.Generator,
) -> tuple[nn.Sequential, list[Cut]]:
    """Return a narrower copy of a folded chain, and what was removed.

    Of every layer but the last the units with the smallest scores go, ``round(share * units)`` of
    them; of equal scores the earlier unit goes first. All layers are scored on the whole model.
    ``model`` is not changed; the copy is in evaluation mode.

    Args:
        model: The student, folded, trained on public data.
        score: One of :data:`CRITERIA`.
        shares: Share of each layer's units to remove, in [0, 1), or one for each layer in order.
        public: Public examples.
        generator: For the criteria that draw.

    Raises:
        PlanError: If the model cannot be thinned, there are not as many shares as layers, a layer
            would lose every unit (the message names the largest share), or a score is not finite.
    """
    found = spans(model)
    if not is_chain(model):  # spans() has refused it
        raise TypeError("not a chain")
    if isinstance(shares, float | int):
        shares = [float(shares)] * len(found)
    if len(shares) != len(found):
        raise PlanError(
            f"student.thin.shares has {len(shares)} numbers: must have one for each of the layers "
            f"{', '.join(s.name for s in found)}"
        )
    counts = [_count(span, share) for span, share in zip(found, shares, strict=True)]
    source = copy.deepcopy(model).eval()
    for span in found:
        _check_flat(source, span, public)
    keep = [
        _kept(span, count, score(source, span, public, generator))
        for span, count in zip(found, counts, strict=True)
    ]
    cuts = [
        Cut(span.name, span.channels, len(kept), share, span.width)
        for span, share, kept in zip(found, shares, keep, strict=True)
    ]
    return _cut(source, found, keep), cuts


def l1(
    model: nn.Sequential, span: Span, public: Examples, generator: np.random.Generator
) -> Scores:
    """Score by the sum of the absolute weights of each unit (Li et al. 2017, section 3.1)."""
    return _weights(model, span).abs().sum(dim=1).numpy()


def l2(
    model: nn.Sequential, span: Span, public: Examples, generator: np.random.Generator
) -> Scores:
    """Score by the L2 norm of the weights of each unit."""
    return _weights(model, span).square().sum(dim=1).sqrt().numpy()


def taylor(
    model: nn.Sequential, span: Span, public: Examples, generator: np.random.Generator
) -> Scores:
    """Score by the squared derivative of the loss by each unit's gate, averaged over examples.

    To first order it is the square of the change of an example's loss when the unit is removed
    (Molchanov et al. 2019, section 3.1, with gates; their minibatches are single examples here).
    """
    total = torch.zeros(span.units, dtype=torch.float64)
    for part in range(0, len(public.labels), _BATCH):
        inputs = public.inputs[part : part + _BATCH]
        labels = public.labels[part : part + _BATCH]
        gates = torch.ones(len(labels), span.units, requires_grad=True)
        with torch.no_grad():
            before = model[: span.gate](inputs)
        loss = F.cross_entropy(_behind(model, span, before, gates), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, [gates])
        total += gradient.double().square().sum(dim=0)
    return (total / len(public.labels)).numpy()


def shapley(permutations: int) -> Score:
    """Return the criterion that scores by sampled Shapley values of units.

    The players are the units of one layer, the worth of a coalition is minus the mean loss on (up
    to 200) public examples with all other units of the layer gated off, and a unit's score is its
    mean marginal worth over random orders: unbiased for the Shapley value (Castro et al. 2009;
    Ancona et al. 2020 prune by it). It costs ``permutations * (units + 1)`` passes a layer.
    """

    def score(
        model: nn.Sequential, span: Span, public: Examples, generator: np.random.Generator
    ) -> Scores:
        worth = _worth(model, span, public)
        total = np.zeros(span.units)
        for _ in range(permutations):
            inside = np.zeros(span.units, dtype=bool)
            last = worth(inside)
            for unit in generator.permutation(span.units):
                inside[unit] = True
                now = worth(inside)
                total[unit] += now - last
                last = now
        return total / permutations

    return score


def random(
    model: nn.Sequential, span: Span, public: Examples, generator: np.random.Generator
) -> Scores:
    """Score by chance: the baseline for the other criteria."""
    return generator.random(span.units)


CRITERIA: dict[str, Callable[[int], Score]] = {
    "l1": lambda _: l1,
    "l2": lambda _: l2,
    "taylor": lambda _: taylor,
    "shapley": shapley,
    "random": lambda _: random,
}
"""Criteria by name; each is given the number of permutations, which only ``shapley`` uses."""


def _span(layers: list[nn.Module], names: list[str], first: int, second: int) -> Span:
    producer: Any = layers[first]
    reader: Any = layers[second]
    for position in (first, second):
        if getattr(layers[position], "groups", 1) != 1:
            raise _refusal(names[position], layers[position], "has groups of channels of its own")
    convolution = isinstance(producer, nn.Conv2d)
    channels = producer.out_channels if convolution else producer.out_features
    norm, flatten = None, None
    for position in range(first + 1, second):
        layer = layers[position]
        if type(layer) is nn.GroupNorm and norm is None and flatten is None:
            norm = position
        elif type(layer) is nn.Flatten and layer.start_dim == 1 and flatten is None:
            flatten = position
        elif type(layer) not in _PASSING:
            raise _refusal(names[position], layer, "cannot be followed through")
    taken = reader.in_channels if isinstance(reader, nn.Conv2d) else reader.in_features
    flat = convolution and flatten is not None and isinstance(reader, nn.Linear)
    same = isinstance(reader, nn.Conv2d) == convolution and taken == channels
    if not (same or (flat and taken % channels == 0)):
        raise _refusal(names[second], reader, f"does not read the {channels} outputs one by one")
    gate = second if flatten is None else flatten
    width = 1 if norm is None else _width(layers[norm])
    return Span(names[first], first, gate, second, norm, channels, width, taken // channels)


def _refusal(name: str, layer: nn.Module, reason: str) -> PlanError:
    return PlanError(
        f"student layer {name} ({type(layer).__name__}) {reason}: the layer before it cannot be "
        'thinned; use student.thin.kind="none", or a chain of Conv2d, Linear, GroupNorm, '
        "activations, pooling and Flatten"
    )


def _width(norm: Any) -> int:
    return norm.num_channels // norm.num_groups if norm.num_groups > 1 else 1


def _count(span: Span, share: float) -> int:
    if not 0 <= share < 1:
        raise PlanError(f"student.thin.share={share}: must be at least 0 and below 1")
    count = round(share * span.units)
    if count >= span.units:
        things = "outputs" if span.width == 1 else f"groups of {span.width} outputs"
        raise PlanError(
            f"student.thin.share={share}: would remove all {span.units} {things} of layer "
            f"{span.name}; must be at most {(span.units - 1) / span.units:.4f} for this layer"
        )
    return count


def _kept(span: Span, count: int, scores: Scores) -> torch.Tensor:
    """Return the channels that stay, ascending."""
    if not np.isfinite(scores).all():
        raise PlanError(
            f"student layer {span.name}: its scores are not finite: it cannot be thinned"
        )
    units = np.sort(np.argsort(scores, kind="stable")[count:])
    channels = units[:, None] * span.width + np.arange(span.width)
    return torch.from_numpy(channels.reshape(-1))


def _weights(model: nn.Sequential, span: Span) -> torch.Tensor:
    layer: Any = model[span.producer]
    return layer.weight.detach().double().reshape(span.units, -1)


def _behind(
    model: nn.Sequential, span: Span, before: torch.Tensor, gates: torch.Tensor
) -> torch.Tensor:
    """Return the logits with the units multiplied by ``gates``, ``(n or 1, units)``."""
    wide = gates.repeat_interleave(span.width, dim=1)
    return model[span.gate :](before * wide.reshape(*wide.shape, *[1] * (before.dim() - 2)))


@torch.no_grad()
def _check_flat(model: nn.Sequential, span: Span, public: Examples) -> None:
    layer = model[span.producer]
    if isinstance(layer, nn.Linear) and model[: span.gate](public.inputs[:1]).dim() != 2:
        raise _refusal(span.name, layer, "is used at several places of one example")


@torch.no_grad()
def _worth(
    model: nn.Sequential, span: Span, public: Examples
) -> Callable[[NDArray[np.bool_]], float]:
    labels = public.labels[:_SHAPLEY_EXAMPLES]
    before = model[: span.gate](public.inputs[:_SHAPLEY_EXAMPLES])

    @torch.no_grad()
    def worth(inside: NDArray[np.bool_]) -> float:
        gates = torch.from_numpy(inside.astype(np.float32))[None]
        return -float(F.cross_entropy(_behind(model, span, before, gates), labels))

    return worth


@torch.no_grad()
def _cut(model: nn.Sequential, found: list[Span], keep: list[torch.Tensor]) -> nn.Sequential:
    for span, channels in zip(found, keep, strict=True):
        layer: Any = model[span.producer]
        _take(layer, channels)
        if isinstance(layer, nn.Conv2d):
            layer.out_channels = len(channels)
        else:
            layer.out_features = len(channels)
        if span.norm is not None:
            norm: Any = model[span.norm]
            _take(norm, channels)
            norm.num_groups = max(1, norm.num_groups * len(channels) // span.channels)
            norm.num_channels = len(channels)
        reader: Any = model[span.reader]
        inputs = (channels[:, None] * span.fan + torch.arange(span.fan)).reshape(-1)
        reader.weight = nn.Parameter(reader.weight[:, inputs].clone())
        if isinstance(reader, nn.Conv2d):
            reader.in_channels = len(inputs)
        else:
            reader.in_features = len(inputs)
    return model


def _take(layer: Any, rows: torch.Tensor) -> None:
    for name in ("weight", "bias"):
        values = getattr(layer, name)
        if values is not None:
            setattr(layer, name, nn.Parameter(values[rows].clone()))
