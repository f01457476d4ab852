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


class Looked(nn.Module):
    """Looks codes up as they are: random numbers are none."""

    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(40, 2), nn.Linear(2 * prod(shape), classes)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(codes.long()).flatten(1))


class Hooked(Looked):
    """The same with a layer that only Opacus' hooks know."""

    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__(shape, classes)
        self.mixed = nn.Conv1d(shape[0], shape[0], 1)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        return self.head(self.mixed(self.table(codes.long())).flatten(1))


class Remembering(nn.Module):
    """Has torch's own recurrent layer."""

    def __init__(self, shape: Shape, classes: int, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.layer, self.head = kind(1, 3, batch_first=True), nn.Linear(3, classes)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(codes[..., None])[0][:, -1])


def gated(shape: Shape, classes: int) -> nn.Module:
    return Remembering(shape, classes, nn.GRU)


class Attending(nn.Module):
    """Has torch's own attention."""

    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__()
        self.table, self.head = nn.Linear(1, 4), nn.Linear(4, classes)
        self.mixing = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        x = self.table(codes[..., None])
        return self.head(self.mixing(x, x, x, need_weights=False)[0].mean(dim=1))


class Idle(nn.Module):
    """Has a layer that it does not use."""

    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__()
        self.layer, self.idle = nn.Linear(prod(shape), classes), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(1))


def held(shape: Shape, classes: int) -> nn.Module:
    """A chain whose second layer is not to be trained."""
    layers = [nn.Linear(prod(shape), 4), nn.Linear(4, classes).requires_grad_(False)]
    return nn.Sequential(nn.Flatten(), *layers)


class Rows(nn.Module):
    """Has a convolution along the rows of images, which only Opacus' hooks know."""

    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.along = nn.Conv1d(channels * height, 4, 3)
        self.head = nn.Linear(4 * (width - 2), classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.along(x.flatten(1, 2))).flatten(1))


def grouped(shape: Shape, classes: int) -> nn.Module:
    """A chain but for the groups of its second convolution."""
    layers = [nn.Conv2d(shape[0], 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4 * (shape[1] - 4) * (shape[2] - 4), classes))
