"""What a task is: data and models, split by who may see them."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import nn


class Examples(NamedTuple):
    """Labelled examples: ``inputs`` float32 ``(n, *input_shape)``, ``labels`` int64 ``(n,)``."""

    inputs: torch.Tensor
    labels: torch.Tensor


@runtime_checkable
class Task(Protocol):
    """Data and models of one learning problem.

    ``public`` and ``test`` live on the server. ``client`` is private: it is called on the device
    that owns the data, and only when that device is sampled. In a simulation that is in a thread of
    its own (``engine.prefetch``), while no other thread is in the task. Models begin at random
    weights; a task whose models do not must have an attribute ``public_weights``, true only where
    no private data went into them, or a plan that declares how they were trained
    (``teacher.trained``).
    """

    name: str
    classes: int
    input_shape: tuple[int, ...]
    clients: int
    nominal_examples: int
    """Examples per client that anyone may know: a public constant, never a real count."""

    def public(self) -> Examples:
        """Return data that anyone may see."""
        ...

    def client(self, index: int) -> Examples:
        """Return the private data of client ``index`` (0-based)."""
        ...

    def test(self) -> Examples:
        """Return held-out data that is used for final figures only."""
        ...

    def teacher(self) -> nn.Module:
        """Return a new, randomly initialised teacher."""
        ...

    def student(self, model: str) -> nn.Module:
        """Return a new, randomly initialised student of the named kind."""
        ...
