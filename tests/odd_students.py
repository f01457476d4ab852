"""Students that are easily trained wrongly, or not at all; plans name them."""

from __future__ import annotations

from math import prod

import torch
from torch import nn
from torch.nn import functional as F

Shape = tuple[int, ...]


class Tied(nn.Module):
    """Uses a layer's weight a second time outside of the layer, where no hook sees it."""

    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(prod(shape), classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(1)) + F.linear(x.flatten(1), self.layer.weight)
