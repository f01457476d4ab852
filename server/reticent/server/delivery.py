"""The ServerApp that brings a model to devices, as a Flower app refers to it.

The run configuration holds ``plan``, which the model was trained by, and ``plan-signature``, for
the devices; and for the server ``state-dir``, ``version``, ``devices`` (names, separated by
commas), ``timeout`` in seconds, ``chunk`` in bytes and ``attempt``, as ``reticent server deliver``
sets them.

The server keeps nothing that it could not lose: every device says how many bytes it holds, and gets
the next ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from reticent.core.errors import PayloadError
from reticent.core.offer import Receipt
from reticent.core.protocol import Refusal
from reticent.core.run import locked

from .attempt import Teller
from .home import open_home
from .offers import INSTALLED, REFUSED, SENDING, WAITING, Parcel, Shipment, open_shipment
from .reasons import Unusable
from .records import packed, payload_of
from .registry import Registry, read_registry
from .replies import Inbox

_POLL_SECONDS = 0.5
_LOOK_SECONDS = 3.0
_ANSWER_SECONDS = 300.0
"""For one message; with the last one comes the self-test, which may take three minutes."""

_AGAIN_SECONDS = {Refusal.NOT_NOW: 60.0, Refusal.NOT_STORED: 60.0}
_PATIENCE = {Refusal.FAILED: 3, Refusal.DAMAGED: 3}
_NOT_READY = 5.0
_RECEIPT = 1024
"""More bytes than an answer has."""

_SMALL = 64 * 1024
"""A model up to this size comes with its offer: asking first would take longer than sending it."""


@dataclass
class Courier:
    """Brings one model to devices.

    Attributes:
        shipment: What is brought.
        devices: Names of the devices.
        chunk: Most bytes of the model in a message.
        registry: Returns who is enrolled.
        tell: Takes how far it has come, whenever that has changed.
        clock: Returns seconds.
    """

    shipment: Shipment
    devices: tuple[str, ...]
    chunk: int
    registry: Callable[[], Registry]
    tell: Callable[[dict[str, Parcel]], None]
    clock: Callable[[], float] = time.monotonic
    pause: Callable[[float], None] = time.sleep
    _trips: dict[str, _Trip] = field(init=False)

    def __post_init__(self) -> None:
        self._trips = {name: _Trip() for name in self.devices}

    def deliver(self, grid: Grid, timeout: float) -> dict[str, Parcel]:
        """Bring the model to every device, for ``timeout`` seconds; return how far it came."""
        data, deadline, looked = self.shipment.data(), self.clock() + timeout, -_LOOK_SECONDS
        inbox = Inbox(grid, _RECEIPT)
        nodes: Mapping[str, int] = {}
        while self._open() and self.clock() < deadline:
            if self.clock() - looked >= _LOOK_SECONDS:
                looked, nodes = self.clock(), self._connected(grid)
            self._send(grid, nodes, data)
            self._receive(inbox)
            self.tell(self.parcels())
            if self._open():
                self.pause(_POLL_SECONDS)
        return self.parcels()

    def parcels(self) -> dict[str, Parcel]:
        """Return how far the model has come."""
        return {name: trip.parcel for name, trip in self._trips.items()}

    def _open(self) -> bool:
        return not all(trip.parcel.closed for trip in self._trips.values())

    def _connected(self, grid: Grid) -> dict[str, int]:
        """Return the connected node of each device that has one and was not revoked meanwhile."""
        registry = self.registry()
        names, welcome = registry.by_node(), registry.node_keys()
        return {names[node]: node for node in grid.get_node_ids() if node in welcome}

    def _send(self, grid: Grid, nodes: Mapping[str, int], data: bytes) -> None:
        for name, trip in self._trips.items():
            if trip.waits(self.clock()) or name not in nodes:
                continue
            message = _message(nodes[name], self.shipment.signed, *trip.next_part(data, self.chunk))
            (sent,) = list(grid.push_messages([message]))
            if sent:  # an empty id: it was not taken
                trip.sent(sent, message, self.clock() + _ANSWER_SECONDS)

    def _receive(self, inbox: Inbox) -> None:
        waiting = {trip.name: trip for trip in self._trips.values() if trip.message is not None}
        asked = {name: trip.message for name, trip in waiting.items() if trip.message is not None}
        for name, reply in inbox.look(asked) if asked else ():
            waiting[name].read(reply, self.shipment.offer.version, self.clock())
        for trip in waiting.values():
            trip.give_up(self.clock())


@dataclass
class _Trip:
    """The way of a model to one device.

    Attributes:
        parcel: How far it has come.
        known: Whether the device has said since its last failure how much it holds.
        name: Id of the last message that was sent.
        message: That message while it is under way.
        until: When that is given up; without one, when the next may be sent.
        failures: How often the device failed in each way.
    """

    parcel: Parcel = field(default_factory=Parcel)
    known: bool = False
    name: str = ""
    message: Message | None = None
    until: float = float("-inf")
    failures: dict[int, int] = field(default_factory=dict)

    def waits(self, now: float) -> bool:
        return self.parcel.closed or self.message is not None or now < self.until

    def next_part(self, data: bytes, chunk: int) -> tuple[int, bytes]:
        """Return where the next bytes belong, and the bytes; none, to ask what is there."""
        if not self.known:
            return 0, data if len(data) <= min(chunk, _SMALL) else b""
        return self.parcel.offset, data[self.parcel.offset :][:chunk]

    def sent(self, name: str, message: Message, until: float) -> None:
        self.name, self.message, self.until = name, message, until

    def give_up(self, now: float) -> None:
        if self.message is not None and now >= self.until:
            self._ask_again(now, "no answer")

    def read(self, reply: Message, version: int, now: float) -> None:
        """Take the answer to the message that is under way."""
        try:
            if reply.has_error():
                self._refused(reply.error.code, now)
                return
            receipt = Receipt.decode(payload_of(reply.content, "receipt"))
        except PayloadError:
            self._refused(Refusal.FAILED, now)
            return
        self.message = None
        if receipt.version == version:
            self.parcel = replace(self.parcel, state=INSTALLED, reason="")
            return
        came = not self.known or receipt.offset > self.parcel.offset
        self.until = now if came else now + _NOT_READY
        self.known = True
        self.parcel = Parcel(SENDING, receipt.offset)

    def _refused(self, code: int, now: float) -> None:
        """Close the way, or wait: not every refusal is for good."""
        try:
            refusal = Refusal.FAILED if code in list(Unusable) else Refusal(code)
        except ValueError:  # one of Flower's own: the node went away
            self._ask_again(now + _NOT_READY, "not connected")
            return
        self.failures[refusal] = self.failures.get(refusal, 0) + 1
        patience = _PATIENCE.get(refusal, 1)
        if refusal in _AGAIN_SECONDS:
            self._ask_again(now + _AGAIN_SECONDS[refusal], refusal.text)
        elif self.failures[refusal] < patience:
            self._ask_again(now + _NOT_READY, refusal.text)
        else:
            self.message = None
            self.parcel = replace(self.parcel, state=REFUSED, reason=refusal.text)

    def _ask_again(self, when: float, why: str) -> None:
        self.message, self.known, self.until = None, False, when
        self.parcel = replace(self.parcel, state=WAITING, reason=why)


def _message(node: int, offer: bytes, offset: int, chunk: bytes) -> Message:
    content = RecordDict({"offer": packed(offer), "part": ConfigRecord({"offset": offset})})
    if chunk:
        content["chunk"] = packed(chunk)
    return Message(content, node, "query", ttl=_ANSWER_SECONDS)


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Bring the model to the devices that the run configuration names."""
    config = context.run_config
    home = open_home(Path(str(config["state-dir"])))
    shipment = open_shipment(home, int(config["version"]))
    courier = Courier(
        shipment,
        tuple(str(config["devices"]).split(",")),
        int(config["chunk"]),
        lambda: read_registry(home.devices),
        shipment.write_progress,
    )
    with locked(shipment.run):  # two of them would both send
        shipment.write_progress(courier.parcels())  # before anybody is told that it began
        teller = Teller(shipment.run, str(config["attempt"]))
        try:
            courier.deliver(grid, float(config["timeout"]))
        except BaseException as error:
            teller.failed(error)
            raise
        teller.finished()
