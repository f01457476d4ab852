"""Training of one model on public data: a teacher, or the student before the federation."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from reticent.compression.distill import Guide, Seen, softened
from reticent.core.plan import Distill
from reticent.core.seeds import derive_key, layers_draw, numpy_generator, torch_generator
from reticent.core.tasks import Examples

from .learning import learning
from .means import PLAIN, Means, moved

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
    means: Means = PLAIN,
    span: tuple[int, int] | None = None,
) -> nn.Module:
    """Train ``model`` in place on public examples and return it in evaluation mode.

    The loss is the cross entropy; with a teacher and a kind of distillation it is that of
    :class:`reticent.compression.distill.Guide`.

    Args:
        name: Names the random streams: batches, and what layers draw (dropout), depend on
            ``(seed, name)`` only.
        means: Device, precision and off-load of what is trained. The teacher is on that device
            too, and float32.
        span: First epoch and the one after the last, to train only a part of the ``epochs``: with
            the learning rates of that part, and an optimizer that starts anew. A part that begins
            at 0 is the beginning of the whole training, bit for bit.

    Raises:
        PlanError: If hidden layers are compared and a model has none.
    """
    guide = None
    if teacher is not None and distill is not None and distill.terms:
        draws = torch_generator(seed, "public", name, "projection")
        guide = Guide(teacher, distill, model, examples.inputs[:1], draws, len(examples.labels))
    others, beside = (guide.parameters, guide.modules) if guide else ((), ())
    steps = steps_of(examples, epochs)
    first, last = (steps * epoch // epochs for epoch in span or (0, epochs))
    with (
        layers_draw(derive_key(seed, "public", name, "layers"), means.device),
        moved(means.device, *beside),
        learning(model, learning_rate, steps, means, first, others) as (runs, step),
    ):
        for inputs, labels, seen in shown(examples, last - first, seed, name):
            inputs, labels = inputs.to(means.device), labels.to(means.device)
            if guide is None:
                step(F.cross_entropy(runs(inputs), labels))
            else:
                step(guide.loss(runs, inputs, labels, seen))
    return model


def steps_of(examples: Examples, epochs: int) -> int:
    """Return the number of batches in ``epochs`` passes over the examples."""
    count = len(examples.labels)
    return epochs * max(1, count // min(_BATCH, count))


def batches(
    examples: Examples, steps: int, seed: int, name: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ``steps`` random batches; images are shifted by up to two pixels at random."""
    return ((inputs, labels) for inputs, labels, _ in shown(examples, steps, seed, name))


def shown(
    examples: Examples, steps: int, seed: int, name: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor, Seen]]:
    """Yield :func:`batches`, each with what it shows."""
    generator = numpy_generator(seed, "public", name)
    count = len(examples.labels)
    for _ in range(steps):
        chosen = torch.from_numpy(generator.choice(count, min(_BATCH, count), replace=False))
        inputs, labels = examples.inputs[chosen], examples.labels[chosen]
        view: tuple[int, ...] = ()
        if inputs.ndim == 4:
            view = tuple(generator.integers(-_SHIFT, _SHIFT + 1, 2).tolist())
            inputs = _shift(inputs, view)
        yield inputs, labels, Seen(chosen, view)


def _shift(images: torch.Tensor, by: tuple[int, ...]) -> torch.Tensor:
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
    """Return the share of examples that ``model`` labels correctly, the float64 nearest to it.

    So a share is equal to the same share as it is written: 324 of 360 are not below 0.9. Of no
    examples it is NaN.
    """
    hits = logits_of(model, examples.inputs).argmax(dim=1) == examples.labels
    return int(hits.sum()) / len(hits) if len(hits) else math.nan
