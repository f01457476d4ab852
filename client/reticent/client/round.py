"""One round on one client: check, charge, train, encode, release."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import numpy as np
from flwr.app import RecordDict

from reticent.compression.codec import Codec, build_codec
from reticent.core.errors import DataError, PayloadError, PlanError, PrivacyError
from reticent.core.plan import Plan
from reticent.core.protocol import Constants, Order, Refusal
from reticent.core.tasks import Examples, Task, load_task
from reticent.core.update import Layout, Vector
from reticent.privacy.client_level import clipped, finite, is_within, with_bit
from reticent.privacy.events import Event
from reticent.privacy.ledger import BudgetExceeded
from reticent.privacy.release import Released

from .downlink import ModelMissing, changed, remember
from .environment import Environment
from .local_state import LocalState, kept
from .order import Refused, charges, check_order, plan_of
from .request import Outcome, Request
from .steps import Client
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
    control: Codec

    @property
    def travels(self) -> Layout:
        """Layout of what is broadcast and sent."""
        return self.trainer.split.travels


@lru_cache(maxsize=2)
def _site(plan_text: str, constants: bytes, accelerator: str | None = None) -> Site:
    plan = plan_of(plan_text)
    task = load_task(plan.task, plan.seed)
    trainer = LocalTrainer(plan, task, Constants.decode(constants), accelerator)
    updates, layout = plan.updates, trainer.split.travels
    up, down = build_codec(updates.codec, layout), build_codec(updates.whole, layout)
    delta = build_codec(updates.delta, layout) if updates.delta else None
    return Site(plan, task, trainer, up, down, delta, build_codec(updates.broadcast, layout))


@lru_cache(maxsize=2)
def _broadcast(codec: Codec, payload: bytes, blocks: tuple[int, ...]) -> Vector:
    return codec.decode(payload, blocks)


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
    given = RecordDict() if state is None else state
    request = Request(order, constants, payload, environment, marks, given, control)
    outcome = run_rounds(plan_text, [request])[0]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def run_rounds(plan_text: str, requests: Sequence[Request]) -> list[Outcome]:
    """Run the rounds of many devices, and return for each what :func:`run_round` would, or raise.

    What does not depend on the device is done once for neighbours that are asked the same, and
    where :attr:`LocalTrainer.alone` is None these are trained in common passes: updates are then
    those of :func:`run_round` up to float32 rounding of gradients (:mod:`.together`), but for what
    layers draw (:func:`.steps.drawing`), and a function of who is in ``requests``, in which order,
    alone. If training fails, it is tried again
    one by one, so that no device's failure is another's.
    """
    blocks: list[_Block] = []
    for _, group in groupby(requests, key=lambda one: one.shared):
        block = _Block.of(plan_text, list(group))
        # Whether a model came whole or as a change must not matter for who trains with whom.
        if blocks and blocks[-1].is_like(block):
            blocks[-1].requests.extend(block.requests)
        else:
            blocks.append(block)
    return [outcome for block in blocks for outcome in _run_alike(block)]


@dataclass(frozen=True, eq=False)
class _Block:
    """Neighbours that train the same: on what, or why not at all."""

    requests: list[Request]
    about: tuple[Site, Common] | Exception

    @staticmethod
    def of(plan_text: str, requests: list[Request]) -> _Block:
        """Read what ``requests``, which are alike to the bit, are asked."""
        try:
            return _Block(requests, _site_of(plan_text, requests[0]))
        except Exception as error:
            return _Block(requests, error)

    def is_like(self, other: _Block) -> bool:
        """Return whether ``other`` is the same training."""
        if isinstance(self.about, Exception) or isinstance(other.about, Exception):
            return False
        (site, common), (its_site, its) = self.about, other.about
        return (
            site is its_site
            and self.requests[0].order == other.requests[0].order
            and np.array_equal(common.model, its.model)
            and np.array_equal(common.control, its.control)
        )


def _run_alike(block: _Block) -> list[Outcome]:
    """Run the rounds of devices that are asked the same."""
    if isinstance(block.about, Exception):
        return [block.about for _ in block.requests]
    site, common = block.about
    begun = [_begin(request, site.plan) for request in block.requests]
    ready = [one for one in begun if isinstance(one, _Begun)]
    ended = iter(_finish_all(site, common, ready))
    return [next(ended) if isinstance(one, _Begun) else one for one in begun]


@dataclass(frozen=True, eq=False)
class Common:
    """What all devices that are asked the same train on.

    Attributes:
        model: The broadcast parameters, float32 ``(travels.size,)``.
        control: The server's control variate, of the same size; empty without them.
    """

    model: Vector
    control: Vector


@dataclass(frozen=True)
class _Begun:
    """A round that is charged and on disk, and not trained yet."""

    request: Request
    event: Event


def _site_of(plan_text: str, request: Request) -> tuple[Site, Common]:
    """Check what is asked, and return what it is done with: the site and what came down."""
    order = request.order
    check_order(order, plan_text)
    if hashlib.sha256(request.constants).hexdigest() != order.constants:
        raise Refused(Refusal.CONSTANTS_MISSING)
    try:
        site = _site(plan_text, request.constants, request.environment.accelerator)
        model = _model(site, request.payload, request.marks, request.state)
        common = Common(model, _control(site, request.control))
    except ModelMissing as error:
        raise Refused(Refusal.MODEL_MISSING) from error
    except PayloadError as error:
        raise Refused(Refusal.BAD_BROADCAST) from error
    if (guard := request.environment.guard) is not None:
        guard.require_room(site.trainer.needed_bytes(site.task.nominal_examples))
    return site, common


def _begin(request: Request, plan: Plan) -> _Begun | Outcome:
    """Charge a round; where its release is stored already, that is the outcome."""
    try:
        event = _charge(request.order, plan, request.environment)
        stored = _stored(request.order, request.environment)
        return Released(stored, event) if stored else _Begun(request, event)
    except Exception as error:
        return _with_code(error)


def _finish_all(site: Site, common: Common, begun: Sequence[_Begun]) -> list[Outcome]:
    found = [_ready(site, common, one.request) for one in begun]
    clients = [one.client for one in found if isinstance(one, _Ready)]
    model = common.model
    ahead = begun[0].request.environment.ahead if clients else None
    if ahead is not None and site.trainer.leaves_generator:
        ahead.start(site.task)
    updates = iter(_updates(site, model, clients, begun[0].request.order) if clients else [])
    return [
        _finish(site, common, one, ready.own, next(updates)) if isinstance(ready, _Ready) else ready
        for one, ready in zip(begun, found, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class _Ready:
    """A client with its data, and what it kept of earlier rounds."""

    client: Client
    own: LocalState


def _ready(site: Site, common: Common, request: Request) -> _Ready | Exception:
    try:
        examples = _examples(site.task, request.environment)
    except DataError as error:
        return _because(Refusal.NO_DATA, error)
    except Exception as error:
        return error
    try:
        own = LocalState.before(request.order, site.trainer, request.environment)
        start = site.trainer.split.whole(common.model, own.layers)
        rule = own.rule(site.trainer, start, common.control)
    except Exception as error:
        return _with_code(error)
    randomness = request.environment.randomness
    return _Ready(Client(examples, randomness, request.path, rule, start), own)


def _examples(task: Task, environment: Environment) -> Examples:
    ahead, client = environment.ahead, environment.client
    return task.client(client) if ahead is None else ahead.take(task, client)


def _updates(
    site: Site, start: Vector, clients: Sequence[Client], order: Order
) -> Sequence[Vector | Exception]:
    """Train, all at once or, should that fail, one by one."""
    # Where single gradients are not clipped, training may diverge: the update is then neutralised.
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            return site.trainer.pseudo_gradients(start, clients, noisy_step(site.plan, order))
    except Exception as error:
        if len(clients) == 1:
            return [error]
    return [update for one in clients for update in _updates(site, start, [one], order)]


def _finish(
    site: Site, common: Common, begun: _Begun, own: LocalState, total: Vector | Exception
) -> Outcome:
    """Keep what stays on the device of the sum of its steps; encode and store the rest."""
    if isinstance(total, Exception):
        return _with_code(total)
    request = begun.request
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            own.keep_layers(request.order, site.trainer, total)
        update = site.trainer.split.shared(total)
        encoded = _encoded(site, update, request, common.control, own)
        _store(request.order, request.environment, encoded)
    except Exception as error:
        return _with_code(error)
    return Released(encoded, begun.event)


def _with_code(error: Exception) -> Exception:
    """Return the refusal that an exception stands for, or itself."""
    if isinstance(error, BudgetExceeded):
        return _because(Refusal.BUDGET, error)
    if isinstance(error, PrivacyError):  # damaged, or it counts in another unit or relation
        return _because(Refusal.LEDGER, error)
    return error


def _because(refusal: Refusal, error: Exception) -> Refused:
    refused = Refused(refusal)
    refused.__cause__ = error
    return refused


def _charge(order: Order, plan: Plan, environment: Environment) -> Event:
    try:
        due = charges(plan, order.noise_multiplier, order.run, order.round)
    except (PlanError, PrivacyError) as error:  # no event has this noise: it is impossible
        raise Refused(Refusal.BAD_ORDER) from error
    for one in due:
        environment.ledger.charge(
            environment.device, one.run, one.round, one.event, environment.budget
        )
    return next(one.event for one in due if one.run == order.run)


def _stored(order: Order, environment: Environment) -> bytes | None:
    """Return the bytes that were released for this round before, if they are kept."""
    if not environment.keeps_releases:
        return None
    return environment.own_ledger.stored_release(environment.device, order.run, order.round)


def _store(order: Order, environment: Environment, encoded: bytes) -> None:
    if environment.keeps_releases:
        environment.own_ledger.store_release(environment.device, order.run, order.round, encoded)


def _encoded(
    site: Site, update: Vector, request: Request, control: Vector, own: LocalState
) -> bytes:
    # The seed of the dither comes from the same source as the noise: on a device nobody can guess
    # it, and only the server reads it from the payload.
    order, environment = request.order, request.environment
    key = int.from_bytes(environment.randomness.stream("codec", *request.path).bytes(16), "big")
    generator = np.random.Generator(np.random.Philox(key=key))
    step, privacy = noisy_step(site.plan, order), site.plan.private
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
