"""Auditing client-level privacy: canary clients through the server's own strategy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from flwr.app import Message, RecordDict
from numpy.typing import NDArray

from reticent.client.order import round_event
from reticent.client.records import pack
from reticent.client.wire import update_step
from reticent.compression.codec import Codec, build_codec
from reticent.core.plan import Local, Plan
from reticent.core.protocol import Constants, Order
from reticent.core.seeds import derive_key, numpy_generator
from reticent.core.tasks import Task
from reticent.core.update import Layout
from reticent.privacy.client_level import with_bit
from reticent.privacy.events import Event
from reticent.privacy.randomness import SeededRandomness
from reticent.privacy.schedule import Schedule, schedule_for
from reticent.server.optimizer import ServerState
from reticent.server.strategy import PrivateAveraging, RoundPlan, Tally

from .audit_canaries import REACH, Canaries
from .audit_examples import Observed, canary_layout
from .grid import InProcessGrid, client_of, enter_task

Floats = NDArray[np.float64]

_COLUMNS = 4096


def observe_clients(
    plan: Plan, task: Task, schedule: Schedule, count: int, rounds: int, seed: int
) -> Observed:
    """Run ``rounds`` rounds of the server with canary clients and return what it released.

    Each canary is a client whose update is its direction at :data:`REACH` times the bound; one
    whose coin left it out stays silent (under replace-one it sends the opposite). Everything from
    the arrival of a reply to the noised sum is the server's own: decoding, the bound, the sum, the
    noise and the movement of an adaptive bound (:class:`reticent.server.strategy.PrivateAveraging`,
    on the simulation's grid). All canaries are asked in every round, so the round is as large as
    their number; the promise to one client does not depend on how many others there are.
    """
    layout = canary_layout(plan, task, seed)
    canaries = Canaries.draw(layout.size, count, seed)
    audited = _plan(plan, schedule, count, rounds, seed)
    own = schedule_for(audited)
    if own is None:  # excluded by the caller: a plan without privacy has no schedule at all
        raise ValueError("the plan has no privacy")
    constants = Constants(layout.kept, np.zeros((0, 0), dtype=np.float32)).encode()
    strategy_plan = RoundPlan(
        run="audit",
        schedule=own,
        denominator=1.0,
        layout=layout,
        constants=constants,
        constants_digest=hashlib.sha256(constants).hexdigest(),
        randomness=SeededRandomness(audited.seed),
    )
    released = _Released()
    zero = ServerState.begin(np.zeros(layout.size, dtype=np.float32), own.clip)
    clients = _CanaryClients(audited, layout, canaries, own.relation == "replace-one")
    enter_task()
    PrivateAveraging(audited, strategy_plan, zero, released.keep).start(
        InProcessGrid(count, clients)
    )
    sums = np.stack(released.sums)
    exact = build_codec(plan.updates.codec).error != "dependent"
    return Observed(
        canaries,
        np.stack([canaries.project(total) for total in sums]),
        own.sum_multiplier,
        tuple(clients.events),
        sums[:, canaries.free[:_COLUMNS]],
        own.sum_multiplier**2 if exact else None,
    )


def _plan(plan: Plan, schedule: Schedule, count: int, rounds: int, seed: int) -> Plan:
    """Return the plan with the audit's clients and rounds, and the noise that it had before."""
    own = int.from_bytes(derive_key(seed, "audit", plan.digest, count)[:7], "big")
    sizes = {"clients_per_round": count, "min_replies": 1, "rounds": rounds, "retries": 0}
    sizes |= {"local": Local()}  # what canary clients send does not depend on it
    noise = {"epsilon": None, "noise_multiplier": schedule.noise_multiplier}
    return plan.model_copy(
        update={
            "seed": own,
            "task": plan.task.model_copy(update={"clients": count}),
            "federation": plan.federation.model_copy(update=sizes),
            "privacy": plan.private and plan.private.model_copy(update=noise),
        }
    )


class _Released:
    """Keeps what the server made public: noised sums over the bound that was in force."""

    def __init__(self) -> None:
        self.sums: list[Floats] = []

    def keep(self, state: ServerState, tally: Tally, seconds: float) -> None:
        if tally.noised is None:
            raise ValueError("the server added no noise")
        denominator = tally.asked
        self.sums.append(tally.noised.mean * denominator / tally.noised.clip)


class _CanaryClients:
    """A backend of the grid that answers for canary clients."""

    window = 256

    def __init__(self, plan: Plan, layout: Layout, canaries: Canaries, replace: bool) -> None:
        self.events: list[Event] = []
        self._plan, self._layout = plan, layout
        self._canaries, self._replace = canaries, replace
        self._codec: Codec = build_codec(plan.updates.codec, layout)
        self._last = 0
        self._payloads: dict[tuple[int, float], bytes] = {}

    def answer(self, messages: list[Message]) -> Iterator[Message]:
        for message in messages:
            order = Order.from_config(dict(message.content.config_records["order"]))
            self._charge(order)
            client = client_of(message.metadata.dst_node_id)
            if self._canaries.coins[client] or self._replace:
                known = (client, order.clip)
                if known not in self._payloads:
                    self._payloads[known] = self._payload(*known)
                update = pack(self._payloads[known])
                yield Message(RecordDict({"update": update}), reply_to=message)

    def _charge(self, order: Order) -> None:
        """Note what a device of this plan charges itself for the order: once a round."""
        if order.round != self._last:
            self._last = order.round
            self.events.append(round_event(self._plan, order.noise_multiplier))

    def _payload(self, client: int, clip: float) -> bytes:
        sign = 1.0 if self._canaries.coins[client] else -1.0
        length = np.array([sign * REACH * clip])
        update = self._canaries.vectors(np.array([client]), length)[0].astype(np.float32)
        generator = numpy_generator(self._plan.seed, "audit", "codec", client)
        step = update_step(clip, len(update), self._plan.updates.step)
        payload = self._codec.encode(update, self._layout.blocks, generator, step)
        private = self._plan.private
        adaptive = private is not None and private.clip_quantile is not None
        return with_bit(payload, inside=False) if adaptive else payload
