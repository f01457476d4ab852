"""Training of one model on public data: a teacher, or the student before the federation."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn import functional as F

from reticent.compression.distill import Guide, softened
from reticent.core.plan import Distill
from reticent.core.seeds import numpy_generator, torch_generator
from reticent.core.tasks import Examples

from .offload import to_disk

_BATCH = 50
_SHIFT = 2
_CHUNK = 500


def train_public(
    model: nn.Module,
    examples: Examples,
    epochs: int,
    learning_rate: float,
    seed: int,
    name: str,
    teacher: nn.Module | None = None,
    distill: Distill | None = None,
    precision: str = "fp32",
    offload: str = "none",
    span: tuple[int, int] | None = None,
) -> nn.Module:
    """Train ``model`` in place on public examples and return it in evaluation mode.

    The loss is the cross entropy; with a teacher and a kind of distillation it is that of
    :class:`reticent.compression.distill.Guide`.

    Args:
        name: Names the random streams: batches depend on ``(seed, name)`` only.
        precision: ``fp32``, or ``bf16`` for :class:`BFloat16`; the teacher, and what is compared
            with it, is float32 either way.
        offload: ``none``, or ``disk``: what is trained lies in files, see :mod:`.offload`.
        span: First epoch and the one after the last, to train only a part of the ``epochs``: with
            the learning rates of that part, and an optimizer that starts anew. A part that begins
            at 0 is the beginning of the whole training, bit for bit.

    Raises:
        PlanError: If hidden layers are compared and a model has none.
    """
    guide = None
    if teacher is not None and distill is not None and distill.terms:
        draws = torch_generator(seed, "public", name, "projection")
        guide = Guide(teacher, distill, model, examples.inputs[:1], draws)
    learned = [*model.parameters(), *(guide.parameters if guide else ())]
    steps = steps_of(examples, epochs)
    first, last = (steps * epoch // epochs for epoch in span or (0, epochs))
    update = Update(learned, learning_rate, steps, offload, first)
    runs = in_precision(model.train(), precision)
    for inputs, labels in batches(examples, last - first, seed, name):
        plain = guide is None
        update(F.cross_entropy(runs(inputs), labels) if plain else guide.loss(runs, inputs, labels))
    return model.eval()


def steps_of(examples: Examples, epochs: int) -> int:
    """Return the number of batches in ``epochs`` passes over the examples."""
    count = len(examples.labels)
    return epochs * max(1, count // min(_BATCH, count))


def batches(
    examples: Examples, steps: int, seed: int, name: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ``steps`` random batches; images are shifted by up to two pixels at random."""
    generator = numpy_generator(seed, "public", name)
    count = len(examples.labels)
    for _ in range(steps):
        chosen = torch.from_numpy(generator.choice(count, min(_BATCH, count), replace=False))
        inputs, labels = examples.inputs[chosen], examples.labels[chosen]
        if inputs.ndim == 4:
            inputs = _shift(inputs, generator.integers(-_SHIFT, _SHIFT + 1, 2).tolist())
        yield inputs, labels


class BFloat16(nn.Module):
    """A model whose convolutions and matrix products run in bfloat16 (CPU autocast).

    Weights, their gradients, and so the optimizer stay float32. bfloat16 has float32's range, so
    gradients do not vanish and no loss is scaled (Kalamkar et al. 2019). For public data only: a
    per-example gradient that was rounded after its norm was taken can exceed its bound.
    """

    def __init__(self, model: nn.Module) -> None:
        """Wrap ``model``, which keeps its parameters and its mode."""
        super().__init__()
        self._model = model

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return float32 logits."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self._model(inputs).float()


def in_precision(model: nn.Module, precision: str) -> nn.Module:
    """Return ``model`` itself for ``fp32``, and what runs it in bfloat16 for ``bf16``."""
    return BFloat16(model) if precision == "bf16" else model


class Update:
    """AdamW with a one-cycle learning rate (Smith and Topin 2018)."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        learning_rate: float,
        steps: int,
        offload: str = "none",
        first: int = 0,
    ) -> None:
        """Update ``parameters`` at most ``steps`` times, with learning rates from ``first`` on.

        Raises:
            RunError: If they are to lie on disk and it has no room.
        """
        learned = list(parameters)
        self._optimizer = torch.optim.AdamW(learned, lr=learning_rate, weight_decay=1e-3)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer, learning_rate, total_steps=steps
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            for _ in range(first):
                self._schedule.step()
        self._drop = offload == "none"
        if not self._drop:
            to_disk(self._optimizer, learned)

    def __call__(self, loss: torch.Tensor) -> None:
        """Take one step down the gradient of ``loss``."""
        self._optimizer.zero_grad(set_to_none=self._drop)
        loss.backward()
        self._optimizer.step()
        self._schedule.step()


def _shift(images: torch.Tensor, by: list[int]) -> torch.Tensor:
    """Shift ``(n, c, h, w)`` images by ``by`` pixels, repeating the edge."""
    down, right = by
    height, width = images.shape[2:]
    padded = F.pad(images, (_SHIFT, _SHIFT, _SHIFT, _SHIFT), mode="replicate")
    top, left = _SHIFT - down, _SHIFT - right
    return padded[:, :, top : top + height, left : left + width]


@torch.no_grad()
def soft_labels(
    teacher: nn.Module, examples: Examples, classes: int, temperature: float
) -> torch.Tensor:
    """Return the teacher's mean softened response to each label, float32 ``(classes, classes)``.

    A label without public examples gets the one-hot row. The teacher is in evaluation mode.
    """
    parts = [softened(teacher, part, temperature) for part in examples.inputs.split(_CHUNK)]
    probabilities = torch.cat(parts)
    table = torch.eye(classes)
    for label in range(classes):
        rows = probabilities[examples.labels == label]
        if len(rows):
            table[label] = rows.mean(dim=0)
    return table


@torch.no_grad()
def logits_of(model: nn.Module, inputs: torch.Tensor, batch: int = _CHUNK) -> torch.Tensor:
    """Return the logits of ``model`` in evaluation mode, a batch at a time."""
    training = model.training
    model.eval()
    try:
        return torch.cat([model(part) for part in inputs.split(batch)])
    finally:
        model.train(training)


def accuracy(model: nn.Module, examples: Examples) -> float:
    """Return the share of examples that ``model`` labels correctly."""
    hits = logits_of(model, examples.inputs).argmax(dim=1) == examples.labels
    return float(hits.float().mean())
