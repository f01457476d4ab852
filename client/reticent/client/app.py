"""The Flower ClientApp, and the gate through which alone anything leaves a device."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable

from reticent.core.errors import DataError, LedgerError, PayloadError
from reticent.core.offer import RECEIPT_BYTES
from reticent.core.protocol import Order, Refusal
from reticent.privacy.release import Public, Released

from .environment import Environment
from .identity import RolledBack
from .order import Refused
from .records import pack, unpack
from .request import Outcome, Request

EnvironmentOf = Callable[[Context], Environment]
PlanOf = Callable[[Context], str]
Tell = Callable[[Exception, Message, Context], None]


def build_client_app(
    environment_of: EnvironmentOf,
    plan_of: PlanOf,
    tell: Tell = lambda error, message, context: None,
) -> ClientApp:
    """Return a ClientApp.

    Args:
        environment_of: Returns the device's settings, which are its owner's.
        plan_of: Returns the plan as JSON; each message names its digest.
        tell: Tells the device's owner why a round was not run; the server learns a code only.
    """
    app = ClientApp()

    @app.train(mods=[gate])
    def train(message: Message, context: Context) -> Message:
        try:
            return run(message, context)
        except Exception as error:
            tell(error, message, context)
            raise

    def run(message: Message, context: Context) -> Message:
        request = requested(message, context, environment_of)
        plan, guard = plan_of(context), request.environment.guard
        with guard.following(request.order, plan) if guard else nullcontext():
            _check_anchor(request.environment, message.content)
            from .round import run_rounds  # imports torch: only for an order that is followed

            return _answer(message, request, run_rounds(plan, [request])[0])

    return app


def answer_together(
    messages: Sequence[Message],
    contexts: Sequence[Context],
    environment_of: EnvironmentOf,
    plan_text: str,
) -> list[Message]:
    """Return the replies of many simulated clients of one plan, in order.

    Each is what the ClientApp of that client would reply, through the same gate; see
    :func:`reticent.client.round.run_rounds` for what is done in common.
    """
    from .round import run_rounds

    pairs = list(zip(messages, contexts, strict=True))
    asked = [_requested(*pair, environment_of) for pair in pairs]
    outcomes = iter(run_rounds(plan_text, [one for one in asked if isinstance(one, Request)]))
    replies: list[Message] = []
    for (message, context), one in zip(pairs, asked, strict=True):
        outcome = next(outcomes) if isinstance(one, Request) else one
        replies.append(gate(message, context, lambda m, _, r=one, o=outcome: _answer(m, r, o)))
    return replies


def _requested(
    message: Message, context: Context, environment_of: EnvironmentOf
) -> Request | Exception:
    try:
        return requested(message, context, environment_of)
    except Exception as error:
        return error


def requested(message: Message, context: Context, environment_of: EnvironmentOf) -> Request:
    """Return what a message asks a device to do.

    Raises:
        Refused: If it makes no sense, or the device cannot do it.
    """
    content = message.content
    try:
        order = Order.from_config(dict(content.config_records["order"]))
        payload = unpack(content, "broadcast")
        marks = unpack(content, "change") if "change" in content else b""
        control = unpack(content, "control") if "control" in content else b""
    except (PayloadError, KeyError) as error:
        raise Refused(Refusal.BAD_ORDER) from error
    constants = _constants(content, context, order)
    environment = environment_of(context)
    return Request(order, constants, payload, environment, marks, context.state, control)


def _answer(message: Message, request: Request | Exception, outcome: Outcome) -> Message:
    """Return a reply for the gate, or raise why there is none."""
    if isinstance(request, Exception):
        raise request
    if isinstance(outcome, Exception):
        raise outcome
    statement = _statement(request.environment, request.order, outcome)
    return egress(message, outcome, statement)


class Outgoing(RecordDict):
    """The content of a reply that :func:`egress` made: the only content that passes the gate.

    It carries its values beside the records, still wrapped in :class:`Released` and
    :class:`Public`; the gate serialises those and does not look at the records at all.
    """

    def __init__(self, update: Released[bytes], statement: Public[bytes] | None) -> None:
        super().__init__()
        self.update_to_send, self.statement_to_send = update, statement


def egress(
    message: Message, update: Released[bytes], statement: Public[bytes] | None = None
) -> Message:
    """Return the reply to ``message``: a released update and, on a real device, its statement.

    Raises:
        TypeError: If a value is not wrapped: it was not accounted for.
    """
    if not isinstance(update, Released) or not isinstance(statement, Public | None):
        raise TypeError("egress takes a Released update and a Public statement, nothing else")
    return Message(Outgoing(update, statement), reply_to=message)


class Acknowledgement(RecordDict):
    """The content of an answer to an offer, which :func:`acknowledge` made."""

    def __init__(self, receipt: Public[bytes]) -> None:
        super().__init__()
        self.receipt_to_send = receipt


def acknowledge(message: Message, receipt: Public[bytes]) -> Message:
    """Return the answer to the offer of a model."""
    return Message(Acknowledgement(receipt), reply_to=message)


def gate(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Serialise released and public values, or one fixed refusal, and nothing else (outermost mod).

    Guarantee: a reply holds at most the bytes of one :class:`Released` and one :class:`Public`
    value, or of a receipt, which is :class:`Public` and has one length. Exceptions become a code
    and a text that do not depend on the exception. Any other record, metric, buffer or text,
    whoever put it there and under whatever name, is dropped with the whole reply, and the server
    gets the code for that. The reply is built anew, because names of array types and metadata of a
    reply could carry words of their own. It bears the date of its order: when it was made tells how
    long that took, which depends on data.
    """
    try:
        return _serialised(call_next(message, context), message)
    except Refused as refused:
        return _refuse(refused.refusal, message)
    except DataError:
        return _refuse(Refusal.NO_DATA, message)
    except Exception:
        # Whatever went wrong may have been caused by private data; its text stays here.
        return _refuse(Refusal.FAILED, message)


def _serialised(reply: Message, message: Message) -> Message:
    """Return a new reply to ``message`` with what was wrapped in ``reply``.

    Raises:
        Refused: If ``reply`` holds anything else, or what is wrapped is not bytes.
    """
    content = reply.content if reply.has_content() else None
    if isinstance(content, Acknowledgement) and not len(content):
        return _receipt(content.receipt_to_send, message)
    if not isinstance(content, Outgoing) or len(content):
        raise Refused(Refusal.NOT_RELEASED)
    update, statement = content.update_to_send, content.statement_to_send
    values = [update.value] if statement is None else [update.value, statement.value]
    if not update.value or not all(type(value) is bytes for value in values):
        raise Refused(Refusal.NOT_RELEASED)
    records = zip(("update", "statement"), values, strict=False)
    return _reply(RecordDict({name: pack(value) for name, value in records}), message)


def _receipt(receipt: Public[bytes], message: Message) -> Message:
    """Return a new reply to ``message`` with a receipt.

    Raises:
        Refused: If it is none.
    """
    if not isinstance(receipt, Public) or receipt.kind != "receipt":
        raise Refused(Refusal.NOT_RELEASED)
    if type(receipt.value) is not bytes or len(receipt.value) != RECEIPT_BYTES:
        raise Refused(Refusal.NOT_RELEASED)
    return _reply(RecordDict({"receipt": pack(receipt.value)}), message)


def _check_anchor(environment: Environment, content: RecordDict) -> None:
    """Refuse to go on with a ledger that lacks what the order's anchor says was there."""
    if environment.identity is None:
        return
    try:
        anchor = unpack(content, "anchor") if "anchor" in content else b""
        environment.identity.check(environment.own_ledger, anchor)
    except RolledBack as error:
        raise Refused(Refusal.ROLLED_BACK) from error
    except PayloadError as error:
        raise Refused(Refusal.BAD_ORDER) from error
    except LedgerError as error:
        raise Refused(Refusal.LEDGER) from error


def _statement(
    environment: Environment, order: Order, released: Released[bytes]
) -> Public[bytes] | None:
    if environment.identity is None:
        return None
    try:
        return environment.identity.statement(
            environment.own_ledger, order.run, order.round, released.value
        )
    except LedgerError as error:
        raise Refused(Refusal.LEDGER) from error


def _refuse(refusal: Refusal, message: Message) -> Message:
    return _reply(Error(int(refusal), refusal.text), message)


def _reply(content: RecordDict | Error, message: Message) -> Message:
    """Return a reply whose date and life are those of ``message``, and so end with it."""
    reply, asked = Message(content, reply_to=message), message.metadata
    reply.metadata.created_at, reply.metadata.ttl = asked.created_at, asked.ttl
    return reply


def _constants(content: RecordDict, context: Context, order: Order) -> bytes:
    """Return the run's constants from the message or, as they are sent once, from the state."""
    if "constants" in content:
        data = unpack(content, "constants")
        if hashlib.sha256(data).hexdigest() == order.constants:
            context.state["constants"] = pack(data)
        return data
    try:
        return unpack(context.state, "constants")
    except PayloadError as error:  # also those that an earlier version kept
        raise Refused(Refusal.CONSTANTS_MISSING) from error
