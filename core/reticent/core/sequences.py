"""Models of sequences of symbols: recurrent ones and a small transformer."""

from __future__ import annotations

import difflib

import torch
from torch import nn
from torch.nn import functional as F

from .errors import DataError, PlanError
from .models import own_student

STUDENTS = ("lstm", "gru", "attention")

_HIDDEN, _TEACHER_HIDDEN, _WIDTH = 64, 128, 48


class OneHot(nn.Module):
    """Turns codes ``(n, length)``, as float32, into one-hot vectors ``(n, length, symbols)``.

    Inputs are float32 everywhere in this package. Codes are cut off to integers, and those out of
    range are taken as the nearest in range, so any finite input is safe.
    """

    def __init__(self, symbols: int) -> None:
        """Make one for codes 0 to ``symbols - 1``."""
        super().__init__()
        self.symbols = symbols

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """Return zeros and ones."""
        integers = codes.long().clamp(0, self.symbols - 1)
        return F.one_hot(integers, self.symbols).to(torch.float32)


class LastLSTM(nn.LSTM):
    """One layer of LSTM (Hochreiter and Schmidhuber 1997) that returns the last hidden state."""

    def __init__(self, inputs: int, hidden: int) -> None:
        """Make a layer of ``hidden`` cells."""
        super().__init__(inputs, hidden, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Map ``(n, length, inputs)`` to ``(n, hidden)``."""
        return super().forward(x)[0][:, -1]


class LastGRU(nn.GRU):
    """One layer of GRU (Cho et al. 2014, as torch has it) that returns the last hidden state."""

    def __init__(self, inputs: int, hidden: int) -> None:
        """Make a layer of ``hidden`` cells."""
        super().__init__(inputs, hidden, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Map ``(n, length, inputs)`` to ``(n, hidden)``."""
        return super().forward(x)[0][:, -1]


class Attention(nn.Module):
    """A transformer of one block with one head (Vaswani et al. 2017), read out at the last place.

    Places are one-hot vectors beside the symbols', so that every parameter belongs to a linear
    layer or a LayerNorm that is used once: what gradients of single examples ask for. Only the last
    place's answer is used, and it may look at all places, so there is nothing to mask.
    """

    def __init__(self, length: int, symbols: int, width: int) -> None:
        """Make a block of ``width`` channels for sequences of ``length`` symbols."""
        super().__init__()
        self.length = length
        self.onehot = OneHot(symbols)
        self.embed = nn.Linear(symbols + length, width)
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        # A bias of the keys would move all scores alike, which softmax does not see.
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.mixed = nn.Linear(width, width)
        self.second_norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)
        self.last_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, symbols)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """Map codes ``(n, length)`` to logits ``(n, symbols)``."""
        places = torch.eye(self.length, device=codes.device).expand(len(codes), -1, -1)
        x = self.embed(torch.cat([self.onehot(codes), places], dim=2))
        seen = self.norm(x)
        last = x[:, -1]
        query = self.query(seen[:, -1])[:, None]
        scores = query @ self.key(seen).transpose(1, 2) / query.shape[2] ** 0.5
        mixture = (scores.softmax(dim=2) @ self.value(seen))[:, 0]
        last = last + self.mixed(mixture)
        last = last + self.narrow(F.gelu(self.wide(self.second_norm(last))))
        return self.head(self.last_norm(last))


def teacher(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Return an LSTM of 128 cells for the server, randomly initialised.

    Raises:
        DataError: If ``input_shape`` is not ``(length,)``.
    """
    _length(input_shape)
    return _recurrent(LastLSTM, classes, _TEACHER_HIDDEN)


def student(kind: str, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Return a new student for a device, randomly initialised from torch's global generator.

    Maps codes ``(n, length)``, as float32, to logits ``(n, classes)``, where the classes are the
    symbols themselves. Parameters for 36 symbols and 40 places:

    =============  ============================  ======
    kind           layers                        36, 40
    =============  ============================  ======
    ``lstm``       one-hot, LSTM of 64, Linear   28,452
    ``gru``        one-hot, GRU of 64, Linear    21,924
    ``attention``  see :class:`Attention`        24,468
    =============  ============================  ======

    ``"package.module:attribute"`` is imported and called with ``(input_shape, classes)``.

    Raises:
        PlanError: If there is no such kind, or a user's own is not a model.
        DataError: If ``input_shape`` is not ``(length,)``.
    """
    if ":" in kind:
        return own_student(kind, input_shape, classes)
    length = _length(input_shape)
    match kind:
        case "lstm":
            return _recurrent(LastLSTM, classes, _HIDDEN)
        case "gru":
            return _recurrent(LastGRU, classes, _HIDDEN)
        case "attention":
            return Attention(length, classes, _WIDTH)
    close = difflib.get_close_matches(kind, STUDENTS, n=1)
    hint = f' (did you mean "{close[0]}"?)' if close else ""
    raise PlanError(
        f'student.model="{kind}": must be one of {", ".join(STUDENTS)} for sequences, or '
        f'"package.module:attribute"{hint}'
    )


def _recurrent(layer: type[LastLSTM | LastGRU], symbols: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(OneHot(symbols), layer(symbols, hidden), nn.Linear(hidden, symbols))


def _length(input_shape: tuple[int, ...]) -> int:
    if len(input_shape) != 1 or input_shape[0] < 1:
        raise DataError(
            f"input shape {input_shape}: the built-in sequence models take (length,); give the "
            "task models of its own"
        )
    return input_shape[0]
