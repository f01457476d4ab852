"""Running the ClientApp of many simulated clients: in this process, or in worker processes."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import cast

import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from reticent.client.app import answer_together, build_client_app, pack, unpack
from reticent.client.downlink import MODEL
from reticent.client.environment import Environment
from reticent.client.round import round_event
from reticent.core.errors import PayloadError, PlanError, PrivacyError, RunError
from reticent.core.plan import plan_from_json
from reticent.core.protocol import Order
from reticent.privacy.ledger import Ledger

from .devices import Devices, client_index, device_name
from .grid import call_client, client_of, context_of, enter_task, from_bytes, to_bytes

BLOCK = 8
"""Clients that are trained together: neighbours among the messages of a round, from the first on.

Part of what a run's seed stands for: another number gives other bits of float32 rounding. Whoever
deals messages to processes deals whole blocks.
"""

_WINDOW = 32 * BLOCK


class Site:
    """The simulated devices that one process plays, one after another."""

    def __init__(self, devices: Devices, plan_json: str) -> None:
        """Open the ledger and build the ClientApp."""
        enter_task()
        self._devices = devices
        self._plan, self._plan_json = plan_from_json(plan_json), plan_json
        self._ledger = Ledger.open(devices.ledger, verify=False)  # simulate() did, once
        self._app: ClientApp = build_client_app(self._environment, lambda _: plan_json)
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
            event = round_event(self._plan, order.noise_multiplier)
            names = [device_name(client_of(m.metadata.dst_node_id)) for m in messages]
            self._ledger.charge_many(names, order.run, order.round, event, self._devices.budget)
        except (PayloadError, PrivacyError, PlanError, KeyError):
            return

    def answer(self, message: Message) -> Message:
        """Run the ClientApp of the client that ``message`` is for."""
        state = RecordDict(dict(self._state))
        reply = call_client(self._app, message, state)
        if MODEL in state:  # public, and the same for every client of the round
            self._state[MODEL] = cast(ArrayRecord, state[MODEL])
        return reply

    def answer_many(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Yield the replies to ``messages``, in order; each is what :meth:`answer` gives.

        Equal up to float32 rounding of the update before it is encoded, and so within one
        quantization step after it: :data:`BLOCK` clients at a time are trained together. A reply is
        a function of the messages of its block, so the same blocks give the same bits, whoever
        answers them.
        """
        pending = iter(messages)
        while block := list(islice(pending, BLOCK)):
            state = RecordDict(dict(self._state))
            contexts = [context_of(message, state) for message in block]
            yield from answer_together(block, contexts, self._environment, self._plan_json)
            if MODEL in state:  # public, and the same for every client of the round
                self._state[MODEL] = cast(ArrayRecord, state[MODEL])

    def _environment(self, context: Context) -> Environment:
        return self._devices.environment(client_index(context), self._ledger)


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
            yield from self._site.answer_many(messages)
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
        """Yield the replies in the order of ``messages``, dealt to the workers by blocks in turn.

        Raises:
            RunError: If a worker process ended; committed rounds are kept.
        """
        count = len(self._workers)
        try:
            constants = _constants_in(messages)
            dealt = [i // BLOCK % count for i in range(len(messages))]
            for index, worker in enumerate(self._workers):
                share = [m for m, to in zip(messages, dealt, strict=True) if to == index]
                worker.pipe.send_bytes(len(share).to_bytes(4, "big"))
                worker.pipe.send_bytes(constants)
                for message in share:
                    worker.pipe.send_bytes(to_bytes(message))
            for index in dealt:
                yield from_bytes(self._workers[index].pipe.recv_bytes())
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
            for reply in site.answer_many(messages):
                pipe.send_bytes(to_bytes(reply))
    except (EOFError, OSError):
        return  # the run ended, or was killed: nobody is listening
    finally:
        site.close()
