"""The server's control variate: the mean of the devices', known from their updates alone.

SCAFFOLD (Karimireddy et al. 2020, algorithm 1): ``c <- c + |S| / N * mean(c_i_new - c_i)`` over the
devices S of a round, of N in all. A device that sent ``u`` in K local steps has ``c_i_new - c_i =
u / K - c``, so the mean of the updates says it all, no device sends anything more and the server
keeps nothing about any single one.

Privacy. The mean is the one that the round releases: with unit ``client`` the noised one, over the
public number of clients whoever replied. So ``c`` is post-processing, and public like the models.
"""

from __future__ import annotations

import numpy as np

from reticent.compression.codec import build_codec
from reticent.core.plan import Plan
from reticent.core.seeds import numpy_generator
from reticent.core.update import Layout, Vector

from .optimizer import Floats, ServerState


class ControlVariates:
    """Sends and moves the control variate of a run; does nothing where the plan has none."""

    def __init__(self, plan: Plan, layout: Layout) -> None:
        """Build the codec: that of models, ``updates.broadcast``."""
        self._plan, self._layout = plan, layout
        self._codec = build_codec(plan.updates.broadcast, layout)

    def payload(self, state: ServerState) -> bytes | None:
        """Return what the round after ``state`` sends down; the same for the same state."""
        if not self._plan.federation.local.scaffold:
            return None
        values = self._before(state).astype(np.float32)
        generator = numpy_generator(self._plan.seed, "control", state.round)
        return self._codec.encode(values, self._layout.blocks, generator)

    def moved(self, state: ServerState, gradient: Floats, clients: int) -> Floats | None:
        """Return the control variate after a round, float64 ``(size,)``.

        Args:
            state: The state before the round.
            gradient: Mean of the updates, as the round releases it.
            clients: How many it is the mean of.
        """
        payload = self.payload(state)
        if payload is None:
            return None
        sent: Vector = self._codec.decode(payload, self._layout.blocks)
        change = gradient / self._plan.federation.steps_per_round - sent
        return self._before(state) + clients / self._plan.task.clients * change

    def _before(self, state: ServerState) -> Floats:
        return np.zeros(self._layout.size) if state.control is None else state.control
