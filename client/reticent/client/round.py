"""One round on one client: check, charge, train, encode, release."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from flwr.app import RecordDict

from reticent.compression.codec import Codec, build_codec
from reticent.core.errors import DataError, PayloadError, PlanError, PrivacyError
from reticent.core.plan import Plan
from reticent.core.protocol import Constants, Order, Refusal
from reticent.core.tasks import Task, load_task
from reticent.core.update import Vector
from reticent.privacy.client_level import clipped, finite, is_within, with_bit
from reticent.privacy.events import Event
from reticent.privacy.ledger import BudgetExceeded
from reticent.privacy.release import Released

from .downlink import ModelMissing, changed, remember
from .environment import Environment
from .order import Refused, check_order, plan_of, round_event
from .residuals import Residuals
from .training import LocalTrainer
from .wire import Wire, noisy_step, wire_of


@dataclass(frozen=True)
class Site:
    """What one process keeps between rounds for one plan; everything in it is public or lazy."""

    plan: Plan
    task: Task
    trainer: LocalTrainer
    codec: Codec
    broadcast: Codec
    delta: Codec | None


@lru_cache(maxsize=2)
def _site(plan_text: str, constants: bytes) -> Site:
    plan = plan_of(plan_text)
    task = load_task(plan.task, plan.seed)
    trainer = LocalTrainer(plan, task, Constants.decode(constants))
    updates, layout = plan.updates, trainer.layout
    up, down = build_codec(updates.codec, layout), build_codec(updates.whole, layout)
    delta = build_codec(updates.delta, layout) if updates.delta else None
    return Site(plan, task, trainer, up, down, delta)


@lru_cache(maxsize=2)
def _broadcast(codec: Codec, payload: bytes, blocks: tuple[int, ...]) -> Vector:
    return codec.decode(payload, blocks)


def _model(site: Site, payload: bytes, marks: bytes, state: RecordDict) -> Vector:
    """Return the model to train on; where the plan sends changes, keep it for the next one."""
    blocks = site.trainer.layout.blocks
    if site.delta is None:
        return _broadcast(site.broadcast, payload, blocks)
    if marks:
        model = changed(site.delta, payload, marks, blocks, state)
    else:
        model = _broadcast(site.broadcast, payload, blocks)
    remember(state, model)
    return model


def run_round(
    order: Order,
    plan_text: str,
    constants: bytes,
    payload: bytes,
    environment: Environment,
    marks: bytes = b"",
    state: RecordDict | None = None,
) -> Released[bytes]:
    """Run one round and return what is released.

    ``payload`` is a whole model, or with ``marks`` a change of the one in ``state``
    (:mod:`.downlink`).

    Order of events: the whole round is charged and on disk before an example is touched; the
    encoded update is on disk (on a real device) before it is handed on.

    With unit ``client`` what is released is the bounded update itself, and with an adaptive bound
    one more bit: whether the update was within the bound. Both are protected by the noise that the
    server adds to their sums, and against the server by nothing.

    Raises:
        Refused: With a fixed code, when the round cannot or must not be run.
    """
    plan = check_order(order, plan_text)
    if hashlib.sha256(constants).hexdigest() != order.constants:
        raise Refused(Refusal.CONSTANTS_MISSING)
    try:
        site = _site(plan_text, constants)
        start = _model(site, payload, marks, RecordDict() if state is None else state)
    except ModelMissing as error:
        raise Refused(Refusal.MODEL_MISSING) from error
    except PayloadError as error:
        raise Refused(Refusal.BAD_BROADCAST) from error
    if environment.guard is not None:
        needed = site.trainer.needed_bytes(site.task.nominal_examples)
        environment.guard.require_room(needed)
    try:
        event = _charge(order, plan, environment)
        if stored := _stored(order, environment):
            return Released(stored, event)
        encoded = _train(order, site, start, environment)
        _store(order, environment, encoded)
    except BudgetExceeded as error:
        raise Refused(Refusal.BUDGET) from error
    except PrivacyError as error:  # damaged, or it counts in another unit or relation
        raise Refused(Refusal.LEDGER) from error
    return Released(encoded, event)


def _charge(order: Order, plan: Plan, environment: Environment) -> Event:
    try:
        event = round_event(plan, order.noise_multiplier)
    except (PlanError, PrivacyError) as error:  # no event has this noise: it is impossible
        raise Refused(Refusal.BAD_ORDER) from error
    environment.ledger.charge(environment.device, order.run, order.round, event, environment.budget)
    return event


def _stored(order: Order, environment: Environment) -> bytes | None:
    """Return the bytes that were released for this round before, if they are kept."""
    if not environment.keeps_releases:
        return None
    return environment.ledger.stored_release(environment.device, order.run, order.round)


def _store(order: Order, environment: Environment, encoded: bytes) -> None:
    if environment.keeps_releases:
        environment.ledger.store_release(environment.device, order.run, order.round, encoded)


def _train(order: Order, site: Site, start: Vector, environment: Environment) -> bytes:
    try:
        examples = site.task.client(environment.client)
    except DataError as error:
        raise Refused(Refusal.NO_DATA) from error
    path = (order.run, environment.client, order.round)
    step = noisy_step(site.plan, order)
    # Where single gradients are not clipped, training may diverge: the update is then neutralised.
    with np.errstate(over="ignore", invalid="ignore"):
        update = site.trainer.pseudo_gradient(start, examples, step, environment.randomness, path)
    # The seed of the dither comes from the same source as the noise: on a device nobody can guess
    # it, and only the server reads it from the payload.
    key = int.from_bytes(environment.randomness.stream("codec", *path).bytes(16), "big")
    generator = np.random.Generator(np.random.Philox(key=key))
    privacy, wire = site.plan.private, wire_of(site.plan, step, order.clip, len(update))
    blocks = site.trainer.layout.blocks
    if site.plan.updates.error_feedback:
        return _with_feedback(order, site, wire, update, generator, environment)
    if privacy is None or privacy.unit == "example":
        return wire.encode(site.codec, update, blocks, generator)
    bounded = clipped(update, order.clip).astype(np.float32)
    encoded = wire.encode(site.codec, bounded, blocks, generator)
    if privacy.clip_quantile is None:
        return encoded
    return with_bit(encoded, inside=is_within(finite(update), order.clip))


def _with_feedback(
    order: Order,
    site: Site,
    wire: Wire,
    update: Vector,
    generator: np.random.Generator,
    environment: Environment,
) -> bytes:
    """Encode ``update`` and what was left out before it, and keep what is left out now.

    ``update`` holds its noise already (the plan refuses anything else), so this is post-processing.
    """
    blocks = site.trainer.layout.blocks
    kept = Residuals(environment.ledger.folder / "residuals", environment.device, order.run)
    wanted = update + kept.before(order.round, len(update))
    payload = wire.encode(site.codec, wanted, blocks, generator)
    kept.keep(order.round, wanted - site.codec.decode(payload, blocks))
    return payload
