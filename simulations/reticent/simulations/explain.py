"""What a plan costs before it is run: epsilon, bytes, time and memory."""

from __future__ import annotations

import math
import resource
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from reticent.client.training import LocalTrainer, NoisyStep, require_whole_gradients
from reticent.client.wire import wire_of
from reticent.compression.codec import build_codec
from reticent.core.plan import Plan
from reticent.core.protocol import Constants
from reticent.core.seeds import numpy_generator
from reticent.core.tasks import Task, load_task
from reticent.privacy.accounting import epsilon
from reticent.privacy.earlier import rounds_that_fit
from reticent.privacy.randomness import SeededRandomness
from reticent.privacy.schedule import Schedule, schedule_for
from reticent.server.finish import problem_of
from reticent.server.possible import require_possible
from reticent.server.shrinking import constants_of, sketch

from .accelerators import require_suited
from .admission import check_codecs, check_engine
from .cores import usable_cores
from .fleet import SimulatedFleet, check_fleet, fleet_for, granting, priced, require_filled
from .fleet.fleet import Charge
from .teams import worker_count

_TRIALS = 5


def check_plan(plan: Plan) -> tuple[Task, Schedule | None]:
    """Check what a plan names: task, student, codecs, privacy target.

    Of a buffered plan the whole schedule is gone through (:mod:`.fleet.buffered` says how long).

    Raises:
        ReticentError: Naming the part that does not fit.
    """
    task, schedule = _checked(plan)
    if plan.federation.buffered is not None:
        require_filled(plan, _expected_fleet(plan, task))
    return task, schedule


def _checked(plan: Plan) -> tuple[Task, Schedule | None]:
    check_codecs(plan)
    check_engine(plan)
    task = load_task(plan.task, plan.seed)
    require_possible(plan, task)
    constants = sketched_constants(plan, task)
    check_fleet(plan, LocalTrainer(plan, task, constants).layout.total)
    require_whole_gradients(plan, task, constants)
    require_suited(plan, task, constants)
    return task, schedule_for(plan)


def check_student(plan: Plan) -> None:
    """Check what a plan's student must be wherever it is trained, on real devices too.

    Raises:
        ReticentError: Naming what does not fit.
    """
    task = load_task(plan.task, plan.seed)
    require_possible(plan, task)
    require_whole_gradients(plan, task, sketched_constants(plan, task))


def explain_plan(plan: Plan) -> dict[str, Any]:
    """Return the price of a plan; bytes and seconds are measured on noise of the real size.

    Raises:
        ReticentError: If the plan cannot be run.
    """
    task, schedule = _checked(plan)
    constants = _half_mask(plan, task)
    trainer = LocalTrainer(plan, task, constants)
    step = planned_step(plan, task, schedule)
    up, down = encoded_bytes(plan, trainer, step, schedule)
    seconds = _step_seconds(trainer, task, step)
    federation = plan.federation
    messages = federation.rounds * federation.clients_per_round
    steps = messages * federation.steps_per_round
    return {
        "plan": plan.digest,
        "parameters": trainer.split.travels.size,
        "privacy": _privacy(plan, schedule),
        "bytes": {
            "up": up,
            "down": down,
            "fp32": 4 * trainer.layout.total,
            "total": messages * up + _all_down(plan, down, len(constants.encode())),
        },
        "no_artifact": problem_of(plan, sketch(plan, task)),
        "work": {
            "step_seconds": seconds,
            "steps": steps,
            "seconds": steps * seconds / worker_count(plan, usable_cores()),
            "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        },
        "fleet": priced(plan, _expected_fleet(plan, task)) if plan.fleet else None,
    }


def _all_down(plan: Plan, model: int, constants: int) -> int:
    """Return the bytes down of a run: a model to each that is asked, and to new ones constants."""
    federation, buffered = plan.federation, plan.federation.buffered is not None
    asked = federation.rounds * (federation.clients_per_round if buffered else plan.asked_per_round)
    return asked * model + min(plan.task.clients, asked) * constants


def planned_fleet(
    plan: Plan, task: Task, trainer: LocalTrainer, constants: int, charging: Charge
) -> SimulatedFleet:
    """Return the fleet of a plan that has one, with messages of the size of encoded noise.

    Args:
        plan: The plan.
        task: Its task.
        trainer: A trainer with the run's public constants, or with such as may be expected.
        constants: Bytes of the constants, which are sent with the first model.
        charging: Charges devices.
    """
    schedule = schedule_for(plan)
    step = planned_step(plan, task, schedule)
    up, down = encoded_bytes(plan, trainer, step, schedule)
    return fleet_for(plan, trainer.layout.total, (up, down), charging, constants)


def _expected_fleet(plan: Plan, task: Task) -> SimulatedFleet:
    """Return the fleet of a plan that has one, with constants as they may be expected."""
    constants = _half_mask(plan, task)
    trainer = LocalTrainer(plan, task, constants)
    return planned_fleet(plan, task, trainer, len(constants.encode()), granting)


def sketched_constants(plan: Plan, task: Task) -> Constants:
    """Return the constants of a run as far as they are known before training: no mask."""
    nothing = np.zeros((0, 0), dtype=np.float32)
    return constants_of(plan, task, sketch(plan, task), b"", nothing)


def _half_mask(plan: Plan, task: Task) -> Constants:
    """Return constants with a random mask of the plan's sparsity: the real one needs training."""
    constants = sketched_constants(plan, task)
    prune = plan.student.prune
    if prune.kind == "none" or prune.sparsity == 0:
        return constants
    layout = LocalTrainer(plan, task, constants).layout
    generator = numpy_generator(plan.seed, "explain")
    wide = np.concatenate(
        [np.full(n, len(s) > 1) for n, s in zip(layout.sizes, layout.shapes, strict=True)]
    )
    dropped = wide & (generator.random(layout.total) < prune.sparsity)
    return replace(constants, kept=np.packbits(~dropped).tobytes())


def planned_step(plan: Plan, task: Task, schedule: Schedule | None) -> NoisyStep:
    """Return the public constants of one client's step under ``plan``."""
    denominator = plan.federation.sampling_rate * task.nominal_examples
    if schedule is None or schedule.unit == "client":
        return NoisyStep(None, 0.0, denominator)
    return NoisyStep(schedule.clip, schedule.share_multiplier * schedule.clip, denominator)


def encoded_bytes(
    plan: Plan, trainer: LocalTrainer, step: NoisyStep, schedule: Schedule | None
) -> tuple[int, int]:
    """Return the bytes of one update up and one model down, of noise of the real size.

    With ``updates.delta`` a model down is the mean of a change and a whole model, as the clients of
    a round that were not in the one before, or are in the first, are sent the whole one.
    """
    layout = trainer.split.travels
    generator = numpy_generator(plan.seed, "explain", "bytes")
    noise = generator.standard_normal(layout.size).astype(np.float32)
    wire = wire_of(plan, step, schedule.clip if schedule else 0.0, layout.size)
    scale, bit = step.noise / step.denominator or 1.0, 0
    if schedule is not None and schedule.unit == "client":
        # An update at its bound, spread over all coordinates: real ones need somewhat fewer bytes.
        scale = schedule.clip / float(np.linalg.norm(noise))
        bit = schedule.clip_quantile is not None
    up = wire.encode(
        build_codec(plan.updates.codec, layout), noise * np.float32(scale), layout.blocks, generator
    )

    def size(stages: tuple[str, ...]) -> int:
        return len(build_codec(stages, layout).encode(noise, layout.blocks, generator))

    down = size(plan.updates.whole)
    if plan.updates.delta:
        f = plan.federation
        holders = f.clients_per_round / plan.task.clients * (1 - 1 / f.rounds)
        down = round(holders * size(plan.updates.delta) + (1 - holders) * down)
    if plan.federation.local.scaffold:
        down += size(plan.updates.broadcast)
    return len(up) + bit, down


def _step_seconds(trainer: LocalTrainer, task: Task, step: NoisyStep) -> float:
    """Return the median time of one client's round per step, on one thread, client 0's data."""
    examples = task.client(0)
    start = np.zeros(trainer.layout.size, dtype=np.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times: list[float] = []
    try:
        for trial in range(_TRIALS + 1):
            began = time.perf_counter()
            trainer.pseudo_gradient(start, examples, step, SeededRandomness(0), ("explain", trial))
            times.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return float(np.median(times[1:])) / trainer.steps


def _privacy(plan: Plan, schedule: Schedule | None) -> dict[str, Any]:
    if schedule is None:
        return {"trust": "off", "epsilon": "infinity", "server_epsilon": "infinity"}
    s, rounds = schedule, schedule.participations
    half = replace(s, noise_multiplier=s.noise_multiplier / 2)
    unsampled = s.earlier and replace(s.earlier, sampling_rate=1.0)
    always = replace(s, sampling_rate=1.0, earlier=unsampled)
    return {
        "trust": s.trust,
        "unit": s.unit,
        "relation": s.relation,
        "delta": s.delta,
        "noise_multiplier": s.noise_multiplier,
        "participations": rounds,
        "epsilon": _number(epsilon([s.over(s.round_event(), rounds)], s.delta)),
        "server_epsilon": _number(epsilon([s.over(s.server_event(), rounds)], s.delta)),
        "round_epsilon": _number(epsilon([s.round_event()], s.delta)),
        "weights_epsilon": None if s.earlier is None else _number(epsilon([s.earlier], s.delta)),
        "rounds_epsilon": _number(epsilon([s.round_event().times(rounds)], s.delta)),
        "half_noise_epsilon": _number(epsilon([s.over(half.round_event(), rounds)], s.delta)),
        "unamplified_epsilon": _number(epsilon([s.over(always.round_event(), rounds)], s.delta)),
        "rounds_that_fit": _rounds_that_fit(plan, s),
        "half_noise_rounds": _rounds_that_fit(plan, half),
    }


def _rounds_that_fit(plan: Plan, schedule: Schedule) -> int | None:
    """Return how many rounds of one client fit its budget, else the target; None without either."""
    privacy = plan.private
    limit = (privacy.budget or privacy.epsilon) if privacy else None
    if limit is None:
        return None
    return rounds_that_fit(schedule.earlier, schedule.round_event(), limit, schedule.delta)


def _number(value: float) -> float | str:
    return "infinity" if math.isinf(value) else value
