"""Models whose layers draw in training; worker processes import them by name."""

from __future__ import annotations

from math import prod

import torch
from torch import nn
from torch.nn import functional as F

from reticent.core.plan import TaskSection
from reticent.core.tasks import ImageTask
from reticent.core.tasks.sources import SOURCES


class Dropped(nn.Module):
    """Draws without a layer that says so."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, 0.5, self.training)


def network(shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(prod(shape), 12), nn.ReLU(), nn.Dropout(0.3)),
        *(nn.Linear(12, 12), nn.ReLU(), Dropped(), nn.Linear(12, classes)),
    )


class Drawing(ImageTask):
    """Digits, for a teacher and a student that draw."""

    def teacher(self) -> nn.Module:
        return network(self.input_shape, self.classes)

    def student(self, model: str) -> nn.Module:
        return network(self.input_shape, self.classes)


def task(section: TaskSection, seed: int) -> Drawing:
    return Drawing(SOURCES["digits"], section, seed)


class Resting(Drawing):
    """Hands its student over as one that is not trained."""

    def student(self, model: str) -> nn.Module:
        return super().student(model).eval()


def resting(section: TaskSection, seed: int) -> Resting:
    return Resting(SOURCES["digits"], section, seed)
