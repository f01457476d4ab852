"""Auditing example-level privacy: canary gradients through the client's own round."""

from __future__ import annotations

import hashlib
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from reticent.client.round import run_round
from reticent.compression.codec import Codec, build_codec
from reticent.core.plan import Local, Plan
from reticent.core.protocol import PROTOCOL, Constants, Order
from reticent.core.seeds import derive_key, numpy_generator
from reticent.core.tasks import Task
from reticent.core.update import Layout, Vector
from reticent.privacy.events import Event
from reticent.privacy.ledger import Budget, Ledger
from reticent.privacy.schedule import Schedule
from reticent.server.optimizer import Accumulator
from reticent.server.shrinking import sketch

from .audit_canaries import HOLDER, TASK, Canaries, CanaryTask, registered
from .devices import Devices, device_name, devices_for

Floats = NDArray[np.float64]

_CLIENTS_WITHOUT_SHARES = 4
_NOISE_ROWS, _NOISE_COLUMNS = 1536, 512


@dataclass(frozen=True, eq=False)
class Observed:
    """What an attacker saw, and what the ledger says about it.

    Attributes:
        canaries: The canaries and their coins.
        projections: Released sums along each canary over the clip, float64 ``(rounds, m)``.
        noise_multiplier: The promised noise of a step along a canary, over the clip.
        events: What one device that holds canaries was charged.
        noise: Coordinates of releases without canaries, ``(releases, coordinates)``.
        variance: What the variance of ``noise`` should be; None if the codec hides it.
    """

    canaries: Canaries
    projections: Floats
    noise_multiplier: float
    events: tuple[Event, ...]
    noise: Floats
    variance: float | None


def observe_examples(
    plan: Plan, task: Task, schedule: Schedule, count: int, rounds: int, seed: int
) -> Observed:
    """Run ``rounds`` rounds of clients, one of which holds canaries, and return what was released.

    Every step is the client's own: the ledger's charge, Poisson sampling, per-example clipping,
    noise, denominator and codec (:func:`reticent.client.round.run_round`). The model that is sent
    is zero, which the promise allows like any other. Under ``aggregator`` trust what counts as
    released is the sum over a quorum, as the server forms it; under ``local`` trust each client's
    own update.
    """
    layout = canary_layout(plan, task, seed)
    canaries = Canaries.draw(layout.size, count, seed)
    replaced = schedule.relation == "replace-one"
    held = CanaryTask(plan.task, layout, canaries, schedule.clip, replaced)
    # The seed names the task, the streams and the site that the client keeps between rounds.
    own = int.from_bytes(derive_key(seed, "audit", plan.digest, count)[:7], "big")
    audited = plan.model_copy(
        update={
            "task": plan.task.model_copy(update={"name": TASK}),
            "student": plan.student.unshaped,
            # What it adds comes after the noise, and personal layers are noised like the others.
            "federation": plan.federation.model_copy(update={"local": Local()}),
            "seed": own,
        }
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with registered(own, held), _scratch() as folder, Ledger.open(Path(folder)) as ledger:
            session = _Session(audited, task, schedule, layout, canaries, ledger)
            return session.observe(rounds)
    finally:
        torch.set_num_threads(threads)


def canary_layout(plan: Plan, task: Task, seed: int) -> Layout:
    """Return the layout of the plan's student, with a random mask of the plan's sparsity.

    The real mask needs training, and which coordinates it keeps does not matter here.
    """
    layout = Layout.of(sketch(plan, task))
    prune = plan.student.prune
    if prune.kind == "none" or prune.sparsity == 0:
        return layout
    wide = np.concatenate(
        [np.full(n, len(s) > 1) for n, s in zip(layout.sizes, layout.shapes, strict=True)]
    )
    draws = numpy_generator(seed, "audit", "mask").random(layout.total)
    kept = ~(wide & (draws < prune.sparsity))
    return Layout(layout.names, layout.shapes, np.packbits(kept).tobytes())


def _scratch() -> tempfile.TemporaryDirectory[str]:
    """Return a folder for the audit's ledger, in memory where there is one: nothing outlives it."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(
        prefix="reticent-audit-", dir=memory if memory.is_dir() else None
    )


class _Session:
    """One audit: the server's part of it."""

    def __init__(
        self,
        plan: Plan,
        task: Task,
        schedule: Schedule,
        layout: Layout,
        canaries: Canaries,
        ledger: Ledger,
    ) -> None:
        self._plan, self._schedule = plan, schedule
        self._layout, self._canaries, self._ledger = layout, canaries, ledger
        self._text = plan.canonical()
        self._constants = Constants(layout.kept, np.zeros((0, 0), dtype=np.float32)).encode()
        self._denominator = plan.federation.sampling_rate * task.nominal_examples
        self._codec: Codec = build_codec(plan.updates.codec, layout)
        # Without a stop: what a device would refuse is not released, and cannot be audited.
        self._devices: Devices = replace(
            devices_for(plan, Path()), budget=Budget(math.inf, schedule.delta)
        )
        zero = np.zeros(layout.size, dtype=np.float32)
        broadcast = build_codec(plan.updates.whole, layout)
        self._payload = broadcast.encode(
            zero, layout.blocks, numpy_generator(plan.seed, "broadcast")
        )

    def observe(self, rounds: int) -> Observed:
        noise: list[Floats] = []
        sums = [self._round(number, rounds, noise) for number in range(1, rounds + 1)]
        scale = self._denominator / self._schedule.clip
        events = self._ledger.events(device_name(HOLDER))
        return Observed(
            self._canaries,
            np.stack([self._canaries.project(total) * scale for total in sums]),
            self._schedule.noise_multiplier,
            tuple(events),
            np.stack(noise),
            self._variance(),
        )

    def _round(self, number: int, rounds: int, noise: list[Floats]) -> Floats:
        """Return what the round released; keep some of its noise."""
        total = Accumulator(self._layout.size)
        shared = self._schedule.trust == "aggregator"
        most = min(self._plan.federation.clients_per_round, _CLIENTS_WITHOUT_SHARES)
        clients = self._plan.federation.quorum if shared else most
        columns = self._canaries.free[:_NOISE_COLUMNS]
        for client in range(clients):
            update = self._update(number, client).astype(np.float64)
            if shared or client == HOLDER:
                total.add(update)
            if client < max(2, _NOISE_ROWS // rounds):
                noise.append(update[columns])
        return total.total()

    def _update(self, number: int, client: int) -> Vector:
        released = run_round(
            self._order(number),
            self._text,
            self._constants,
            self._payload,
            self._devices.environment(client, self._ledger),
        )
        return self._codec.decode(released.value, self._layout.blocks)

    def _order(self, number: int) -> Order:
        return Order(
            protocol=PROTOCOL,
            run="audit",
            plan=self._plan.digest,
            round=number,
            constants=hashlib.sha256(self._constants).hexdigest(),
            noise_multiplier=self._schedule.noise_multiplier,
            denominator=self._denominator,
            clip=self._schedule.clip,
        )

    def _variance(self) -> float | None:
        """Return the promised variance of a coordinate of one client's update."""
        if self._codec.error == "dependent":
            return None
        s = self._schedule
        step = (s.share_multiplier * s.clip / self._denominator) ** 2
        # A uniform error has the variance of its width: the plan's share of the deviation.
        dither = step * self._plan.updates.step**2 / 12
        return s.steps * step + (dither if self._codec.error == "independent" else 0.0)
