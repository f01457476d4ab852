"""The Flower ClientApp, and the gate through which alone anything leaves a device."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import cast

from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable

from reticent.core.errors import DataError, PayloadError
from reticent.core.protocol import Order, Refusal
from reticent.privacy.release import Released

from .environment import Environment
from .round import Refused, run_round

EnvironmentOf = Callable[[Context], Environment]
PlanOf = Callable[[Context], str]


def pack(payload: bytes) -> ArrayRecord:
    """Return a record with ``payload`` as its one array, the form in which everything travels."""
    array = Array(dtype="uint8", shape=(len(payload),), stype="custom", data=payload)
    return ArrayRecord({"payload": array})


def unpack(content: RecordDict, name: str) -> bytes:
    """Return the bytes that :func:`pack` made a record of.

    Raises:
        PayloadError: If there is no such record, or it does not hold exactly one payload.
    """
    record = content.get(name)
    if not isinstance(record, ArrayRecord) or list(record) != ["payload"]:
        raise PayloadError(f"message holds no record {name!r} with one payload")
    return record["payload"].data


def build_client_app(environment_of: EnvironmentOf, plan_of: PlanOf) -> ClientApp:
    """Return a ClientApp.

    Args:
        environment_of: Returns the device's settings, which are its owner's.
        plan_of: Returns the plan as JSON; each message names its digest.
    """
    app = ClientApp()

    @app.train(mods=[gate])
    def train(message: Message, context: Context) -> Message:
        content = message.content
        try:
            order = Order.from_config(dict(content.config_records["order"]))
            payload = unpack(content, "broadcast")
        except (PayloadError, KeyError) as error:
            raise Refused(Refusal.BAD_ORDER) from error
        constants = _constants(content, context, order)
        released = run_round(order, plan_of(context), constants, payload, environment_of(context))
        return egress(released, message)

    return app


def egress(released: Released, message: Message) -> Message:
    """Wrap released bytes as the reply to ``message``."""
    return Message(RecordDict({"update": pack(released.payload)}), reply_to=message)


def gate(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Let nothing but one encoded update or one fixed refusal leave (the outermost mod).

    Exceptions become a code and a text that do not depend on the exception; a reply that holds
    any other record is dropped. What passes is wrapped anew, because the names of an array's type
    and the metadata of a reply could carry words of their own.
    """
    try:
        reply = call_next(message, context)
    except Refused as refused:
        return _refuse(refused.refusal, message)
    except DataError:
        return _refuse(Refusal.NO_DATA, message)
    except Exception:
        # Whatever went wrong may have been caused by private data; its text stays here.
        return _refuse(Refusal.FAILED, message)
    payload = _update_in(reply)
    if not payload:
        return _refuse(Refusal.NOT_RELEASED, message)
    return Message(RecordDict({"update": pack(payload)}), reply_to=message)


def _refuse(refusal: Refusal, message: Message) -> Message:
    return Message(Error(int(refusal), refusal.text), reply_to=message)


def _update_in(reply: Message) -> bytes:
    """Return the payload of a reply that holds one update and nothing else, otherwise ``b""``."""
    if not reply.has_content() or list(reply.content) != ["update"]:
        return b""
    try:
        return unpack(reply.content, "update")
    except PayloadError:
        return b""


def _constants(content: RecordDict, context: Context, order: Order) -> bytes:
    """Return the run's constants from the message or, as they are sent once, from the state."""
    if "constants" in content:
        data = unpack(content, "constants")
        if hashlib.sha256(data).hexdigest() == order.constants:
            context.state["constants"] = pack(data)
        return data
    record = context.state.get("constants")
    if not isinstance(record, ArrayRecord):
        raise Refused(Refusal.CONSTANTS_MISSING)
    return cast(Array, record["payload"]).data
