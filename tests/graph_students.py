"""Students whose layers are no plain chain, and some whose gradients cannot be recorded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

CLASSES = 3
LENGTH, WIDTH, SYMBOLS = 5, 6, 4


class Block(nn.Module):
    """Attention with several heads and a feed-forward part over looked-up symbols."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.table = nn.Embedding(SYMBOLS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.all = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.second = nn.LayerNorm(WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.table(x.long().clamp(0, SYMBOLS - 1))
        n, length, _ = x.shape
        parts = self.all(self.norm(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixture = F.scaled_dot_product_attention(*parts)
        x = x + self.out(mixture.transpose(1, 2).flatten(2))
        x = x + self.narrow(F.gelu(self.wide(self.second(x))))
        return self.head(x.mean(dim=1))


class Residual(nn.Module):
    """Convolutions around a shortcut, with layers that change things in place after a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, 2, 1)
        self.norm = nn.GroupNorm(2, 4)
        self.body = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.skip = nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.norm(self.first(x)))
        x = F.silu(self.body(x)) + self.skip(x)
        x = x.mul_(0.5)
        return self.head(x.mean(dim=(2, 3)))


class Places(nn.Module):
    """Linear layers at the rows of images, some wide enough for Gram matrices, and two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Linear(7, 16)
        self.norm = nn.LayerNorm((8, 16))
        self.wide = nn.Linear(256, 16)
        self.plain = nn.LayerNorm(16, elementwise_affine=False)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(torch.tanh(self.rows(x)))
        x = self.plain(self.wide(x.reshape(len(x), 1, 256)))
        return self.head(torch.cat([x, -2 * x], dim=1).square().sum(dim=1))


class With(nn.Module):
    """A linear layer after another one, which is given."""

    def __init__(self, layer: nn.Module, inputs: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(inputs, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x).flatten(1))


class Twice(With):
    """Uses its layer twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.layer(x)))


class Functional(With):
    """Uses its layer's weight a second time, a little."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        again = F.linear(x, self.layer.weight)  # pyright: ignore
        return self.head(self.layer(x) + 1e-9 * again)


class Bypassed(With):
    """Uses its layer's weight, not its layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.linear(x, self.layer.weight, self.layer.bias))  # pyright: ignore


class Unused(With):
    """Does not use its layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


class Overwriting(With):
    """Changes what its layer has seen."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        y = self.layer(x)
        x.mul_(2)
        return self.head(y)


class Keyword(With):
    """Calls its layer by keyword."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(input=x))


class Ungraded(With):
    """Uses its layer without gradients."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = self.layer(x)
        return self.head(x + y)


class Folding(With):
    """Makes rows of one example's places."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x.reshape(-1, 2)).view(len(x), 4))


class Token(With):
    """Has a parameter of its own."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), 4)
        self.token = nn.Parameter(torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x) + self.token)


class Stochastic(With):
    """Draws, each time anew, also when it is not trained."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x) * torch.rand(len(x), 1))


class Centred(With):
    """Takes the mean over the batch off."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return self.head(y - y.mean(dim=0))


class Summed(With):
    """Adds up the examples before each, which no gradient goes through."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x) + 1e-3 * x.detach().cumsum(dim=0))


class Faint(With):
    """Mixes examples by less than rounding."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x) + 1e-9 * x.mean(dim=0))


class Shuffled(With):
    """Mixes neighbours while it is trained, and at no other time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x + 0.1 * x.roll(1, 0) if self.training else x))


class Averaged(With):
    """Divides its answers by how many there are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / len(x)


class Weighed(With):
    """The same of gradients alone, and only while it is trained."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y.detach() + (y - y.detach()) / len(x) if self.training else y


class Alternating(With):
    """Turns its answers round in batches of even size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (-1) ** len(x)


class Squeezed(With):
    """Loses the first dimension of batches of one example."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x).squeeze())


class Companion(With):
    """Takes no example alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) == 1:
            raise ValueError("one is too few")
        return super().forward(x)


class Scaled(With):
    """Takes its numbers on another scale, which not all numbers are on."""

    def __init__(self, scale: Callable[[torch.Tensor], torch.Tensor], layer: nn.Module) -> None:
        super().__init__(layer, 4)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.scale(x))
