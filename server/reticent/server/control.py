"""The server's control variate: the mean of the devices', known from their updates alone.

SCAFFOLD (Karimireddy et al. 2020, algorithm 1): ``c <- c + |S| / N * mean(c_i_new - c_i)`` over the
devices S of a round, of N in all. A device that sent ``u`` in K local steps has ``c_i_new - c_i =
u / K - c``, so the sum of the updates and their number say it all, no device sends anything more
and the server keeps nothing about any single one.

Guarantee (privacy off, or unit ``example``). ``c`` stays the mean of all ``c_i``, however many are
in a round: ``c <- c + (sum u / K - |S| c) / N``. Who takes part is then no part of what is
protected, so the number of replies may be used.

Guarantee (unit ``client``). What the noise covers of a client is all that it adds to a round, so
``|S|``, which it adds 1 to by replying, may not be used: ``c`` moves by the noised sum as if it
were one of ``clients_per_round`` updates, whoever replied. So ``c`` is post-processing, and public
like the models. A reply that is missing counts as ``u = 0``, which takes ``c / N`` from ``c``. With
Poisson cohorts nearly every round has another number than that one: the plan refuses them.
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

    def moved(
        self, state: ServerState, gradient: Floats, clients: int, replies: int
    ) -> Floats | None:
        """Return the control variate after a round, float64 ``(size,)``.

        Args:
            state: The state before the round.
            gradient: Sum of the updates over ``clients``, as the round releases it.
            clients: The denominator; at least 1.
            replies: How many updates the sum is taken to be of; any number from 0.
        """
        payload = self.payload(state)
        if payload is None:
            return None
        sent: Vector = self._codec.decode(payload, self._layout.blocks)
        own = gradient / self._plan.federation.steps_per_round
        change = own - replies / clients * sent  # with as many replies as clients, exactly sent
        return self._before(state) + clients / self._plan.task.clients * change

    def _before(self, state: ServerState) -> Floats:
        return np.zeros(self._layout.size) if state.control is None else state.control
