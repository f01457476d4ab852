"""Running the ClientApp of many simulated clients: in this process, or in worker processes."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import cast

import torch
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from reticent.client.app import build_client_app, pack, unpack
from reticent.client.downlink import MODEL
from reticent.client.round import charges
from reticent.core.errors import PayloadError, PlanError, PrivacyError, RunError
from reticent.core.plan import plan_from_json
from reticent.core.protocol import Order
from reticent.privacy.ledger import Ledger

from .devices import Devices, client_index, device_name
from .grid import call_client, client_of, enter_task, from_bytes, to_bytes

_WINDOW = 256


class Site:
    """The simulated devices that one process plays, one after another."""

    def __init__(self, devices: Devices, plan_json: str) -> None:
        """Open the ledger and build the ClientApp."""
        enter_task()
        self._devices = devices
        self._plan = plan_from_json(plan_json)
        self._ledger = Ledger.open(devices.ledger, verify=False)  # simulate() did, once
        self._app: ClientApp = build_client_app(
            lambda context: devices.environment(client_index(context), self._ledger),
            lambda _: plan_json,
        )
        self._state: dict[str, ArrayRecord] = {}

    def close(self) -> None:
        """Close the ledger."""
        self._ledger.close()

    def keep_constants(self, constants: bytes) -> None:
        """Keep the run's public constants, which the server sends to each client only once."""
        self._state["constants"] = pack(constants)

    def charge(self, messages: Sequence[Message]) -> None:
        """Charge a whole window with one fsync; each client then finds its own charge.

        Clients over their budget, and orders that make no sense, are left to the ClientApp, which
        refuses them one by one.
        """
        try:
            order = Order.from_config(dict(messages[0].content.config_records["order"]))
            due = charges(self._plan, order.noise_multiplier, order.round)
            names = [device_name(client_of(m.metadata.dst_node_id)) for m in messages]
            for number, event in due:
                self._ledger.charge_many(names, order.run, number, event, self._devices.budget)
        except (PayloadError, PrivacyError, PlanError, KeyError):
            return

    def answer(self, message: Message) -> Message:
        """Run the ClientApp of the client that ``message`` is for."""
        state = RecordDict(dict(self._state))
        reply = call_client(self._app, message, state)
        if MODEL in state:  # public, and the same for every client of the round
            self._state[MODEL] = cast(ArrayRecord, state[MODEL])
        return reply


class Inline:
    """Plays every client in this process."""

    window = _WINDOW

    def __init__(self, devices: Devices, plan_json: str) -> None:
        """Open the site."""
        self._site = Site(devices, plan_json)

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None:
        self._site.close()

    def answer(self, messages: list[Message]) -> Iterator[Message]:
        """Yield the replies in the order of ``messages``."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            if constants := _constants_in(messages):
                self._site.keep_constants(constants)
            self._site.charge(messages)
            for message in messages:
                yield self._site.answer(message)
        finally:
            torch.set_num_threads(threads)


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    pipe: Connection


class Processes:
    """Plays the clients in worker processes of one thread each; results do not depend on how many.

    Messages cross as the bytes that Flower would put on the wire.
    """

    def __init__(self, devices: Devices, plan_json: str, workers: int) -> None:
        """Start ``workers`` processes; they import while the server prepares."""
        context = multiprocessing.get_context("spawn")
        self.window = _WINDOW * workers
        self._workers: list[_Worker] = []
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, devices, plan_json), daemon=True)
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours))

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.pipe.close()
            if error is not None:
                worker.process.terminate()
        for worker in self._workers:
            worker.process.join(timeout=10)

    def answer(self, messages: list[Message]) -> Iterator[Message]:
        """Yield the replies in the order of ``messages``, dealt to the workers in turn.

        Raises:
            RunError: If a worker process ended; committed rounds are kept.
        """
        count = len(self._workers)
        try:
            constants = _constants_in(messages)
            for index, worker in enumerate(self._workers):
                share = messages[index::count]
                worker.pipe.send_bytes(len(share).to_bytes(4, "big"))
                worker.pipe.send_bytes(constants)
                for message in share:
                    worker.pipe.send_bytes(to_bytes(message))
            for index in range(len(messages)):
                yield from_bytes(self._workers[index % count].pipe.recv_bytes())
        except (EOFError, OSError) as error:
            codes = [w.process.exitcode for w in self._workers]
            raise RunError(
                f"a worker process ended (exit codes {codes}); committed rounds are kept, continue "
                "with --resume"
            ) from error


def _constants_in(messages: list[Message]) -> bytes:
    """Return the public constants that some message of a window carries, or ``b""``."""
    for message in messages:
        if "constants" in message.content:
            return unpack(message.content, "constants")
    return b""


def _work(pipe: Connection, devices: Devices, plan_json: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    site = Site(devices, plan_json)
    try:
        while True:
            count = int.from_bytes(pipe.recv_bytes(), "big")
            constants = pipe.recv_bytes()
            messages = [from_bytes(pipe.recv_bytes()) for _ in range(count)]
            if constants:
                site.keep_constants(constants)
            if messages:
                site.charge(messages)
            for message in messages:
                pipe.send_bytes(to_bytes(site.answer(message)))
    except (EOFError, OSError):
        return  # the run ended, or was killed: nobody is listening
    finally:
        site.close()
