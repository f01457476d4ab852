"""Gradients of single examples of recurrent layers, by book-keeping of their gates' inputs.

A recurrent layer is two linear maps that are used at every place: of the symbol there, and of the
state before it. So the gradient of one example is a sum over places of outer products, as of a
linear layer that is used at many places, once the gradients of the two maps' outputs are known.
The layer is therefore computed place by place here, with those outputs kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from reticent.core.sequences import LastGRU, LastLSTM

from .terms import Rows, Term

Recurrent = LastLSTM | LastGRU
RECURRENT = (LastLSTM, LastGRU)


@dataclass(frozen=True)
class Unrolled:
    """One forward pass of a recurrent layer.

    Attributes:
        last: What the layer returns, the last hidden state ``(n, hidden)``.
        inputs: The layer's inputs ``(n, length, inputs)``, without history.
        states: Hidden states before each place ``(n, length, hidden)``, without history.
        outputs: Outputs of the linear maps: of the inputs at all places, ``(n, length, gates)``,
            and then of the state before each place, ``(n, gates)``.
    """

    last: torch.Tensor
    inputs: torch.Tensor
    states: torch.Tensor
    outputs: tuple[torch.Tensor, ...]

    def terms(self, gradients: list[torch.Tensor]) -> Iterator[Term]:
        """Yield the gradients of both weights, then of both biases, as torch orders them.

        Args:
            gradients: Of each of ``outputs``.
        """
        of_inputs, of_states = gradients[0], torch.stack(gradients[1:], dim=1)
        yield Rows((of_inputs.transpose(1, 2) @ self.inputs).flatten(1))
        yield Rows((of_states.transpose(1, 2) @ self.states).flatten(1))
        yield Rows(of_inputs.sum(dim=1))
        yield Rows(of_states.sum(dim=1))


def unrolled(layer: Recurrent, inputs: torch.Tensor) -> Unrolled:
    """Compute ``layer`` on ``(n, length, inputs)``: the same values as ``layer(inputs)``."""
    step = _lstm if isinstance(layer, LastLSTM) else _gru
    of_input, of_state, input_bias, state_bias = layer.parameters()
    of_inputs = F.linear(inputs, of_input, input_bias)
    hidden = cell = inputs.new_zeros(len(inputs), layer.hidden_size)
    states: list[torch.Tensor] = []
    of_states: list[torch.Tensor] = []
    for place in range(inputs.shape[1]):
        states.append(hidden.detach())
        of_states.append(F.linear(hidden, of_state, state_bias))
        hidden, cell = step(of_inputs[:, place], of_states[-1], hidden, cell)
    kept = torch.stack(states, dim=1)
    return Unrolled(hidden, inputs.detach(), kept, (of_inputs, *of_states))


def _lstm(
    of_input: torch.Tensor, of_state: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    enter, forget, value, leave = (of_input + of_state).chunk(4, dim=1)
    cell = forget.sigmoid() * cell + enter.sigmoid() * value.tanh()
    return leave.sigmoid() * cell.tanh(), cell


def _gru(
    of_input: torch.Tensor, of_state: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    reset, keep, value = of_input.chunk(3, dim=1)
    state_reset, state_keep, state_value = of_state.chunk(3, dim=1)
    update = (keep + state_keep).sigmoid()
    fresh = (value + (reset + state_reset).sigmoid() * state_value).tanh()
    return (1 - update) * fresh + update * hidden, cell
