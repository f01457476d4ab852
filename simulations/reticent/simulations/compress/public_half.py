"""A task without private data: its public examples, some to train on and the rest to judge by."""

from __future__ import annotations

from functools import cached_property
from typing import NoReturn

import numpy as np
import torch
from torch import nn

from reticent.core.errors import DataError
from reticent.core.tasks import Examples, Task
from reticent.core.tasks.split import balanced_order

HELD_OUT = 0.2


class PublicHalf:
    """The public examples of ``task``; a :class:`~reticent.core.tasks.base.Task`.

    Guarantee: nothing here reads a private example or the test part of ``task``. ``client`` always
    raises; ``test`` is a fifth of the public examples, balanced over labels, that ``public`` leaves
    out.
    """

    def __init__(self, task: Task, seed: int) -> None:
        """Split the public examples.

        Raises:
            DataError: If there are fewer than ten.
        """
        self.name, self.classes = task.name, task.classes
        self.input_shape, self.clients = task.input_shape, task.clients
        self.nominal_examples = task.nominal_examples
        self.public_weights = bool(getattr(task, "public_weights", False))
        self._task, self._seed = task, seed
        count = len(task.public().labels)
        if count < 10:
            raise DataError(
                f"task {task.name}: has {count} public examples: a search trains on some and "
                "judges by the rest, and needs at least 10"
            )

    @cached_property
    def _parts(self) -> tuple[Examples, Examples]:
        examples = self._task.public()
        order = balanced_order(examples.labels.numpy(), self._seed)
        cut = len(order) - max(1, round(HELD_OUT * len(order)))
        parts = [torch.from_numpy(np.sort(part)) for part in (order[:cut], order[cut:])]
        trained, held = (Examples(examples.inputs[p], examples.labels[p]) for p in parts)
        return trained, held

    def public(self) -> Examples:
        """Return the part to train on."""
        return self._parts[0]

    def test(self) -> Examples:
        """Return the part to judge by."""
        return self._parts[1]

    def client(self, index: int) -> NoReturn:
        """Raise DataError: a search reads no private data."""
        raise DataError(f"client {index}: a search reads no private data")

    def teacher(self) -> nn.Module:
        """Return a new teacher."""
        return self._task.teacher()

    def student(self, model: str) -> nn.Module:
        """Return a new student."""
        return self._task.student(model)
