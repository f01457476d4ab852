"""What the plan's codec does to the mean of a round's updates, rehearsed on a few clients."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reticent.client.steps import NoisyStep
from reticent.client.wire import wire_of
from reticent.compression.codec import Codec, build_codec
from reticent.core.plan import Plan
from reticent.core.seeds import numpy_generator
from reticent.core.update import Layout, Vector

_UNBIASED, _BIASED = 8, 32
"""How many of a round's clients encode, at most."""


@dataclass
class Sending:
    """The mean of the updates of a round, as the server reads it.

    A few clients stand for all K: each encodes the round's mean update with noise of the size that
    a client's own has, noise that is zero on average over them, and what decoding changes is
    averaged. Errors of an unbiased codec are independent and vanish as 1/K, so theirs is scaled to
    that; of a biased one they are taken as they are, which says a little too much of its random
    part. That clients differ in their data, too, is left out.

    Attributes:
        codec: Of the updates.
        blocks: Lengths of the parameters in an update.
        step: The quantizer's public step; None takes it from the update.
        noise: Standard deviation of a coordinate of one client's noise.
        clients: K.
        feedback: Whether clients send later what the codec left out.
        seed: Of noise and codec.
        left: What the codec left out so far, float32 ``(clients that encode, size)``.
    """

    codec: Codec
    blocks: tuple[int, ...]
    step: float | None
    noise: float
    clients: int
    feedback: bool
    seed: int
    left: NDArray[np.float32]

    @staticmethod
    def of(plan: Plan, layout: Layout, step: NoisyStep, clip: float) -> Sending:
        """Return how clients of ``plan`` send; ``step`` and ``clip`` are those of one of them."""
        federation, codec = plan.federation, build_codec(plan.updates.codec, layout)
        few = min(federation.clients_per_round, _UNBIASED if codec.unbiased else _BIASED)
        return Sending(
            codec,
            layout.blocks,
            wire_of(plan, step, clip, layout.size).step,
            math.sqrt(federation.steps_per_round) * step.noise / step.denominator,
            federation.clients_per_round,
            plan.updates.error_feedback,
            plan.seed,
            np.zeros((few, layout.size), dtype=np.float32),
        )

    def mean(self, update: Vector, number: int) -> NDArray[np.float64]:
        """Return what round ``number`` makes of ``update``, the mean of what was to be sent."""
        plain = update.astype(np.float64)
        if self.codec.error == "none" or not np.isfinite(update).all():
            return plain
        generator = numpy_generator(self.seed, "rehearsal", "sent", number)
        total = np.zeros_like(plain)
        for index, own in enumerate(self._noises(generator)):
            meant = plain + own
            wanted = (meant + self.left[index]).astype(np.float32)
            payload = self.codec.encode(wanted, self.blocks, generator, self.step)
            read = self.codec.decode(payload, self.blocks)
            total += read - meant
            if self.feedback:
                self.left[index] = wanted - read
        few = len(self.left)
        scale = math.sqrt(few / self.clients) if self.codec.unbiased else 1.0
        return plain + scale / few * total

    def _noises(self, generator: np.random.Generator) -> NDArray[np.float64]:
        """Return what each client's noise has beyond the mean of all clients'."""
        few = len(self.left)
        found = generator.standard_normal(self.left.shape)
        if few == 1:
            return 0.0 * found
        found -= found.mean(axis=0)
        found *= self.noise * math.sqrt((1 - 1 / self.clients) / (1 - 1 / few))
        return found
