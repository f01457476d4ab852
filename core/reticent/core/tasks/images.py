"""The named image tasks: digits, fashion and fashion-full."""

from __future__ import annotations

import json
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .. import models
from ..plan import TaskSection
from .base import Examples
from .sources import ImageArrays, ImageSource
from .split import Split, check_section, nominal_examples

CLASSES = 10


class ImageTask:
    """Grey images of ten classes; a :class:`~reticent.core.tasks.base.Task`.

    Public and private examples come from the training part, the test part from the held-out file.
    Inputs are ``(pixel / white - mean) / std`` with public constants. Nothing is read until data
    are first asked for, and pixels stay uint8 until a client is.

    Args:
        source: The data set.
        section: The plan's task section.
        seed: The plan's seed; it moves the public part and the clients' parts.

    Raises:
        DataError: If the data set cannot serve the section.
    """

    def __init__(self, source: ImageSource, section: TaskSection, seed: int) -> None:
        """Check that the plan fits the data set, without reading it."""
        check_section(source.train, CLASSES, section)
        self.name: str = source.name
        self.classes: int = CLASSES
        self.input_shape: tuple[int, ...] = (1, source.side, source.side)
        self.clients: int = section.clients
        self.nominal_examples: int = nominal_examples(source.train, section)
        self._source = source
        self._section = section
        self._seed = seed

    @property
    def preprocessing(self) -> str:
        """How raw pixels become inputs, as JSON: ``(pixel / divide - mean) / std``."""
        source = self._source
        return json.dumps({"divide": source.white, "mean": source.mean, "std": source.std})

    @property
    def _arrays(self) -> ImageArrays:
        # Cached by the source, once a process and not once a task, and not pickled with a task.
        return self._source.load()

    @cached_property
    def split(self) -> Split:
        """Positions in the training part of the public examples and of each client's."""
        return Split(self._arrays.train_labels, self._section, self._seed)

    def _examples(self, images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> Examples:
        # One multiplication and one addition in float32, the same on every device.
        scale = np.float32(1 / (self._source.white * self._source.std))
        shift = np.float32(self._source.mean / self._source.std)
        inputs = images.astype(np.float32)[:, None] * scale - shift
        return Examples(torch.from_numpy(inputs), torch.from_numpy(labels.astype(np.int64)))

    def public(self) -> Examples:
        """Return the public examples, balanced over the classes."""
        where, arrays = self.split.public, self._arrays
        return self._examples(arrays.train_images[where], arrays.train_labels[where])

    def client(self, index: int) -> Examples:
        """Return the private examples of client ``index``.

        Raises:
            DataError: If there is no such client.
        """
        where, arrays = self.split.client(index), self._arrays
        return self._examples(arrays.train_images[where], arrays.train_labels[where])

    def test(self) -> Examples:
        """Return the held-out examples."""
        return self._examples(self._arrays.test_images, self._arrays.test_labels)

    def teacher(self) -> nn.Module:
        """Return a new residual network; see :func:`reticent.core.models.teacher`."""
        return models.teacher(self.input_shape, self.classes)

    def student(self, model: str) -> nn.Module:
        """Return a new student; see :func:`reticent.core.models.student`."""
        return models.student(model, self.input_shape, self.classes)
