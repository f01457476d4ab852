"""What a device keeps between the rounds of a run: its personal layers and its control variate.

Both stay on the device, in its ledger's folder, and both are private. With unit ``example`` they
are made of noised steps that were charged, so what depends on them later costs nothing more. With
unit ``client`` they are raw, and everything that depends on them is bounded before it is sent. A
device that lost them starts again from the public values: the student's layers, and zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reticent.core.plan import Plan
from reticent.core.protocol import Order
from reticent.core.update import Vector

from .environment import Environment
from .kept import Kept
from .local_rules import LocalRule, rule_of, variate_after
from .training import LocalTrainer


@dataclass(frozen=True, eq=False)
class LocalState:
    """The state of one device as a round begins.

    Attributes:
        layers: Its personal layers, float32; empty without any.
        own: Its control variate, float32 ``(travels.size,)``; zeros without one.
        kept_layers: Where the layers are stored.
        kept_own: Where the control variate is stored.
    """

    layers: Vector
    own: Vector
    kept_layers: Kept
    kept_own: Kept

    @staticmethod
    def before(order: Order, trainer: LocalTrainer, environment: Environment) -> LocalState:
        """Return what the latest round before ``order`` left.

        Raises:
            DataError: If a file is damaged.
        """
        local = trainer.plan.federation.local
        layers, own = trainer.layers, np.zeros(trainer.split.travels.size, dtype=np.float32)
        kept_layers = kept("personal", order, environment)
        kept_own = kept("control", order, environment)
        if local.personal:
            layers = kept_layers.before(order.round, layers)
        if local.scaffold:
            own = kept_own.before(order.round, own)
        return LocalState(layers, own, kept_layers, kept_own)

    def rule(self, trainer: LocalTrainer, start: Vector, control: Vector) -> LocalRule:
        """Return what the round adds to its gradients, from the whole model ``start``."""
        local = trainer.plan.federation.local
        return rule_of(local, trainer.split, start, control, self.own)

    def keep_layers(self, order: Order, trainer: LocalTrainer, total: Vector) -> None:
        """Store the personal layers after a round whose steps sum to ``total``."""
        if not len(self.layers):
            return
        rate = trainer.plan.federation.learning_rate
        moved = self.layers - rate * trainer.split.personal(total).astype(np.float64)
        self.kept_layers.keep(order.round, _finite(moved.astype(np.float32), self.layers))

    def keep_variate(
        self, order: Order, plan: Plan, control: Vector, sent: NDArray[np.floating]
    ) -> None:
        """Store the control variate after a round in which the server reads ``sent``."""
        steps = plan.federation.steps_per_round
        fresh = variate_after(self.own, control, sent, steps)
        self.kept_own.keep(order.round, _finite(fresh, self.own))


def _finite(fresh: Vector, before: Vector) -> Vector:
    """Return ``fresh``, or ``before`` if it diverged, which only steps without a bound can do."""
    return fresh if np.isfinite(fresh).all() else before


def kept(what: str, order: Order, environment: Environment) -> Kept:
    """Return where a device stores its vectors of kind ``what`` of the order's run."""
    return Kept(environment.ledger.folder / what, environment.device, order.run)
