"""What local steps do besides following the gradient: the proximal term, and control variates.

FedProx (Li et al. 2020) adds ``mu (w - w0)`` to every step. SCAFFOLD (Karimireddy et al. 2020,
algorithm 1, option II) adds ``c - c_i`` and ends a round of K steps with ``c_i <- c_i - c + u/K``,
``u`` being the sum of the K corrected gradients, which is the update that is sent. Device and
server can therefore compute the change of ``c_i`` from what is sent anyway.

Privacy. With unit ``example`` and ``local`` trust both additions are functions of public values and
of gradients that were noised before (:meth:`LocalRule.corrected` is applied after the noise), so a
step releases what it released without them: the same event. With unit ``client`` the whole update
is bounded afterwards, whatever was added to it, and depends on no other client's state.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reticent.core.personal import Split
from reticent.core.plan import Local
from reticent.core.update import Vector

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LocalRule:
    """What one round adds to each of its noised gradients; by default nothing at all.

    Attributes:
        drift: ``c - c_i``, float64 ``(size,)``; None without control variates.
        pull: mu of each coordinate, float64 ``(size,)``, 0 for personal ones, which have no common
            model to be pulled to; None without a proximal term.
        anchor: The model that the round starts from.
    """

    drift: Floats | None = None
    pull: Floats | None = None
    anchor: Vector | None = None

    def corrected(self, gradient: NDArray[np.floating], weights: Vector) -> NDArray[np.floating]:
        """Return a step's noised gradient at ``weights`` with what the rule adds."""
        if self.drift is not None:
            gradient = gradient + self.drift
        if self.pull is not None and self.anchor is not None:
            gradient = gradient + self.pull * (weights.astype(np.float64) - self.anchor)
        return gradient


PLAIN = LocalRule()
"""Local steps follow the gradient alone."""


def rule_of(local: Local, split: Split, start: Vector, control: Vector, own: Vector) -> LocalRule:
    """Return the rule of one round.

    Args:
        local: The plan's section.
        split: Which coordinates travel.
        start: The model that the round starts from, personal layers included.
        control: The server's control variate, float32 ``(travels.size,)``; not used without them.
        own: The device's.
    """
    if local.scaffold:
        return LocalRule(drift=split.spread(control.astype(np.float64) - own))
    if local.proximal:
        pull = split.spread(np.full(split.travels.size, local.proximal))
        return LocalRule(pull=pull, anchor=start)
    return PLAIN


def variate_after(own: Vector, control: Vector, sent: NDArray[np.floating], steps: int) -> Vector:
    """Return a device's control variate after a round: ``c_i - c + u / K``.

    Args:
        own: Its control variate before.
        control: The server's, as it was received.
        sent: The update as the server reads it: decoded, and bounded where the server bounds it.
        steps: Local steps of a round.
    """
    after = own - control.astype(np.float64) + sent.astype(np.float64) / steps
    with np.errstate(over="ignore", invalid="ignore"):
        return after.astype(np.float32)
