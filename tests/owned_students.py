"""Students of all layers with parameters, chains and others, their data, and sums one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from reticent.core.sequences import Attention, LastGRU, LastLSTM, OneHot
from reticent.core.update import Layout

CLIP, CLASSES = 0.5, 3
IMAGE, CODES = (2, 8, 7), (5,)

MODELS: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    "linear": (IMAGE, lambda: nn.Sequential(nn.Flatten(), nn.Linear(112, CLASSES))),
    "two-linear": (
        IMAGE,
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(112, 9, bias=False), nn.SiLU(), last(9)),
    ),
    "places": (IMAGE, lambda: nn.Sequential(nn.Linear(7, 4), nn.ReLU(), nn.Flatten(), last(64))),
    "convolution": (
        IMAGE,
        lambda: nn.Sequential(nn.Conv2d(2, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), last(128)),
    ),
    "two-convolutions": (
        IMAGE,
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 8, (3, 2), (2, 1), (1, 0), bias=False), nn.Tanh()),
            *(nn.Conv2d(8, 6, 2, dilation=2, padding="valid"), nn.Flatten(), last(48)),
        ),
    ),
    "group-norm": (
        IMAGE,
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 8, 3, 2, 1), nn.GroupNorm(4, 8), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), last(8)),
        ),
    ),
    "lstm": (CODES, lambda: nn.Sequential(OneHot(4), LastLSTM(4, 6), last(6))),
    "gru": (CODES, lambda: nn.Sequential(OneHot(4), nn.Linear(4, 5), LastGRU(5, 6), last(6))),
    "attention": (CODES, lambda: Attention(5, CLASSES, 8)),
    "residual": (
        IMAGE,
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 8, 3, padding=1), Shortcut(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())),
            *(Shortcut(nn.GroupNorm(2, 8), nn.ReLU()), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            *(Shortcut(nn.LayerNorm(8), nn.Linear(8, 8)), last(8)),
        ),
    ),
    "table": (
        CODES,
        lambda: nn.Sequential(Codes(4), nn.Embedding(4, 6), nn.Flatten(), nn.Tanh(), last(30)),
    ),
    "padded": (
        CODES,
        lambda: nn.Sequential(
            *(Codes(4), nn.Embedding(4, 6, padding_idx=3), nn.Flatten(), nn.Tanh(), last(30)),
        ),
    ),
}


class Shortcut(nn.Sequential):
    """A chain around which its input is added (He et al. 2016)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore
        return x + super().forward(x)


class Codes(nn.Module):
    """Takes numbers as codes of symbols."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.symbols = symbols

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.long().clamp(0, self.symbols - 1)


def last(inputs: int) -> nn.Module:
    return nn.Linear(inputs, CLASSES)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


def distilling(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    soft = torch.eye(CLASSES)[labels] * 0.7 + 0.1
    mimic = F.kl_div(F.log_softmax(logits / 2, dim=1), soft, reduction="sum")
    return 0.7 * cross_entropy(logits, labels) + 0.3 * 4 * mimic


def made(kind: str) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[kind][1]()


def batch_of(kind: str, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    inputs = 2 * torch.randn(count, *MODELS[kind][0], generator=draws)
    return inputs, torch.randint(0, CLASSES, (count,), generator=draws)


def layout_of(model: nn.Module, share: float) -> Layout:
    return Layout.of(model, np.random.default_rng(0).random(Layout.of(model).total) < share)


def one_by_one(
    model: nn.Module, layout: Layout, batch: Sequence[torch.Tensor], clipping: str
) -> NDArray[np.float64]:
    """The clipped sum by a plain loop over examples."""
    total = np.zeros(layout.size)
    shares = np.sqrt(np.array(layout.blocks) / layout.size)
    for one in range(len(batch[1])):
        loss = distilling(model(batch[0][one : one + 1]), batch[1][one : one + 1])
        parts = layout.gather(list(torch.autograd.grad(loss, list(model.parameters()))))
        gradient = parts.astype(np.float64)
        if clipping == "flat":
            total += gradient * min(1.0, CLIP / max(1e-300, float(np.linalg.norm(gradient))))
            continue
        for block, share in zip(blocks_of(layout), shares, strict=True):
            norm = max(1e-300, float(np.linalg.norm(gradient[block])))
            total[block] += gradient[block] * min(1.0, CLIP * share / norm)
    return total


def blocks_of(layout: Layout) -> list[slice]:
    ends = np.cumsum((0, *layout.blocks))
    return [slice(a, b) for a, b in pairwise(ends)]
