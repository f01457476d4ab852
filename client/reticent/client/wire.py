"""Public constants of an encoded update: the noise in it, the quantizer's step and its length."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from reticent.compression.codec import Codec, pad
from reticent.compression.codec.frame import PADDING_OVERHEAD
from reticent.core.plan import Plan, Privacy
from reticent.core.protocol import Order
from reticent.core.seeds import numpy_generator
from reticent.core.update import Vector

from .steps import NoisyStep

_MARGIN = 1.02
"""What one draw of the noise may need more than another; a hundred times its deviation or so."""

_GROWTH = 8
"""Longer payloads get lengths that are whole eighths of the first one more."""


@dataclass(frozen=True)
class Wire:
    """How an update of one round is encoded. Nothing here depends on private data.

    Attributes:
        step: The quantizer's step; None takes it from the data.
        deviation: Standard deviation of a coordinate that payloads have room for; None: they are
            not padded.
    """

    step: float | None
    deviation: float | None

    def encode(
        self, codec: Codec, update: Vector, blocks: tuple[int, ...], generator: np.random.Generator
    ) -> bytes:
        """Return ``update`` as a payload, padded if the plan says so.

        Guarantee: a padded payload has length ``first + i * ceil(first / 8)``, ``first`` a public
        constant, for the least whole ``i >= 0`` that holds it. Which ``i`` it is depends on the
        update: lengths are equal as long as every update is no longer, in coded bits, than normal
        values of ``deviation``.
        """
        payload = codec.encode(update, blocks, generator, self.step)
        if self.deviation is None:
            return payload
        first = public_length(codec, blocks, self.deviation, self.step)
        if len(payload) == first:
            return payload
        more = max(0, len(payload) + PADDING_OVERHEAD - first)
        return pad(payload, first + -(-more // -(-first // _GROWTH)) * -(-first // _GROWTH))


@lru_cache(maxsize=8)
def public_length(
    codec: Codec, blocks: tuple[int, ...], deviation: float, step: float | None
) -> int:
    """Return the length of coded normal values of this deviation, and a margin.

    Of all values with the same mean square, independent normal ones need the most bits (at a fine
    step), so this is enough for updates of a smaller mean square, however they are distributed.
    Codecs whose payloads all have one length, such as ``identity``, need no margin.
    """
    normal = numpy_generator(0, "padding").standard_normal(sum(blocks))
    values = (deviation * normal).astype(np.float32)
    lengths = [
        len(codec.encode(v, blocks, numpy_generator(0, "padding", "codec"), step))
        for v in (values, np.zeros_like(values))
    ]
    if lengths[0] == lengths[1]:
        return lengths[0]
    return math.ceil(_MARGIN * lengths[0]) + PADDING_OVERHEAD


def wire_of(plan: Plan, noisy: NoisyStep, clip: float, size: int) -> Wire:
    """Return the constants of ``plan`` for updates of ``size`` numbers, under an order's bound.

    With unit ``example`` a payload has room for the noise and for gradients of the length of one
    expected batch whose clipped gradients all point the same way (with control variates, which are
    such updates themselves, for three of each); with unit ``client`` for an update at its bound.
    """
    privacy, steps = plan.private, plan.federation.steps_per_round
    if privacy is None:
        return Wire(None, None)
    if privacy.unit == "client":
        step = update_step(clip, size, plan.updates.step)
        deviation = clip / math.sqrt(max(1, size))
    else:
        step = quantization_step(noisy, plan.updates.step)
        noise = noisy.noise / noisy.denominator
        terms = plan.federation.local.terms
        signal = terms * steps * clip / max(1, size) ** 0.5
        deviation = math.hypot(math.sqrt(terms * steps) * noise, signal)
    return Wire(step, deviation if plan.updates.pad else None)


def noisy_step(plan: Plan, order: Order) -> NoisyStep:
    """Return the public constants of a step.

    With unit ``example`` and under aggregator trust the noise is a share. With unit ``client`` a
    step is plain: the whole update is bounded afterwards, and the noise is the server's.
    """
    privacy: Privacy | None = plan.private
    if privacy is None or privacy.unit == "client":
        return NoisyStep(None, 0.0, order.denominator)
    shares = plan.federation.quorum if privacy.trust == "aggregator" else 1
    noise = order.noise_multiplier * privacy.clip / shares**0.5
    return NoisyStep(privacy.clip, noise, order.denominator)


def quantization_step(step: NoisyStep, ratio: float = 0.5) -> float | None:
    """Return ``ratio`` times the standard deviation of the noise in a coordinate of the update.

    A public constant, so that the quantizer's error cannot depend on data. A dither of this step
    adds ratio**2 / 12 to the variance of one step's noise (2.1 % at one half). None, so that the
    codec scales by the data, when there is no noise.
    """
    return step.noise / step.denominator * ratio if step.noise > 0 else None


def update_step(clip: float, size: int, ratio: float = 0.5) -> float:
    """Return the quantizer's step for an update of L2 norm ``clip`` at most and ``size`` numbers.

    ``ratio`` of an average coordinate at the bound: a uniform error of this step has an L2 norm of
    about 0.29 ``ratio * clip``; at one half that is a hundredth of the norm of the server's noise
    at a few thousand parameters.
    """
    return clip * ratio / max(1, size) ** 0.5
