"""The server's optimizer and the average of its models, on flat float64 vectors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from reticent.core.plan import Optimizer
from reticent.core.update import Vector

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ServerState:
    """Everything a round changes: the unit that the journal commits.

    Attributes:
        round: Number of applied rounds.
        weights: The model, float32 ``(size,)``.
        average: Exponential moving average of the models, float32 ``(size,)``.
        first: First moment (momentum), float64.
        second: Second moment, float64; zeros with ``sgd``, and before the first round.
        clip: With unit ``client`` the bound of the next round's updates; None otherwise.
        held: Where the plan sends changes, the model that devices trained on last, float32
            ``(size,)``; None otherwise, and before the first round.
        control: With control variates the federation's, float64 ``(size,)``; None otherwise, and
            before the first round, when it is zero.
    """

    round: int
    weights: Vector
    average: Vector
    first: Floats
    second: Floats
    clip: float | None = None
    held: Vector | None = None
    control: Floats | None = None

    @staticmethod
    def begin(weights: Vector, clip: float | None = None) -> ServerState:
        """Return the state before the first round, with the first bound of clients' updates."""
        zeros = np.zeros(weights.shape, dtype=np.float64)
        return ServerState(0, weights, weights.copy(), zeros, zeros.copy(), clip)


@np.errstate(over="ignore", invalid="ignore")
def apply_round(
    state: ServerState, gradient: Floats, optimizer: Optimizer, decay: float
) -> ServerState:
    """Return the state after one step along the averaged pseudo-gradient.

    SGD with heavy-ball momentum as in torch.optim.SGD; Adam with bias correction (Kingma and Ba
    2015); Yogi and Adagrad without, from a second moment of tau**2 (Reddi et al. 2021, algorithm 2,
    whose Adam has no bias correction either). The average starts as the plain mean of the first
    models, ``min(decay, (1 + t) / (10 + t))``, so that the starting point is soon forgotten. A step
    that is too long gives a model that is not finite, which the caller must not commit.
    """
    step = state.round + 1
    first, second, direction = _direction(state, gradient, optimizer, step)
    weights = (state.weights - optimizer.learning_rate * direction).astype(np.float32)
    keep = min(decay, (1 + step) / (10 + step)) if decay else 0.0
    average = (keep * state.average.astype(np.float64) + (1 - keep) * weights).astype(np.float32)
    return replace(state, round=step, weights=weights, average=average, first=first, second=second)


def _direction(
    state: ServerState, gradient: Floats, optimizer: Optimizer, step: int
) -> tuple[Floats, Floats, Floats]:
    beta = optimizer.momentum
    if optimizer.kind == "sgd":
        first = beta * state.first + gradient
        return first, state.second, first
    first = beta * state.first + (1 - beta) * gradient
    second = _second(state, gradient, optimizer)
    if optimizer.kind != "adam":
        return first, second, first / (np.sqrt(second) + optimizer.adaptivity)
    corrected = np.sqrt(second / (1 - optimizer.second_momentum**step)) + optimizer.adaptivity
    return first, second, first / (1 - beta**step) / corrected


def _second(state: ServerState, gradient: Floats, optimizer: Optimizer) -> Floats:
    """Return the second moment after ``gradient``; its first value is tau**2, Adam's zero."""
    beta, square = optimizer.second_momentum, gradient**2
    if optimizer.kind == "adam":
        return beta * state.second + (1 - beta) * square
    second = state.second if state.round else state.second + optimizer.adaptivity**2
    if optimizer.kind == "adagrad":
        return second + square
    return second - (1 - beta) * square * np.sign(second - square)


class Accumulator:
    """A running sum of vectors whose result does not depend on their order, in constant memory.

    Each coordinate is a double-double (error-free transformation, Knuth's TwoSum), about 106 bits,
    so that sums of float32 vectors agree to the last float64 bit in whatever order they arrive.
    """

    def __init__(self, size: int) -> None:
        """Start at zero with vectors of length ``size``."""
        self._high: Floats = np.zeros(size, dtype=np.float64)
        self._low: Floats = np.zeros(size, dtype=np.float64)
        self.count = 0

    def add(self, vector: Vector | Floats) -> None:
        """Add one float32 or float64 vector ``(size,)``."""
        value = vector.astype(np.float64)
        total = self._high + value
        rest = total - self._high
        value -= rest
        np.subtract(total, rest, out=rest)
        np.subtract(self._high, rest, out=rest)
        rest += value
        self._low += rest  # (high - (total - rest)) + (value - rest)
        self._high = total
        self.count += 1

    def merge(self, other: Accumulator) -> None:
        """Add everything that ``other`` holds: the same sum as if it had been added here."""
        self.add(other._high)
        self._low += other._low
        self.count += other.count - 1

    @property
    def parts(self) -> tuple[Floats, Floats]:
        """The sum unevaluated, float64 ``(size,)`` each: rounded, and what rounding left out."""
        return self._high, self._low

    @staticmethod
    def of(high: Floats, low: Floats, count: int) -> Accumulator:
        """Return the accumulator of ``count`` vectors that had these :attr:`parts`."""
        made = Accumulator(len(high))
        made._high, made._low, made.count = high.copy(), low.copy(), count
        return made

    def total(self) -> Floats:
        """Return the sum of what was added, float64 ``(size,)``; zeros when nothing was."""
        return self._high + self._low

    def mean(self) -> Floats:
        """Return the mean of what was added, float64 ``(size,)``."""
        return self.total() / self.count
