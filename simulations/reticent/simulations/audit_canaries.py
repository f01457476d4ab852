"""Canaries: examples whose clipped gradient is known, in the shape of a plan's own student."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from reticent.core.errors import PlanError
from reticent.core.plan import TaskSection
from reticent.core.seeds import numpy_generator
from reticent.core.tasks import Examples
from reticent.core.update import Layout

Floats = NDArray[np.float64]

REACH = 10.0
"""Norm of a canary's own gradient or update over the clip: a mechanism that does not clip shows."""

HOLDER = 0
"""The client that holds the canaries; the others hold nothing and add their noise."""

_CLASSES = 2
_COEFFICIENT = 1 - 1 / _CLASSES


@dataclass(frozen=True, eq=False)
class Canaries:
    """Orthonormal directions, each with a fair coin that decides whether it is in the data.

    Direction i has equal magnitudes and random signs on coordinates of its own, so that noise which
    is independent between coordinates is independent between canaries.

    Attributes:
        size: Length of the vectors.
        coins: Whether each canary is included, bool ``(m,)``.
        owner: ``(m, k)``: the k coordinates of each canary; no two share one.
        signs: ``(m, k)``: +1 or -1.
    """

    size: int
    coins: NDArray[np.bool_]
    owner: NDArray[np.int64]
    signs: Floats

    @staticmethod
    def draw(size: int, count: int, seed: int) -> Canaries:
        """Draw canaries on at most half of ``size`` coordinates; the others stay pure noise.

        Raises:
            PlanError: If there is no room for ``count`` of them.
        """
        if not 1 <= count <= size // 2:
            raise PlanError(
                f"{count} canaries: must be at least 1 and at most {size // 2}, half of the "
                "student's parameters"
            )
        generator = numpy_generator(seed, "audit", "canaries")
        width = min(size // 2 // count, 64)
        owner = generator.permutation(size)[: count * width].reshape(count, width)
        signs = np.where(generator.random(owner.shape) < 0.5, -1.0, 1.0)
        return Canaries(size, generator.random(count) < 0.5, owner, signs)

    @cached_property
    def free(self) -> NDArray[np.int64]:
        """Coordinates that no canary touches, ascending."""
        return np.setdiff1d(np.arange(self.size), self.owner)

    def project(self, vector: Floats) -> Floats:
        """Return the component of ``vector`` along each canary, float64 ``(m,)``."""
        return (vector[self.owner] * self.signs).sum(axis=1) / self.owner.shape[1] ** 0.5

    def vectors(self, which: NDArray[np.int64], length: NDArray[np.float64]) -> Floats:
        """Return the directions of ``which`` times ``length``, float64 ``(len(which), size)``."""
        out = np.zeros((len(which), self.size), dtype=np.float64)
        values = self.signs[which] * (length[:, None] / self.owner.shape[1] ** 0.5)
        np.put_along_axis(out, self.owner[which], values, axis=1)
        return out


class LinearStudent(nn.Module):
    """A student in the shape of another one whose per-example gradient is minus half its input.

    Every parameter tensor of the other student is a row of weights here; an input has one number
    for each weight, and the first of two logits is their inner product, the second zero. At zero
    weights the gradient of the cross-entropy of label 0 is minus half the input, exactly.
    """

    def __init__(self, sizes: tuple[int, ...]) -> None:
        """Make one row for each of ``sizes``."""
        super().__init__()
        self._sizes = list(sizes)
        self.rows = nn.ModuleList(nn.Linear(size, 1, bias=False) for size in sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(n, total)`` to logits ``(n, 2)``."""
        parts = x.split(self._sizes, dim=1)
        score = torch.stack([row(part) for row, part in zip(self.rows, parts, strict=True)]).sum(0)
        return torch.cat([score, torch.zeros_like(score)], dim=1)


class CanaryTask:
    """A task whose private examples are canaries and whose student is a :class:`LinearStudent`.

    Client :data:`HOLDER` holds the canaries whose coins say so (and, under replace-one, the
    opposites of all others); every other client holds nothing. A canary's gradient at the broadcast
    model is its direction with a norm of :data:`REACH` times the clip.
    """

    name, classes, nominal_examples = "canaries", _CLASSES, 1

    def __init__(
        self, section: TaskSection, layout: Layout, canaries: Canaries, clip: float, replace: bool
    ) -> None:
        """Make the task for vectors of ``layout``."""
        self.clients, self.input_shape = section.clients, (layout.total,)
        self._layout, self._canaries = layout, canaries
        self._clip, self._replace = clip, replace

    def client(self, index: int) -> Examples:
        """Return the canaries that are in the data, or nothing."""
        if index == HOLDER:
            return self._held
        return Examples(torch.zeros(0, self._layout.total), torch.zeros(0, dtype=torch.int64))

    def forget(self) -> None:
        """Free the memory of the canaries; they are made again when asked for."""
        self.__dict__.pop("_held", None)

    @cached_property
    def _held(self) -> Examples:
        coins = self._canaries.coins
        which = np.arange(len(coins)) if self._replace else np.flatnonzero(coins)
        # Descent moves along minus the gradient, and the gradient is minus half the input.
        length = np.where(coins[which], -1.0, 1.0) * REACH * self._clip / _COEFFICIENT
        inputs = np.zeros((len(which), self._layout.total), dtype=np.float32)
        inputs[:, self._layout.index] = self._canaries.vectors(which, length)
        return Examples(torch.from_numpy(inputs), torch.zeros(len(which), dtype=torch.int64))

    def public(self) -> Examples:
        """Return nothing: an audit trains nothing on public data."""
        return self.client(HOLDER + 1)

    def test(self) -> Examples:
        """Return nothing."""
        return self.public()

    def teacher(self) -> nn.Module:
        """Return a student: there is no other model."""
        return self.student("")

    def student(self, model: str) -> nn.Module:
        """Return a student; the name of the model does not matter."""
        return LinearStudent(self._layout.sizes)


_TASKS: dict[int, CanaryTask] = {}

TASK = f"{__name__}:canary_task"
"""What the plan of an audit names as its task."""


@contextmanager
def registered(seed: int, task: CanaryTask) -> Iterator[None]:
    """Let plans of ``seed`` that name :data:`TASK` load ``task``, in this process."""
    _TASKS[seed] = task
    try:
        yield
    finally:
        del _TASKS[seed]
        task.forget()


def canary_task(section: TaskSection, seed: int) -> CanaryTask:
    """Return the task registered under ``seed``; what a plan's task name calls.

    Raises:
        PlanError: If no audit is under way.
    """
    if seed not in _TASKS:
        raise PlanError(f"task {TASK} exists only while `reticent audit` runs")
    return _TASKS[seed]
