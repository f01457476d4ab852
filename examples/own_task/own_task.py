"""A task of one's own: which way do the stripes of a woven patch run? Data, task and model."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import nn

from reticent.core.plan import TaskSection
from reticent.core.tasks import ArrayTask

CLASSES = 4  # stripes at 0, 45, 90 and 135 degrees
SIDE = 12  # pixels


def patches(count: int, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return noisy stripes, float32 (count, 1, SIDE, SIDE), and their directions (count,)."""
    labels = rng.integers(CLASSES, size=count)
    angle = labels * np.pi / CLASSES + rng.normal(0, 0.1, count)
    phase, period = rng.uniform(0, 2 * np.pi, count), rng.uniform(3, 5, count)
    y, x = np.mgrid[:SIDE, :SIDE]
    along = np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y
    wave = np.sin(2 * np.pi * along / period[:, None, None] + phase[:, None, None])
    noisy = wave + rng.normal(0, 1.5, wave.shape)
    return noisy[:, None].astype(np.float32), labels


def task(section: TaskSection, seed: int) -> ArrayTask:
    """Return the task; a plan names it with ``task.name = "own_task:task"``."""
    inputs, labels = patches(3000, np.random.default_rng(1))
    test_inputs, test_labels = patches(500, np.random.default_rng(2))
    return ArrayTask(
        section,
        seed,
        inputs=inputs,
        labels=labels,
        test_inputs=test_inputs,
        test_labels=test_labels,
        classes=CLASSES,
    )


def student(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Return the model; a plan names it with ``student.model = "own_task:student"``."""
    channels, height, width = input_shape
    return nn.Sequential(
        nn.Conv2d(channels, 12, 5, stride=2, padding=2, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * -(-height // 2) * -(-width // 2), classes),
    )
