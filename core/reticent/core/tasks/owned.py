"""Tasks whose examples belong to people: windows of a sensor, sequences of a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..plan import TaskSection
from .base import Examples
from .people import People, PeopleSplit


class OwnedArrays(NamedTuple):
    """Raw inputs ``(n, ...)``, labels ``(n,)`` and owners ``(n,)``; test owners are held out."""

    inputs: NDArray[Any]
    labels: NDArray[np.integer]
    owners: NDArray[np.integer]
    test_inputs: NDArray[Any]
    test_labels: NDArray[np.integer]


@dataclass(frozen=True)
class OwnedSource:
    """What is publicly known of a data set of people, and how to load it.

    Attributes:
        name: Name in a plan.
        classes: Number of labels.
        input_shape: Shape of one example.
        people: Those of the training part.
        preprocessing: How raw data become inputs, for the artifact's manifest.
        load: Returns the arrays; called when data are first used.
        inputs: Makes float32 ``(n, *input_shape)`` of raw inputs, by public constants alone.
        teacher: Makes a teacher from ``(input_shape, classes)``.
        student: Makes a student from ``(model, input_shape, classes)``.
    """

    name: str
    classes: int
    input_shape: tuple[int, ...]
    people: People
    preprocessing: str
    load: Callable[[], OwnedArrays]
    inputs: Callable[[NDArray[Any]], NDArray[np.float32]]
    teacher: Callable[[tuple[int, ...], int], nn.Module]
    student: Callable[[str, tuple[int, ...], int], nn.Module]


class OwnedTask:
    """A :class:`~reticent.core.tasks.base.Task` over people; see :class:`PeopleSplit`.

    The test part is other people's, always the same. Nothing is read until data are first asked
    for.

    Args:
        source: The data set.
        section: The plan's task section.
        seed: The plan's seed; it moves the public part and the clients' parts.

    Raises:
        DataError: If the data set cannot serve the section.
    """

    def __init__(self, source: OwnedSource, section: TaskSection, seed: int) -> None:
        """Check that the plan fits the data set, without reading it."""
        source.people.check(section)
        self.name: str = source.name
        self.classes: int = source.classes
        self.input_shape: tuple[int, ...] = source.input_shape
        self.clients: int = section.clients
        self.nominal_examples: int = source.people.nominal_examples(section)
        self.preprocessing: str = source.preprocessing
        self._source, self._section, self._seed = source, section, seed

    @property
    def _arrays(self) -> OwnedArrays:
        # Cached by the source, once a process and not once a task, and not pickled with a task.
        return self._source.load()

    @cached_property
    def split(self) -> PeopleSplit:
        """Positions in the training part of the public examples and of each client's."""
        arrays = self._arrays
        people = self._source.people
        return PeopleSplit(arrays.labels, arrays.owners, people, self._section, self._seed)

    def _examples(self, raw: NDArray[Any], labels: NDArray[np.integer]) -> Examples:
        inputs = torch.from_numpy(self._source.inputs(raw))
        return Examples(inputs, torch.from_numpy(labels.astype(np.int64)))

    def public(self) -> Examples:
        """Return the public examples, of public people alone."""
        where, arrays = self.split.public, self._arrays
        return self._examples(arrays.inputs[where], arrays.labels[where])

    def client(self, index: int) -> Examples:
        """Return the private examples of client ``index``.

        Raises:
            DataError: If there is no such client.
        """
        where, arrays = self.split.client(index), self._arrays
        return self._examples(arrays.inputs[where], arrays.labels[where])

    def test(self) -> Examples:
        """Return the examples of the people that are held out."""
        return self._examples(self._arrays.test_inputs, self._arrays.test_labels)

    def teacher(self) -> nn.Module:
        """Return a new teacher."""
        return self._source.teacher(self.input_shape, self.classes)

    def student(self, model: str) -> nn.Module:
        """Return a new student of the named kind."""
        return self._source.student(model, self.input_shape, self.classes)
