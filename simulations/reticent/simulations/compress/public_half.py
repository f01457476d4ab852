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
    raises; ``test`` is a fifth of the labelled public examples, balanced over labels, that
    ``public`` leaves out.

    Attributes:
        labels: How many of the examples to train on keep their labels, the first ones; None: all.
    """

    def __init__(self, task: Task, seed: int, labels: int | None = None) -> None:
        """Split the public examples, of which the first ``labels`` have labels; None: all have.

        Raises:
            DataError: If fewer than ten have.
        """
        self.name, self.classes = task.name, task.classes
        self.input_shape, self.clients = task.input_shape, task.clients
        self.nominal_examples = task.nominal_examples
        self.public_weights = bool(getattr(task, "public_weights", False))
        self._task, self._seed = task, seed
        count = len(task.public().labels)
        self._labelled = count if labels is None else min(labels, count)
        if self._labelled < 10:
            raise DataError(
                f"task {task.name}: has {self._labelled} public examples with labels: a search "
                "trains on some and judges by the rest, and needs at least 10"
            )
        self._held = max(1, round(HELD_OUT * self._labelled))
        self.labels = None if labels is None else self._labelled - self._held

    @cached_property
    def _parts(self) -> tuple[Examples, Examples]:
        examples = self._task.public()
        order = balanced_order(examples.labels[: self._labelled].numpy(), self._seed)
        cut, others = self._labelled - self._held, np.arange(self._labelled, len(examples.labels))
        first = np.concatenate([np.sort(order[:cut]), others])
        parts = [torch.from_numpy(part) for part in (first, np.sort(order[cut:]))]
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
