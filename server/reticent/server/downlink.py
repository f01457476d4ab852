"""What a round sends down: a whole model, or the change since the model that devices hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from reticent.compression.codec import Codec, build_codec
from reticent.core.plan import Plan
from reticent.core.seeds import numpy_generator
from reticent.core.update import Layout, Vector, vector_digest


@dataclass(frozen=True)
class Broadcast:
    """The payloads of one round.

    Attributes:
        whole: For a device that does not hold the last model.
        change: For one that does; None where the plan sends no changes, and in the first round.
        marks: SHA-256 of the model that the change is against, and of the one it leads to.
        model: The model that every device trains on, whichever payload it got; None where the plan
            sends no changes.
    """

    whole: bytes
    change: bytes | None = None
    marks: bytes = b""
    model: Vector | None = None


class Downlink:
    """Encodes models. The same plan, round, weights and held model give the same bytes.

    A change is encoded against the model that devices *decoded* last, so what the codec left out of
    one change is part of the next: errors do not add up (Seide et al. 2014). A whole model is sent
    as float32, because it must be the very one that the change leads to.
    """

    def __init__(self, plan: Plan, layout: Layout) -> None:
        """Build the plan's codecs for models of ``layout``."""
        self._seed, self._blocks = plan.seed, layout.blocks
        self._whole: Codec = build_codec(plan.updates.whole, layout)
        delta = plan.updates.delta
        self._delta: Codec | None = build_codec(delta, layout) if delta else None

    def broadcast(self, weights: Vector, held: Vector | None, round: int) -> Broadcast:
        """Return what round ``round`` sends.

        Args:
            weights: The server's model, float32 ``(size,)``.
            held: The model that devices decoded in the round before, if there was one.
            round: Number of the round.
        """
        generator = numpy_generator(self._seed, "broadcast", round)
        if self._delta is None:
            return Broadcast(self._whole.encode(weights, self._blocks, generator))
        if held is None:
            return Broadcast(self._whole.encode(weights, self._blocks, generator), model=weights)
        change = self._delta.encode(weights - held, self._blocks, generator)
        model: Vector = held + self._delta.decode(change, self._blocks)
        marks = bytes.fromhex(vector_digest(held) + vector_digest(model))
        return Broadcast(
            self._whole.encode(model, self._blocks, generator),
            change,
            marks,
            model.astype(np.float32),
        )
