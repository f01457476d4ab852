"""Training on public data: the teacher, and the student before the federation."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.nn import functional as F

from reticent.core.plan import Distill
from reticent.core.seeds import numpy_generator
from reticent.core.tasks import Examples

_BATCH = 50
_SHIFT = 2


def train_public(
    model: nn.Module,
    examples: Examples,
    epochs: int,
    learning_rate: float,
    seed: int,
    name: str,
    teacher: nn.Module | None = None,
    distill: Distill | None = None,
    span: tuple[int, int] | None = None,
) -> nn.Module:
    """Train ``model`` in place on public examples and return it in evaluation mode.

    AdamW with a one-cycle learning rate (Smith and Topin 2018); images are shifted by up to two
    pixels at random. With a teacher the loss is
    ``(1 - w) * CE + w * T^2 * KL(teacher_T || student_T)`` (Hinton et al. 2015, section 2).

    Args:
        name: Names the random streams: batches depend on ``(seed, name)`` only.
        span: First epoch and the one after the last, to train only a part of the ``epochs``: with
            the learning rates of that part, and an optimizer that starts anew. A part that begins
            at 0 is the beginning of the whole training, bit for bit.
    """
    generator = numpy_generator(seed, "public", name)
    count = len(examples.labels)
    batch = min(_BATCH, count)
    steps = epochs * max(1, count // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    first, last = (steps * epoch // epochs for epoch in span or (0, epochs))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        for _ in range(first):
            schedule.step()
    model.train()
    for _ in range(first, last):
        chosen = torch.from_numpy(generator.choice(count, batch, replace=False))
        inputs, labels = examples.inputs[chosen], examples.labels[chosen]
        if inputs.ndim == 4:
            inputs = _shift(inputs, generator.integers(-_SHIFT, _SHIFT + 1, 2).tolist())
        logits = model(inputs)
        loss = F.cross_entropy(logits, labels)
        if teacher is not None and distill is not None:
            loss = _distilled(loss, logits, teacher, inputs, distill)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def _shift(images: torch.Tensor, by: list[int]) -> torch.Tensor:
    """Shift ``(n, c, h, w)`` images by ``by`` pixels, repeating the edge."""
    down, right = by
    height, width = images.shape[2:]
    padded = F.pad(images, (_SHIFT, _SHIFT, _SHIFT, _SHIFT), mode="replicate")
    top, left = _SHIFT - down, _SHIFT - right
    return padded[:, :, top : top + height, left : left + width]


def _distilled(
    hard: torch.Tensor,
    logits: torch.Tensor,
    teacher: nn.Module,
    inputs: torch.Tensor,
    distill: Distill,
) -> torch.Tensor:
    heat = distill.temperature
    with torch.no_grad():
        target = F.softmax(teacher(inputs) / heat, dim=1)
    mimic = F.kl_div(F.log_softmax(logits / heat, dim=1), target, reduction="batchmean")
    return (1 - distill.weight) * hard + distill.weight * heat**2 * mimic


@torch.no_grad()
def soft_labels(
    teacher: nn.Module, examples: Examples, classes: int, temperature: float
) -> torch.Tensor:
    """Return the teacher's mean softened response to each label, float32 ``(classes, classes)``.

    A label without public examples gets the one-hot row.
    """
    probabilities = F.softmax(logits_of(teacher, examples.inputs) / temperature, dim=1)
    table = torch.eye(classes)
    for label in range(classes):
        rows = probabilities[examples.labels == label]
        if len(rows):
            table[label] = rows.mean(dim=0)
    return table


@torch.no_grad()
def logits_of(model: nn.Module, inputs: torch.Tensor, batch: int = 500) -> torch.Tensor:
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
