"""The rounds of a plan, rehearsed on public examples: what its noise will do to a student.

How much a student loses to noise depends on how many coordinates are noised, so accuracy on public
data alone would choose the wrong one. A rehearsal runs the plan's own steps, clip, noise and server
optimizer: what one round sums over its clients is drawn here in one step from the public examples,
repeated to as many as the clients of a round hold by the plan. What is learned is less than from
fresh private examples, so the accuracy is a lower guess; the order of candidates is what counts.
What the codec of updates changes is part of it (:mod:`.sending`).
"""

from __future__ import annotations

import math

import torch

from reticent.client.training import LocalTrainer, NoisyStep
from reticent.core.errors import PlanError
from reticent.core.plan import Local, Plan
from reticent.core.protocol import Constants
from reticent.core.tasks import Examples, Task
from reticent.core.update import Vector
from reticent.privacy.randomness import SeededRandomness
from reticent.privacy.schedule import Schedule
from reticent.server.optimizer import ServerState, apply_round
from reticent.server.preparation import Start

from ..explain import planned_step
from .sending import Sending

MOST = 20_000  # examples of all clients of a round together; beyond, batch and noise are scaled


def require_rehearsal(plan: Plan) -> None:
    """Check that rounds of ``plan`` can be rehearsed.

    Raises:
        PlanError: If its unit is a client, whose updates depend on how data are dealt to clients,
            or its devices do more than follow the gradient, or its server more than average, which
            one client cannot show.
    """
    f = plan.federation
    for key, differs in (("local", f.local != Local()), ("robust", f.robust.kind != "mean")):
        if differs:
            raise PlanError(
                f"federation.{key}: a search rehearses rounds as one client, to which it means "
                "nothing: leave it out, and simulate the winner with it"
            )
    if plan.private is not None and plan.private.unit == "client":
        raise PlanError(
            'privacy.unit="client": a search rehearses rounds on public examples, which are dealt '
            'to no client; search with unit="example" (or privacy="off") and simulate the winner'
        )


def rehearse(plan: Plan, task: Task, start: Start, schedule: Schedule | None) -> Vector:
    """Return the deployed weights after the plan's rounds on public examples, ``(size,)``."""
    federation = plan.federation
    trainer = LocalTrainer(plan, task, Constants.decode(start.constants))
    held = federation.clients_per_round * task.nominal_examples
    share = min(1.0, MOST / held)
    examples = _repeated(task.public(), round(share * held))
    step = _step(plan, schedule, share, federation.sampling_rate * share * held)
    randomness = SeededRandomness(plan.seed)
    clip = schedule.clip if schedule else 0.0
    sending = Sending.of(plan, trainer.layout, planned_step(plan, task, schedule), clip)
    state = ServerState.begin(start.weights)
    for number in range(1, federation.rounds + 1):
        path = ("rehearsal", number)
        gradient = trainer.pseudo_gradient(state.weights, examples, step, randomness, path)
        mean = sending.mean(gradient, number)
        state = apply_round(state, mean, federation.server, federation.average)
    return state.average


def _step(plan: Plan, schedule: Schedule | None, share: float, denominator: float) -> NoisyStep:
    if schedule is None:
        return NoisyStep(None, 0.0, denominator)
    # What a full round's sum carries: one share from each of its clients.
    clients = plan.federation.clients_per_round
    noise = schedule.share_multiplier * schedule.clip * math.sqrt(clients)
    return NoisyStep(schedule.clip, share * noise, denominator)


def _repeated(examples: Examples, count: int) -> Examples:
    index = torch.arange(count) % len(examples.labels)
    return Examples(examples.inputs[index], examples.labels[index])
