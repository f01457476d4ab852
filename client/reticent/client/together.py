"""Local steps of several clients in common passes, and when that is done.

Clients that share their weights, as in a round of one bounded step, go through common passes at
these (:class:`~reticent.privacy.clipping.ClippedGradients`). After a step, and with personal layers
before it, every client has weights of its own: passes are then common for what treats all examples
alike, and the matrix products and convolutions are each client's
(:class:`~reticent.privacy.clipping.OwnGradients`). Students that are no plain chain, or recurrent,
go through :class:`~reticent.privacy.clipping.FunctionalGradients`, where every example has a copy
of its client's weights.

Batches, noise, local rules and the arithmetic of a step are those of a client that is trained
alone, by the same code; only its gradients are rounded to float32 in another order. Over several
steps of quantization-aware training that can put a weight on the other side of a rounding boundary,
which moves it by one quantization step, and what follows from there by as little as that does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from reticent.core.plan import Federation, Plan
from reticent.core.tasks import Task
from reticent.core.update import Vector
from reticent.privacy.clipping import FunctionalGradients, Loss, OwnGradients, own_chain_of

from .accelerated import unaccelerated
from .steps import Client, NoisyStep

MOST_EXAMPLES, MOST_PARAMETERS = 16, 2**17
"""Largest expected batch of a step, and largest student, of clients that are trained together on
weights of their own. What passes share is the cost of starting them; where batches are larger, or
nearly all the time goes into moving weights, there is little of it (``benchmarks/together.py``)."""

MOST_COPIED, MOST_PLAIN = 2**17, 4
"""Most numbers in the copies of a student's weights that the expected batch of a step takes, where
such a student's gradients are bounded or not, and its largest expected batch where they are not:
beyond, moving the copies, or filling up batches, takes what common passes save."""

_EXACT = "privacy is off, and the run is then plain federated averaging to the bit"
_HOOKED = "the student has layers whose gradients of single examples only Opacus' hooks know"


def shares_weights(plan: Plan) -> bool:
    """Return whether all clients compute bounded gradients at the broadcast model only."""
    federation, private = plan.federation, plan.private
    bounded = private is not None and private.unit == "example"
    return bounded and federation.steps_per_round == 1 and not federation.local.personal


def expected_batch(plan: Plan, task: Task) -> float:
    """Return how many examples a step draws on average, by public constants alone."""
    return plan.federation.sampling_rate * task.nominal_examples


def reason_alone(
    plan: Plan, model: nn.Module, shape: tuple[int, ...], batch: float, hooked: bool
) -> str | None:
    """Return why clients are trained one by one; None if in common passes. Reads no data.

    Args:
        plan: The plan.
        model: Its student.
        shape: Of one example.
        batch: As :func:`expected_batch` gives it.
        hooked: Whether gradients of single examples at common weights are known to Opacus' hooks
            only.
    """
    if shares_weights(plan):
        return _HOOKED if hooked else None
    if plan.private is None:
        return _EXACT
    found = _costly(plan, model, shape, batch)
    return found and f"each has weights of its own, and {found}"


def _costly(plan: Plan, model: nn.Module, shape: tuple[int, ...], batch: float) -> str | None:
    """Return why common passes at weights of one's own cannot be had, or would not pay."""
    layers, size = own_chain_of(model), sum(p.numel() for p in model.parameters())
    plain = plan.private is None or plan.private.unit == "client"
    if layers is None:
        return _costly_copies(model, size, batch, plain) or unaccelerated(plan, model, shape)
    if batch > MOST_EXAMPLES:
        return f"a step's expected batch of {batch:g} examples is above {MOST_EXAMPLES}"
    if size > MOST_PARAMETERS:
        return f"the student's {size:,} parameters are more than {MOST_PARAMETERS:,}"
    if plain and not any(isinstance(layer, nn.Conv2d) for layer in layers):
        return "gradients are not bounded, in a student without convolutions"
    return None


def _costly_copies(model: nn.Module, size: int, batch: float, plain: bool) -> str | None:
    """Return why copies of the weights of a student that is no known chain would not pay."""
    if plain and batch > MOST_PLAIN:
        return f"a step's expected batch of {batch:g} examples is above {MOST_PLAIN}"
    if batch * size > MOST_COPIED:
        return (
            f"a step's expected batch of {batch:g} examples with {size:,} parameters each is above "
            f"{MOST_COPIED:,} numbers"
        )
    if plain and any(isinstance(layer, nn.LSTM) for layer in model.modules()):
        return "gradients are not bounded, which torch computes faster in the LSTM of one client"
    return None


@dataclass(frozen=True)
class Together:
    """Trains clients with weights of their own in common passes.

    Attributes:
        own: What computes their gradient sums.
        federation: The plan's section.
        loss: The sum of the examples' losses.
        rounding: What weights go through before they are used, as ``OwnGradients.sums`` takes it.
    """

    own: OwnGradients | FunctionalGradients
    federation: Federation
    loss: Loss
    rounding: Callable[[list[torch.Tensor]], list[torch.Tensor]]

    def pseudo_gradients(
        self, start: Vector, clients: Sequence[Client], step: NoisyStep
    ) -> list[Vector]:
        """Return the sum of each client's noised steps, float32 ``(size,)`` each.

        Args:
            start: The broadcast parameters, float32 ``(size,)``.
            clients: What each trains on, and from.
            step: Public constants.
        """
        weights = np.stack([client.begins(start) for client in clients])
        total: list[NDArray[np.floating]] = []
        for index in range(self.federation.steps_per_round):
            sums = self._sums(weights, clients, index, step.clip)
            for i, (client, own) in enumerate(zip(clients, weights, strict=True)):
                moved = client.rule.corrected(client.noised(sums[i], index, step), own)
                if index == 0:
                    total.append(moved.copy())
                else:
                    total[i] += moved
                moved *= self.federation.learning_rate
                np.subtract(own, moved, out=own, casting="same_kind")
        return [row.astype(np.float32, copy=False) for row in total]

    def _sums(
        self,
        weights: NDArray[np.float32],
        clients: Sequence[Client],
        index: int,
        clip: float | None,
    ) -> NDArray[np.float32]:
        """Return each client's gradient sum over its batch of step ``index``."""
        batches = [client.batch(index, self.federation.sampling_rate) for client in clients]
        inputs = torch.cat([batch.inputs for batch in batches])
        labels = torch.cat([batch.labels for batch in batches])
        counts = [len(batch.labels) for batch in batches]
        if not len(labels):
            return np.zeros(weights.shape, dtype=np.float32)
        return self.own.sums(weights, inputs, labels, counts, self.loss, clip, self.rounding)
