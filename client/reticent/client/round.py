"""One round on one client: check, charge, train, encode, release."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from flwr.app import RecordDict

from reticent.compression.codec import Codec, build_codec
from reticent.core.errors import DataError, PayloadError, PlanError, PrivacyError
from reticent.core.plan import Plan, plan_from_json
from reticent.core.protocol import Constants, Order, Refusal
from reticent.core.tasks import Task, load_task
from reticent.core.update import Layout, Vector
from reticent.privacy.client_level import ClipRule, clipped, finite, is_within, with_bit
from reticent.privacy.events import DeclaredPublic, Event, NonPrivate
from reticent.privacy.ledger import BudgetExceeded
from reticent.privacy.release import Released
from reticent.privacy.schedule import schedule_with

from .downlink import ModelMissing, changed, remember
from .environment import Environment
from .local_state import LocalState, kept
from .training import LocalTrainer
from .wire import Wire, noisy_step, wire_of


class Refused(Exception):
    """The round is not trained, for a reason that has a fixed code."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.text)
        self.refusal = refusal


@dataclass(frozen=True)
class Site:
    """What one process keeps between rounds for one plan; everything in it is public or lazy."""

    plan: Plan
    task: Task
    trainer: LocalTrainer
    codec: Codec
    broadcast: Codec
    delta: Codec | None
    control: Codec

    @property
    def travels(self) -> Layout:
        """Layout of what is broadcast and sent."""
        return self.trainer.split.travels


@lru_cache(maxsize=4)
def _plan(text: str) -> Plan:
    return plan_from_json(text)


@lru_cache(maxsize=2)
def _site(plan_text: str, constants: bytes) -> Site:
    plan = _plan(plan_text)
    task = load_task(plan.task, plan.seed)
    trainer = LocalTrainer(plan, task, Constants.decode(constants))
    updates, layout = plan.updates, trainer.split.travels
    up, down = build_codec(updates.codec, layout), build_codec(updates.whole, layout)
    delta = build_codec(updates.delta, layout) if updates.delta else None
    return Site(plan, task, trainer, up, down, delta, build_codec(updates.broadcast, layout))


@lru_cache(maxsize=2)
def _broadcast(codec: Codec, payload: bytes, blocks: tuple[int, ...]) -> Vector:
    return codec.decode(payload, blocks)


def check_order(order: Order, plan_text: str) -> Plan:
    """Return the client's own plan if the order belongs to it.

    Raises:
        Refused: If the order names another plan, or its noise or clip contradicts the plan.
    """
    try:
        plan = _plan(plan_text)
    except PlanError as error:
        raise Refused(Refusal.WRONG_PLAN) from error
    if order.plan != plan.digest:
        raise Refused(Refusal.WRONG_PLAN)
    if (order.noise_multiplier > 0) != (plan.private is not None):
        raise Refused(Refusal.BAD_ORDER)
    if not allows_clip(plan, order.clip):
        raise Refused(Refusal.BAD_ORDER)
    return plan


def allows_clip(plan: Plan, clip: float) -> bool:
    """Return whether an order of ``plan`` may have this bound: the plan's, or one it can become."""
    privacy = plan.private
    if privacy is None:
        return clip == 0
    return ClipRule(privacy.clip, privacy.clip_quantile).allows(clip)


def _model(site: Site, payload: bytes, marks: bytes, state: RecordDict) -> Vector:
    """Return the model to train on; where the plan sends changes, keep it for the next one."""
    blocks = site.travels.blocks
    if site.delta is None:
        return _broadcast(site.broadcast, payload, blocks)
    if marks:
        model = changed(site.delta, payload, marks, blocks, state)
    else:
        model = _broadcast(site.broadcast, payload, blocks)
    remember(state, model)
    return model


def _control(site: Site, payload: bytes) -> Vector:
    """Return the server's control variate, float32 ``(travels.size,)``; empty without them."""
    if not site.plan.federation.local.scaffold:
        return np.zeros(0, dtype=np.float32)
    return _broadcast(site.control, payload, site.travels.blocks)


def run_round(
    order: Order,
    plan_text: str,
    constants: bytes,
    payload: bytes,
    environment: Environment,
    marks: bytes = b"",
    state: RecordDict | None = None,
    control: bytes = b"",
) -> Released[bytes]:
    """Run one round and return what is released.

    ``payload`` is a whole model, or with ``marks`` a change of the one in ``state``
    (:mod:`.downlink`). ``control`` is the server's control variate, where the plan has them.

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
        common = _control(site, control)
    except ModelMissing as error:
        raise Refused(Refusal.MODEL_MISSING) from error
    except PayloadError as error:
        raise Refused(Refusal.BAD_BROADCAST) from error
    try:
        event = _charge(order, plan, environment)
        if stored := _stored(order, environment):
            return Released(stored, event)
        encoded = _train(order, site, start, common, environment)
        _store(order, environment, encoded)
    except BudgetExceeded as error:
        raise Refused(Refusal.BUDGET) from error
    except PrivacyError as error:  # damaged, or it counts in another unit or relation
        raise Refused(Refusal.LEDGER) from error
    return Released(encoded, event)


def round_event(plan: Plan, noise_multiplier: float) -> Event:
    """Return the event of one round of ``plan``.

    Raises:
        PlanError: If an adaptive bound's count alone reveals more than the noise multiplier allows.
        PrivacyError: If no event may have this noise multiplier.
    """
    schedule = schedule_with(plan, noise_multiplier)
    return NonPrivate() if schedule is None else schedule.round_event()


def charges(plan: Plan, noise_multiplier: float, round: int) -> list[tuple[int, Event]]:
    """Return the rounds to charge before ``round`` is trained, in order, each with its event.

    One, the round itself, as :func:`round_event` says; except where the sampling of clients is
    counted (``privacy.secret_cohort``). A sampled round costs a client what it does whether the
    client is drawn or not, so charging only rounds in which it is would count too little: the
    first order charges every round in which the client may be drawn, as round 0, and each round
    itself is then an entry that spends nothing.

    Raises:
        PlanError: If an adaptive bound's count alone reveals more than the noise multiplier allows.
        PrivacyError: If no event may have this noise multiplier.
    """
    schedule, event = schedule_with(plan, noise_multiplier), round_event(plan, noise_multiplier)
    if schedule is None or not schedule.secret:
        return [(round, event)]
    whole = schedule.over(event, schedule.participations)
    return [(0, whole), (round, DeclaredPublic("a round of a run that was charged whole, before"))]


def _charge(order: Order, plan: Plan, environment: Environment) -> Event:
    try:
        due = charges(plan, order.noise_multiplier, order.round)
    except (PlanError, PrivacyError) as error:  # no event has this noise: it is impossible
        raise Refused(Refusal.BAD_ORDER) from error
    for number, event in due:
        environment.ledger.charge(environment.device, order.run, number, event, environment.budget)
    return due[0][1]


def _stored(order: Order, environment: Environment) -> bytes | None:
    """Return the bytes that were released for this round before, if they are kept."""
    if not environment.keeps_releases:
        return None
    return environment.own_ledger.stored_release(environment.device, order.run, order.round)


def _store(order: Order, environment: Environment, encoded: bytes) -> None:
    if environment.keeps_releases:
        environment.own_ledger.store_release(environment.device, order.run, order.round, encoded)


def _train(
    order: Order, site: Site, start: Vector, control: Vector, environment: Environment
) -> bytes:
    trainer, privacy = site.trainer, site.plan.private
    try:
        examples = site.task.client(environment.client)
    except DataError as error:
        raise Refused(Refusal.NO_DATA) from error
    path = (order.run, environment.client, order.round)
    step = noisy_step(site.plan, order)
    own = LocalState.before(order, trainer, environment)
    whole = trainer.split.whole(start, own.layers)
    rule = own.rule(trainer, whole, control)
    # Where single gradients are not clipped, training may diverge: the update is then neutralised.
    with np.errstate(over="ignore", invalid="ignore"):
        total = trainer.pseudo_gradient(whole, examples, step, environment.randomness, path, rule)
        own.keep_layers(order, trainer, total)
    update = trainer.split.shared(total)
    # The seed of the dither comes from the same source as the noise: on a device nobody can guess
    # it, and only the server reads it from the payload.
    key = int.from_bytes(environment.randomness.stream("codec", *path).bytes(16), "big")
    generator = np.random.Generator(np.random.Philox(key=key))
    wire, blocks = wire_of(site.plan, step, order.clip, len(update)), site.travels.blocks
    if site.plan.updates.error_feedback:
        return _with_feedback(order, site, wire, update, generator, environment)
    bounds = privacy is not None and privacy.unit == "client"
    bounded = clipped(update, order.clip).astype(np.float32) if bounds else update
    encoded = wire.encode(site.codec, bounded, blocks, generator)
    if site.plan.federation.local.scaffold:
        sent = site.codec.decode(encoded, blocks)
        own.keep_variate(order, site.plan, control, clipped(sent, order.clip) if bounds else sent)
    if privacy is None or privacy.clip_quantile is None:
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

    Error feedback (Seide et al. 2014; Karimireddy et al. 2019, algorithm 2): a device encodes its
    update plus what the codec left out of the ones before. ``update`` holds its noise already (the
    plan refuses anything else), so this is post-processing.
    """
    blocks = site.travels.blocks
    residuals = kept("residuals", order, environment)
    wanted = update + residuals.before(order.round, np.zeros_like(update))
    payload = wire.encode(site.codec, wanted, blocks, generator)
    residuals.keep(order.round, wanted - site.codec.decode(payload, blocks))
    return payload
