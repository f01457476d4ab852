"""The student, and what is done to make it small."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, model_validator

from ..section import Count, Positive, Probability, Section, Share
from .distill import Distill


def _not_truth(value: object) -> object:
    """Refuse true and false, which Python and so pydantic's literals take for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("must be 8, 4, 3, 2 or 1, not true or false")
    return value


Backend = Literal["qnnpack", "x86"]
Bits = Literal[8, 4, 3, 2, 1]
Granularity = Literal["channel", "tensor"]
Observer = Literal["min-max", "moving-average", "histogram"]


class Prune(Section):
    """Pruning of single weights of the public-data student, before any private data are used.

    Attributes:
        kind: How weights are scored, on public data: ``magnitude``, ``taylor`` (weight times
            gradient) or ``random``; ``none`` drops nothing.
        sparsity: Share of the prunable weights that is dropped.
        schedule: ``one-shot``: once, then tuned. ``gradual``: in steps along a cubic curve (Zhu and
            Gupta 2017). ``weight-rewind`` and ``rate-rewind``: in steps, after each of which
            training resumes at ``rewind`` with the weights that it had there (Frankle et al. 2020),
            or with its learning rates alone (Renda et al. 2020).
        steps: Steps of every schedule but ``one-shot``.
        rewind: Share of the training on public data that is not repeated.
    """

    kind: Literal["magnitude", "taylor", "random", "none"] = "magnitude"
    sparsity: Share = 0.5
    schedule: Literal["one-shot", "gradual", "weight-rewind", "rate-rewind"] = "one-shot"
    steps: Count = 4
    rewind: Share = 0.25


class Thin(Section):
    """Structured pruning of the public-data student: whole filters and neurons are removed.

    Attributes:
        kind: How units are scored, on public data or weights: ``l1``, ``l2``, ``taylor``,
            ``shapley`` or ``random``; ``none`` removes nothing.
        share: Share of the units of every layer but the last that is removed.
        shares: One share for each layer but the last, in order, instead of ``share``.
        permutations: Sampled orders of the units of a layer, for ``shapley``.
    """

    kind: Literal["none", "l1", "l2", "taylor", "shapley", "random"] = "none"
    share: Share = 0.5
    shares: tuple[Share, ...] = ()
    permutations: Count = 8


class Factorize(Section):
    """Low-rank factorization of the public-data student, after thinning and before pruning.

    Attributes:
        kind: ``svd``: layers become two factors by truncated singular value decomposition, where
            that makes them smaller. ``none``: they stay.
        rule: ``energy``: the rank keeps a share of the squared singular values; ``size``: of the
            layer's parameters.
        keep: That share.
    """

    kind: Literal["none", "svd"] = "none"
    rule: Literal["energy", "size"] = "energy"
    keep: Probability = 0.9


class Adapt(Section):
    """Low-rank adapters (Hu et al. 2021): the public student is frozen, clients train factors.

    Attributes:
        kind: ``lora`` or ``none``.
        rank: Rank of the change of every adapted layer.
        layers: Names of the adapted layers; empty for all whose factors are smaller than they are.
    """

    kind: Literal["none", "lora"] = "none"
    rank: Count = 4
    layers: tuple[str, ...] = ()


class Quantize(Section):
    """Integer weights and activations, and the engine that computes with them.

    Attributes:
        kind: ``qat``: weights are fake-quantized during the rounds and the model is quantized after
            them; ``static``: only after them; ``dynamic``: only weights, to 8 bits after them, and
            activations on the device as they come (Linear, LSTM and GRU); ``none``: as
            ``static``, and models are tested in float during the rounds.
        backend: The int8 engine: ``qnnpack`` for ARM, ``x86`` for servers and laptops.
        bits: Bits of the weights; activations have 8.
        edges: Which layers keep 8 bits whatever ``bits`` says: none, the first, or first and last.
        granularity: One step for each output ``channel`` of a weight, or for the whole ``tensor``.
        observer: How activation ranges are found on public data: the extremes (``min-max``), a
            moving average of each batch's extremes, or the ``histogram`` range of least squared
            error.
    """

    kind: Literal["qat", "static", "dynamic", "none"] = "qat"
    backend: Backend = "qnnpack"
    bits: Annotated[Bits, BeforeValidator(_not_truth)] = 8
    edges: Literal["none", "first", "both"] = "first"
    granularity: Granularity = "channel"
    observer: Observer = "min-max"

    @model_validator(mode="after")
    def _choices_have_effect(self) -> Self:
        if self.kind in ("none", "dynamic") and (self.bits, self.observer) != (8, "min-max"):
            raise ValueError(
                f'kind="{self.kind}" with bits={self.bits} and observer="{self.observer}": must be '
                '8 and "min-max"; kind="static" quantizes after training as they say'
            )
        if self.kind == "none" and self.granularity != "channel":
            raise ValueError(
                f'kind="none" with granularity="{self.granularity}": must be "channel"; '
                'kind="static" quantizes after training as it says'
            )
        return self


class Student(Section):
    """The model that is trained federatedly and deployed, and what is done to make it small."""

    model: str = "tiny"
    epochs: Count = 60
    learning_rate: Positive = 0.01
    distill: Distill = Distill()
    thin: Thin = Thin()
    factorize: Factorize = Factorize()
    prune: Prune = Prune()
    adapt: Adapt = Adapt()
    quantize: Quantize = Quantize()

    @model_validator(mode="after")
    def _adapts_layers_that_are_known(self) -> Self:
        pruned = self.prune.kind != "none" and self.prune.sparsity > 0
        if self.adapt.kind != "none" and pruned:
            raise ValueError(
                f'adapt.kind="{self.adapt.kind}": the factors would fill again what is pruned: '
                'use prune.kind="none", and thin or factorize to make the student smaller'
            )
        by_energy = self.factorize.kind != "none" and self.factorize.rule == "energy"
        if self.adapt.kind != "none" and by_energy:
            raise ValueError(
                f'adapt.kind="{self.adapt.kind}": which layers there are must be known before '
                'training: use factorize.rule="size"'
            )
        return self

    @model_validator(mode="after")
    def _rewinds_to_its_own_layers(self) -> Self:
        if self.prune.kind != "none" and self.prune.schedule == "weight-rewind" and self.reshaped:
            raise ValueError(
                'prune.schedule="weight-rewind" goes back to weights of the student\'s own layers, '
                'which thin and factorize change: use "rate-rewind", or leave them off'
            )
        return self

    @property
    def reshaped(self) -> bool:
        """Whether the trained student has other layers than ``model``, which clients must get."""
        return {self.thin.kind, self.factorize.kind, self.adapt.kind} != {"none"}

    @property
    def unshaped(self) -> Student:
        """The same student without anything that changes its layers."""
        return self.model_copy(update={"thin": Thin(), "factorize": Factorize(), "adapt": Adapt()})
