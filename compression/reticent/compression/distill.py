"""Distillation losses: what a student imitates of a teacher, on public data.

With ``w`` the plan's ``student.distill.weight`` the loss of a batch is

    (1 - w) * cross entropy + w * (sum of the terms that ``student.distill.kind`` names)

========  ========================================================  ===================
term      what is compared                                          separable by example
========  ========================================================  ===================
response  softened probabilities (Hinton et al. 2015, section 2)    yes
feature   a hidden layer, after a learned projection (Romero et     yes
          al. 2015, section 2.2)
relation  distances and angles among the examples of a batch (Park  no
          et al. 2019, section 3.2)
========  ========================================================  ===================

A term that is not separable has no per-example gradient: changing one example moves the gradients
of others, and clipping each one would bound nothing. It must not enter a loss under DP-SGD.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from reticent.core.errors import PlanError
from reticent.core.plan import Distill

_DISTANCE, _ANGLE = 25.0, 50.0
"""Scales of the two relations, 1 to 2, that make them about as large as a cross entropy."""

_TINY = 1e-12

_MOST_REMEMBERED = 2**24
"""Most numbers of a teacher's answers that are kept: 64 MB."""


class Ensemble(nn.Module):
    """Several classifiers that answer as one: the mean of their probabilities."""

    def __init__(self, members: list[nn.Module]) -> None:
        """Hold ``members``, each of which maps the same inputs to logits ``(n, classes)``."""
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the logarithm of the mean probabilities, ``(n, classes)``: logits of the mean."""
        parts = [F.log_softmax(member(inputs), dim=1) for member in self.members]
        return torch.logsumexp(torch.stack(parts), dim=0) - math.log(len(parts))


@torch.no_grad()
def softened(teacher: nn.Module, inputs: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the teacher's probabilities at a temperature, ``(n, classes)``; rows sum to 1.

    An ensemble's are the mean of its members' softened probabilities.
    """
    members = list(teacher.members) if isinstance(teacher, Ensemble) else [teacher]
    parts = [F.softmax(member(inputs) / temperature, dim=1) for member in members]
    return parts[0] if len(parts) == 1 else torch.stack(parts).mean(dim=0)


def response_loss(logits: torch.Tensor, target: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return ``T^2 * KL(target || softmax(logits / T))``, averaged over the batch.

    Hinton, Vinyals and Dean 2015, section 2: the factor keeps the gradient's scale when T changes.

    Args:
        logits: The student's, ``(n, classes)``.
        target: The teacher's softened probabilities, ``(n, classes)``.
    """
    mimic = F.kl_div(F.log_softmax(logits / temperature, dim=1), target, reduction="batchmean")
    return temperature**2 * mimic


def distance_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean Huber difference of pairwise distances, each over its model's mean distance.

    Park et al. 2019, section 3.2.1, over all pairs of distinct examples; 0 for fewer than two.

    Args:
        student: Embeddings ``(n, d)``.
        teacher: Embeddings ``(n, e)``; no gradient flows into them.
    """
    if len(student) < 2:
        return student.sum() * 0
    return F.smooth_l1_loss(_distances(student), _distances(teacher.detach()))


def angle_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean Huber difference of the cosines at j of the angles i-j-k.

    Park et al. 2019, section 3.2.2, over all triples of distinct examples; 0 for fewer than three.

    Args:
        student: Embeddings ``(n, d)``.
        teacher: Embeddings ``(n, e)``; no gradient flows into them.
    """
    count = len(student)
    if count < 3:
        return student.sum() * 0
    same = torch.eye(count, dtype=torch.bool, device=student.device)
    distinct = ~(same[:, :, None] | same[:, None, :] | same[None, :, :])
    return F.smooth_l1_loss(_cosines(student)[distinct], _cosines(teacher.detach())[distinct])


def relation_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum of the distance and the angle loss. Not separable by example.

    Args:
        student: A layer's output ``(n, ...)``, flattened here.
        teacher: Another's, ``(n, ...)``.
    """
    first, second = student.flatten(1), teacher.flatten(1)
    return _DISTANCE * distance_loss(first, second) + _ANGLE * angle_loss(first, second)


class Hint(nn.Module):
    """Mean squared difference of a projected student layer and a teacher layer.

    Romero et al. 2015, section 2.2, with a 1x1 convolution as the regressor and the mean for the
    sum. Spatial layers are averaged down to the smaller height and width of the two; if one of them
    is not spatial, both are flattened and the regressor is linear.
    """

    def __init__(
        self, student: torch.Size, teacher: torch.Size, generator: torch.Generator
    ) -> None:
        """Make a random projection between layers of these shapes, ``(n, ...)`` each."""
        super().__init__()
        self._spatial = len(student) == len(teacher) == 4
        self._size = (0, 0)
        if self._spatial:
            self._size = (min(student[2], teacher[2]), min(student[3], teacher[3]))
        inputs, outputs = (
            (s[1] if self._spatial else math.prod(s[1:])) for s in (student, teacher)
        )
        bound = 1 / math.sqrt(inputs)
        draws = torch.rand((outputs, inputs), generator=generator)
        self.weight = nn.Parameter((2 * draws - 1) * bound)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Return the loss of a batch; no gradient flows into ``teacher``."""
        if self._spatial:
            student, teacher = (F.adaptive_avg_pool2d(t, self._size) for t in (student, teacher))
            guess = F.conv2d(student, self.weight[:, :, None, None], self.bias)
        else:
            student, teacher = student.flatten(1), teacher.flatten(1)
            guess = F.linear(student, self.weight, self.bias)
        return F.mse_loss(guess, teacher.detach())


class Seen(NamedTuple):
    """Which of the public examples a batch shows, and how: alike in all that is equal here.

    Attributes:
        examples: Positions among the public examples, int64 ``(n,)``.
        view: By how much they are shifted down and to the right, or ``()``.
    """

    examples: torch.Tensor
    view: tuple[int, ...]


class Answers:
    """A teacher's softened answers, each example being asked about once in every view.

    Equal to :func:`softened` of the same inputs up to float32 rounding: those that are asked about
    for the first time go through the teacher together, and not with the rest of their batch. The
    same sequence of calls gives the same bits.
    """

    def __init__(self, teacher: nn.Module, temperature: float, count: int) -> None:
        """Remember what ``teacher``, in evaluation mode, says of ``count`` examples."""
        self._teacher, self._temperature, self._count = teacher, temperature, count
        self._known: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, inputs: torch.Tensor, seen: Seen) -> torch.Tensor:
        """Return the probabilities of the inputs ``(n, *input_shape)``, ``(n, classes)``."""
        if seen.view not in self._known:
            first = softened(self._teacher, inputs, self._temperature)
            if (len(self._known) + 1) * self._count * first.shape[1] <= _MOST_REMEMBERED:
                known = torch.zeros(self._count, dtype=torch.bool)
                self._known[seen.view] = first.new_zeros(self._count, first.shape[1]), known
                self._keep(first, seen)
            return first
        answers, known = self._known[seen.view]
        new = (~known[seen.examples]).nonzero().flatten()
        if len(new):
            some = softened(self._teacher, inputs[new], self._temperature)
            self._keep(some, Seen(seen.examples[new], seen.view))
        return answers[seen.examples]

    def _keep(self, found: torch.Tensor, seen: Seen) -> None:
        answers, known = self._known[seen.view]
        answers[seen.examples], known[seen.examples] = found, True


class Guide:
    """The loss of one student that learns from labels and from a teacher, on public data."""

    def __init__(
        self,
        teacher: nn.Module,
        distill: Distill,
        student: nn.Module,
        example: torch.Tensor,
        generator: torch.Generator,
        count: int = 0,
    ) -> None:
        """Find the layers to compare, and make the projection that a hint needs.

        Args:
            teacher: In evaluation mode; it is not changed.
            example: Any input, ``(1, *input_shape)``; shows the shapes of the layers.
            generator: Draws the projection.
            count: Of the public examples, to which batches that say what they show refer.

        Raises:
            PlanError: If the kind compares hidden layers and a model has none.
        """
        self._teacher, self._distill = teacher, distill
        self._answers = Answers(teacher, distill.temperature, count)
        self._hint: Hint | None = None
        self._layers = ("", "")
        if "feature" in distill.terms or "relation" in distill.terms:
            spatial = "feature" in distill.terms
            found = [
                _last_hidden(model, example, spatial, name, distill.kind)
                for name, model in (("student", student), ("teacher", teacher))
            ]
            self._layers = (found[0][0], found[1][0])
            if spatial:
                self._hint = Hint(found[0][1], found[1][1], generator)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is learned beside the student: the projection, which is thrown away afterwards."""
        return [] if self._hint is None else list(self._hint.parameters())

    @property
    def modules(self) -> list[nn.Module]:
        """What must be on the device of the inputs: the teacher, and the projection."""
        return [self._teacher] if self._hint is None else [self._teacher, self._hint]

    def loss(
        self,
        student: nn.Module,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        seen: Seen | None = None,
    ) -> torch.Tensor:
        """Return the loss of a batch of inputs ``(n, *input_shape)`` and labels ``(n,)``.

        Where the batch says what it shows, and no hidden layers are compared, the teacher is not
        asked again about what it was asked before.
        """
        distill = self._distill
        with _watched(student, self._layers[0]) as own:
            logits = student(inputs)
        hard = F.cross_entropy(logits, labels)
        if seen is not None and not self._layers[1]:
            target, shown = self._answers(inputs, seen), []
        else:
            with _watched(self._teacher, self._layers[1]) as shown:
                target = softened(self._teacher, inputs, distill.temperature)
        terms: list[torch.Tensor] = []
        if "response" in distill.terms:
            terms.append(response_loss(logits, target, distill.temperature))
        if self._layers[0]:
            compare = relation_loss if self._hint is None else self._hint
            terms.append(compare(own[-1], shown[-1]))
        return (1 - distill.weight) * hard + distill.weight * torch.stack(terms).sum()


def _last_hidden(
    model: nn.Module, example: torch.Tensor, spatial: bool, name: str, kind: str
) -> tuple[str, torch.Size]:
    """Return name and output shape of the last layer before the logits.

    With ``spatial`` it is the last one that still has more than one pixel, if there is any.
    """
    shapes: dict[str, torch.Size] = {}
    training = model.training
    model.eval()
    outputs: list[tuple[str, torch.Tensor]] = []
    handles = [
        layer.register_forward_hook(_recorder(outputs, layer_name))
        for layer_name, layer in model.named_modules()
        if layer_name
    ]
    try:
        with torch.no_grad():
            logits = model(example)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    for layer_name, output in outputs:
        if output is not logits and output.ndim >= 2:
            shapes.pop(layer_name, None)
            shapes[layer_name] = output.shape
    pictures = {n: s for n, s in shapes.items() if len(s) == 4 and math.prod(s[2:]) > 1}
    found = pictures if spatial and pictures else shapes
    if not found:
        raise PlanError(
            f'student.distill.kind="{kind}": the {name} has no hidden layer to compare; use '
            '"response"'
        )
    return list(found.items())[-1]


def _recorder(
    outputs: list[tuple[str, torch.Tensor]], name: str
) -> Callable[[nn.Module, object, object], None]:
    def record(_layer: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, torch.Tensor):
            outputs.append((name, output))

    return record


@contextmanager
def _watched(model: nn.Module, layer: str) -> Iterator[list[torch.Tensor]]:
    """Collect the outputs of a named layer; of none if the name is empty."""
    outputs: list[tuple[str, torch.Tensor]] = []
    seen: list[torch.Tensor] = []
    if not layer:
        yield seen
        return
    handle = model.get_submodule(layer).register_forward_hook(_recorder(outputs, layer))
    try:
        yield seen
    finally:
        handle.remove()
        seen.extend(output for _, output in outputs)


def _distances(points: torch.Tensor) -> torch.Tensor:
    distances = F.pdist(points)
    return distances / distances.mean().clamp_min(_TINY)


def _cosines(points: torch.Tensor) -> torch.Tensor:
    """Return ``(j, i, k)`` cosines between the directions from j to i and from j to k."""
    apart = F.normalize(points[None, :, :] - points[:, None, :], dim=2, eps=_TINY)
    return apart @ apart.transpose(1, 2)
