"""One client's side of local steps: its batches, its noise, and what a step does to a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from reticent.core.seeds import layers_draw
from reticent.core.tasks import Examples
from reticent.core.update import Vector
from reticent.privacy.randomness import Randomness

from .local_rules import PLAIN, LocalRule


@dataclass(frozen=True)
class NoisyStep:
    """Public constants of one local step.

    Attributes:
        clip: L2 bound of one example's gradient; None when single gradients are not bounded:
            privacy is off, or the whole update is bounded afterwards (unit ``client``).
        noise: Standard deviation of the noise added to each coordinate of the clipped sum.
        denominator: What the noised sum is divided by.
    """

    clip: float | None
    noise: float
    denominator: float


class Client(NamedTuple):
    """What one client trains on, and what it draws from.

    Attributes:
        examples: All of its private examples.
        randomness: Source of batches and noise.
        path: Names its streams: run, client and round.
        rule: What is added to each of its noised gradients.
        start: The model that it starts from, if not from the common one.
    """

    examples: Examples
    randomness: Randomness
    path: tuple[str | int, ...]
    rule: LocalRule = PLAIN
    start: Vector | None = None

    def begins(self, common: Vector) -> Vector:
        """Return the model that the client starts from."""
        return common if self.start is None else self.start

    def batch(self, index: int, rate: float) -> Examples:
        """Draw the Poisson batch of step ``index`` at ``rate``."""
        draws = self.randomness.stream("batch", *self.path, index).uniform(
            len(self.examples.labels)
        )
        chosen = torch.from_numpy(np.flatnonzero(draws < rate))
        inputs, labels = self.examples
        return Examples(inputs.index_select(0, chosen), labels.index_select(0, chosen))

    def noised(
        self, gradient: NDArray[np.float32], index: int, step: NoisyStep
    ) -> NDArray[np.floating]:
        """Return the gradient sum of step ``index`` with its noise, divided.

        It has the precision of what is drawn, and float64 without noise.
        """
        if step.noise > 0:
            noised = self.randomness.stream("noise", *self.path, index).normal(len(gradient))
            noised *= step.noise
            noised += gradient
        else:
            noised = gradient.astype(np.float64)
        noised /= step.denominator
        return noised


def drawing(clients: Sequence[Client], device: str | None = None) -> AbstractContextManager[object]:
    """Let layers that draw in training, such as dropout, do so from the clients' own randomness.

    What they draw is then a function of who is trained together: it comes from the first one's
    stream ``layers``. With seeded randomness that is the same whoever trains them, and when; on a
    real device it is new each time. No promise of privacy depends on it.

    Args:
        clients: At least one.
        device: Name of the torch device that computes gradients; None for the CPU.
    """
    first = clients[0]
    return layers_draw(first.randomness.stream("layers", *first.path).bytes(8), device or "cpu")
