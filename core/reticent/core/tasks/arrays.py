"""A task made of a user's own arrays."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from .. import models
from ..errors import DataError
from ..plan import TaskSection
from .base import Examples
from .split import Split, check_section
from .split import nominal_examples as shared_out

Shape = tuple[int, ...]


class ArrayTask:
    """A :class:`~reticent.core.tasks.base.Task` over arrays in memory.

    Of the training arrays, ``section.public_examples`` become public (drawn balanced over labels)
    and the rest are dealt to the clients as ``section.partition`` says.

    Args:
        section: The plan's task section.
        seed: The plan's seed.
        inputs: Training inputs, ``(n, *input_shape)``, finite numbers, scaled as the models expect.
        labels: Training labels, ``(n,)``, integers 0 to ``classes - 1``.
        test_inputs: Held-out inputs of the same shape.
        test_labels: Held-out labels.
        classes: Number of classes.
        teacher: Makes a teacher from ``(input_shape, classes)``.
        student: Makes a student from ``(model, input_shape, classes)``, where ``model`` is the
            plan's ``student.model``.
        public_weights: Says that no private data went into weights which these models begin with.
            Models that do not begin at random are refused without it, unless the plan declares
            how their weights were trained.
        nominal_examples: How many examples a client has, as a public constant; at least 1. By
            default ``section.partition.examples_per_client``, else the private part of the pool
            shared out evenly: the size of the pool is then told to everybody, since updates are
            divided by this number. A device whose arrays are its own data must give it.

    A split depends on the whole pool: who has which example, and which are public, is dealt anew
    if one is added. Neighbours, in what privacy promises, differ after the deal.

    Raises:
        DataError: If the arrays do not fit together or cannot serve the section.
    """

    def __init__(
        self,
        section: TaskSection,
        seed: int,
        *,
        inputs: ArrayLike,
        labels: ArrayLike,
        test_inputs: ArrayLike,
        test_labels: ArrayLike,
        classes: int,
        teacher: Callable[[Shape, int], nn.Module] = models.teacher,
        student: Callable[[str, Shape, int], nn.Module] = models.student,
        public_weights: bool = False,
        nominal_examples: int | None = None,
    ) -> None:
        """Check and keep the arrays."""
        if nominal_examples is not None and nominal_examples < 1:
            raise DataError(f"nominal_examples={nominal_examples}: must be at least 1")
        self._inputs, self._labels = _checked("training", inputs, labels, classes)
        self._test = _checked("test", test_inputs, test_labels, classes)
        if self._test[0].shape[1:] != self._inputs.shape[1:]:
            raise DataError(
                f"{section.name}: test inputs have shape {self._test[0].shape[1:]}: must be "
                f"{self._inputs.shape[1:]}, as the training inputs"
            )
        check_section(len(self._labels), classes, section)
        self.name: str = section.name
        self.public_weights = public_weights
        self.classes: int = classes
        self.input_shape: Shape = self._inputs.shape[1:]
        self.clients: int = section.clients
        if nominal_examples is None:
            nominal_examples = shared_out(len(self._labels), section)
        self.nominal_examples: int = nominal_examples
        self._section, self._seed = section, seed
        self._teacher, self._student = teacher, student

    @cached_property
    def split(self) -> Split:
        """Positions in the training arrays of the public examples and of each client's."""
        return Split(self._labels, self._section, self._seed)

    def public(self) -> Examples:
        """Return the public examples."""
        return _examples(self._inputs[self.split.public], self._labels[self.split.public])

    def client(self, index: int) -> Examples:
        """Return the private examples of client ``index``.

        Raises:
            DataError: If there is no such client.
        """
        where = self.split.client(index)
        return _examples(self._inputs[where], self._labels[where])

    def test(self) -> Examples:
        """Return the held-out examples."""
        inputs, labels = self._test
        return _examples(inputs.copy(), labels.copy())

    def teacher(self) -> nn.Module:
        """Return a new teacher."""
        return self._teacher(self.input_shape, self.classes)

    def student(self, model: str) -> nn.Module:
        """Return a new student of the named kind."""
        return self._student(model, self.input_shape, self.classes)


def _examples(inputs: NDArray[np.float32], labels: NDArray[np.int64]) -> Examples:
    return Examples(torch.from_numpy(inputs), torch.from_numpy(labels))


def _checked(
    part: str, inputs: ArrayLike, labels: ArrayLike, classes: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    values: NDArray[Any] = np.asarray(inputs)
    marks: NDArray[Any] = np.asarray(labels)
    if marks.ndim != 1 or not np.issubdtype(marks.dtype, np.integer) or not len(marks):
        raise DataError(
            f"{part} labels are {marks.dtype} of shape {marks.shape}: must be integers of shape "
            "(n,), n at least 1"
        )
    if values.ndim < 2 or len(values) != len(marks) or values.dtype.kind not in "fiub":
        raise DataError(
            f"{part} inputs are {values.dtype} of shape {values.shape}: must be numbers of shape "
            f"({len(marks)}, ...), one row a label"
        )
    if marks.min() < 0 or marks.max() >= classes:
        raise DataError(
            f"{part} labels go from {marks.min()} to {marks.max()}: must be 0 to {classes - 1}"
        )
    with np.errstate(over="ignore"):  # what overflows float32 is reported as not finite below
        single = values.astype(np.float32)
    if not np.isfinite(single).all():
        raise DataError(f"{part} inputs hold NaN or infinity in float32: must be finite")
    return single, marks.astype(np.int64)
