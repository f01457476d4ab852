"""The work of ``round.py``, the same for every contender: data, models, local steps, accuracy.

Needs NumPy and torch alone, so that peers' environments can import it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

CLASSES, SIDE, TESTED = 10, 28, 2000
STEPS, BATCH, NOMINAL = 4, 10, 35
"""Local steps of a round, and expected and nominal numbers of examples: about one epoch."""

PATTERNS = 1.0 * np.random.default_rng(0).standard_normal((CLASSES, 1, SIDE, SIDE), np.float32)
RATE, CLIP, SIGMA, LEARNING_RATE = BATCH / NOMINAL, 1.0, 0.5, 0.3


class Examples(NamedTuple):
    """Inputs float32 ``(n, 1, 28, 28)`` and labels int64 ``(n,)``."""

    inputs: torch.Tensor
    labels: torch.Tensor


def drawn(count: int, key: int) -> Examples:
    """Return noisy copies of ten fixed patterns."""
    rng = np.random.default_rng(key + 1)
    labels = rng.integers(CLASSES, size=count)
    inputs = rng.standard_normal((count, 1, SIDE, SIDE), dtype=np.float32)
    inputs += PATTERNS[labels]
    return Examples(torch.from_numpy(inputs), torch.from_numpy(labels))


def client(index: int) -> Examples:
    """Return a client's 20 to 50 examples."""
    return drawn(20 + index * 7919 % 31, index + 1_000_000)


def test() -> Examples:
    """Return held-out examples."""
    return drawn(TESTED, 0)


def model_of(kind: str) -> nn.Module:
    """Return ``mlp`` (101,770 parameters) or ``cnn`` (105,962), the same each time.

    ``mlp-W`` has W instead of 128 hidden units, and 795 W + 10 parameters.
    """
    name, _, width = kind.partition("-")
    hidden = int(width or 128)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "mlp":
            return nn.Sequential(
                nn.Flatten(), nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES)
            )
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.GroupNorm(4, 16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.GroupNorm(4, 32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 49, 64),
            nn.ReLU(),
            nn.Linear(64, CLASSES),
        )


def accuracy(model: nn.Module) -> float:
    """Return the share of test examples that ``model`` gets right."""
    found = test()
    with torch.no_grad():
        return float((model(found.inputs).argmax(1) == found.labels).double().mean())


def cohorts(population: int, cohort: int, rounds: int) -> list[list[int]]:
    """Return the clients of each round."""
    rng = np.random.default_rng(0)
    return [rng.choice(population, cohort, replace=False).tolist() for _ in range(rounds)]


class _Task:
    """The same data as a task of ours."""

    name, classes, input_shape, nominal_examples = "round", CLASSES, (1, SIDE, SIDE), NOMINAL
    public_weights = True  # drawn from a fixed seed, so that all contenders begin alike

    def __init__(self, clients: int) -> None:
        self.clients = clients

    def public(self) -> Any:
        return _examples(drawn(20, 1))

    def client(self, index: int) -> Any:
        return _examples(client(index))

    def test(self) -> Any:
        return _examples(test())

    def teacher(self) -> nn.Module:
        return model_of("mlp")

    def student(self, model: str) -> nn.Module:
        return model_of(model)


def _examples(found: Examples) -> Any:
    from reticent.core.tasks import Examples as Ours

    return Ours(*found)


def task(section: Any, seed: int) -> Any:
    """Return the task; a plan names it with ``task.name = "round_work:task"``."""
    return _Task(section.clients)
