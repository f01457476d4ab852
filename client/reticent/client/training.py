"""Local training: from a broadcast model and private examples to one pseudo-gradient."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from reticent.compression.quantize import training_swap
from reticent.compression.stacked import stacked_rounding
from reticent.compression.structure import student_of
from reticent.core.errors import PayloadError
from reticent.core.personal import split_of
from reticent.core.plan import Plan
from reticent.core.protocol import Constants
from reticent.core.seeds import layers_draw
from reticent.core.tasks import Examples, Task
from reticent.core.update import Layout, Vector
from reticent.privacy.clipping import (
    ClippedGradients,
    Loss,
    OwnGradients,
    chain_of,
    method_of,
    own_chain_of,
)
from reticent.privacy.clipping.trial import draws_numbers
from reticent.privacy.randomness import Randomness

from .accelerated import accelerated
from .local_rules import PLAIN, LocalRule
from .losses import loss_of
from .resources import training_bytes
from .steps import Client, NoisyStep, drawing
from .together import Together, expected_batch, reason_alone, shares_weights
from .whole import require_whole


def student_model(task: Task, plan: Plan, constants: Constants | None = None) -> nn.Module:
    """Return an untrained student in the shape that is trained federatedly: norm-free or GroupNorm.

    Batch normalisation, used only while the student is trained on public data, is folded away. The
    run's constants are needed where the plan changes the student's layers.

    Raises:
        PayloadError: If their structure is not one that the plan and the task allow.
    """
    return student_of(task, plan, constants)


class LocalTrainer:
    """Everything about local training that does not depend on a client: build once, use often."""

    def __init__(
        self, plan: Plan, task: Task, constants: Constants, accelerator: str | None = None
    ) -> None:
        """Build the student and, where single gradients are bounded, what computes them.

        Args:
            plan: The plan.
            task: Its task.
            constants: The run's.
            accelerator: See :class:`.environment.Environment`; the student is one that
                :func:`.accelerated.unaccelerated` has nothing against.

        Raises:
            DataError: If the mask does not fit the student, the student mixes examples, or what is
                clipped and summed is not its gradient, of which only Opacus' hooks are not sure.
            PayloadError: If the soft labels are not those of the task's classes (a table that lacks
                a label would make training fail on the batches that hold it, and no others), the
                structure is not one that the plan and the task allow, or the personal layers have
                another size.
            PlanError: If the plan's personal layers are no layers of the student, or all of them.
        """
        _check_soft_labels(constants, task)
        self.plan, self._input_shape = plan, task.input_shape
        self._accelerator, self._expected = accelerator, expected_batch(plan, task)
        self._model = self._bare = student_model(task, plan, constants).train()
        # No layer that a chain may have does.
        self._draws = chain_of(self._model) is None and draws_numbers(self._model, task.input_shape)
        whole = Layout.of(self._model)
        self.layout = Layout(whole.names, whole.shapes, constants.kept)
        self.split = split_of(self.layout, plan.federation.local.personal)
        self.layers: Vector = self.split.kept(constants.personal)
        self._soft = torch.from_numpy(constants.soft_labels) if constants.soft_labels.size else None
        self._swap = training_swap(plan.student.quantize)
        if plan.private is not None and plan.private.unit == "example":
            # Refuses a student now that could not be trained, or not rightly, after the charge.
            bare = copy.deepcopy(self._model)
            if self._clipped.method == "hooks":  # they are on the model now, and on its copies
                self._bare = bare
                require_whole(bare, plan, task)

    @property
    def steps(self) -> int:
        """Local steps of a round."""
        return self.plan.federation.steps_per_round

    def needed_bytes(self, nominal_examples: int) -> int:
        """Return an upper estimate of the memory of a round, from public constants alone."""
        made: list[int] = []

        def count(_: nn.Module, __: object, output: object) -> None:
            made.extend(t.numel() for t in _tensors(output))

        layers = [m for m in self._model.modules() if not list(m.children())]
        hooks = [layer.register_forward_hook(count) for layer in layers]
        try:
            with torch.no_grad():
                self._model(torch.zeros(1, *self._input_shape))
        finally:
            for hook in hooks:
                hook.remove()
        private = self.plan.private
        clips = private is not None and private.unit == "example"
        batch = self.plan.federation.sampling_rate * nominal_examples
        return training_bytes(self.layout.total, sum(made), batch, bounded=clips)

    @cached_property
    def _clipped(self) -> ClippedGradients:
        private = self.plan.private
        clipping = private.clipping if private else "flat"
        shape = self._input_shape
        return ClippedGradients(self._model, self.layout, clipping=clipping, shape=shape)

    def pseudo_gradient(
        self,
        start: Vector,
        examples: Examples,
        step: NoisyStep,
        randomness: Randomness,
        path: tuple[str | int, ...],
        rule: LocalRule = PLAIN,
    ) -> Vector:
        """Run the plan's local steps from ``start`` and return the sum of the noised steps.

        Each step draws a Poisson batch at the plan's rate, sums the clipped gradients, adds
        N(0, noise^2) to every coordinate (on empty batches too), divides by the public
        denominator, adds what the rule adds and moves along it. Neither the scale, nor the size,
        nor the number of steps depends on how many examples the client holds.

        Args:
            start: The broadcast parameters, float32 ``(size,)``.
            examples: All private examples of the client.
            step: Public constants.
            randomness: Source of batches and noise.
            path: Names the streams: run, round and client.
            rule: What is added to each noised gradient.

        Returns:
            float32 ``(size,)``: with one plain step, the noised mean gradient at ``start``.
        """
        client = Client(examples, randomness, path, rule)
        return self.pseudo_gradients(start, [client], step)[0]

    def pseudo_gradients(
        self, start: Vector, clients: Sequence[Client], step: NoisyStep
    ) -> list[Vector]:
        """Return what :meth:`pseudo_gradient` does for each of many clients, up to rounding.

        Where :attr:`alone` is None, one pass goes through the batches of several clients: of all
        of them where they share their weights, as in a single bounded step, and otherwise as
        :mod:`.together` says. The same clients in the same order give the same bits, also of a
        student whose layers draw (:func:`.steps.drawing`): these draw once for each common pass,
        so that such a student's sums are not those of clients alone.
        """
        if self._accelerator is None:
            if shares_weights(self.plan) and self.alone is None:
                return self._one_step(start, clients, step)
            # In this order: a device alone need not try what passes of several would take.
            if len(clients) == 1 or self.alone is not None:
                return [self._steps(client.begins(start), client, step) for client in clients]
        with self._drawing(clients):
            return self._together.pseudo_gradients(start, clients, step)

    def _drawing(self, clients: Sequence[Client]) -> AbstractContextManager[object]:
        return drawing(clients, self._accelerator) if self._draws else nullcontext()

    @cached_property
    def alone(self) -> str | None:
        """Why clients are trained one by one; None if passes go through several's batches."""
        if self._accelerator is not None:
            return None
        hooked = shares_weights(self.plan) and self._clipped.method == "hooks"
        return reason_alone(self.plan, self._bare, self._input_shape, self._expected, hooked)

    @cached_property
    def leaves_generator(self) -> bool:
        """Whether torch's global generator is left alone from now on while clients are trained.

        A thread that loads others' examples may then draw from it.
        """
        _ = self.alone  # its trial moves the generator, and puts it back
        return not self._draws

    @cached_property
    def _together(self) -> Together:
        private, rounding = (
            self.plan.private,
            stacked_rounding(self._bare, self.plan.student.quantize),
        )
        clipping = private.clipping if private else "flat"
        if self._accelerator is None and own_chain_of(self._bare) is not None:
            own = OwnGradients(self._bare, self.layout, clipping=clipping)
        else:
            own = accelerated(self._bare, self.layout, clipping, self._accelerator or "cpu")
        return Together(own, self.plan.federation, self._loss, rounding)

    def _one_step(self, start: Vector, clients: Sequence[Client], step: NoisyStep) -> list[Vector]:
        """Return the clients' only steps, which they all take from ``start``."""
        batches = [client.batch(0, self.plan.federation.sampling_rate) for client in clients]
        with self._drawing(clients):
            sums = self._gradient_sums(start, batches, step.clip)
        moved = (
            client.rule.corrected(client.noised(row, 0, step), start)
            for row, client in zip(sums, clients, strict=True)
        )
        # As _steps adds to zeros: -0.0 becomes 0.0.
        return [(row + 0.0).astype(np.float32) for row in moved]

    def _steps(self, start: Vector, client: Client, step: NoisyStep) -> Vector:
        federation = self.plan.federation
        weights, total = start, np.zeros(self.layout.size, dtype=np.float64)
        with self._drawing([client]):
            for index in range(self.steps):
                batch = client.batch(index, federation.sampling_rate)
                gradient = self._gradient_sums(weights, [batch], step.clip)[0]
                gradient = client.rule.corrected(client.noised(gradient, index, step), weights)
                total += gradient
                weights = (weights - federation.learning_rate * gradient).astype(np.float32)
        return total.astype(np.float32)

    def _gradient_sums(
        self, weights: Vector, batches: Sequence[Examples], clip: float | None
    ) -> NDArray[np.float32]:
        """Return each client's gradient sum at ``weights``, float32 ``(clients, size)``."""
        counts = [len(batch.labels) for batch in batches]
        if not sum(counts):
            return np.zeros((len(batches), self.layout.size), dtype=np.float32)
        self.layout.write(self._model, weights)
        inputs = torch.cat([batch.inputs for batch in batches])
        labels = torch.cat([batch.labels for batch in batches])
        if clip is not None:
            return self._clipped.sums(inputs, labels, counts, self._loss, clip, self._swap)
        with self._swap(self._model):
            loss = self._loss(self._model(inputs), labels)
            parameters = list(self._model.parameters())
            gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        return self.layout.gather(list(gradients))[None]

    @property
    def _loss(self) -> Loss:
        return loss_of(self.plan.student.distill, self._soft)


def trained_alone(plan: Plan, task: Task, constants: Constants | None = None) -> str | None:
    """Return why a simulation trains clients one by one; None if it trains many in one pass.

    Constants are needed where the plan changes the student's layers; a sketch of them will do.
    """
    with layers_draw(bytes(8)):  # a layer that is made draws, too
        model = student_model(task, plan, constants)
        hooked = shares_weights(plan) and method_of(model, task.input_shape)[0] == "hooks"
    return reason_alone(plan, model, task.input_shape, expected_batch(plan, task), hooked)


def _tensors(output: object) -> list[torch.Tensor]:
    """Return the tensors in what a layer returned: recurrent ones return tuples."""
    if isinstance(output, torch.Tensor):
        return [output]
    parts = cast(tuple[object, ...], output) if isinstance(output, tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def require_whole_gradients(plan: Plan, task: Task, constants: Constants | None = None) -> None:
    """Check the plan's student as :func:`.whole.require_whole` does.

    Raises:
        DataError: If what is clipped and summed is not its gradient.
    """
    require_whole(student_model(task, plan, constants), plan, task)


def _check_soft_labels(constants: Constants, task: Task) -> None:
    rows = len(constants.soft_labels)
    if rows not in (0, task.classes):
        raise PayloadError(f"constants.soft_labels has {rows} rows: must have {task.classes}")
