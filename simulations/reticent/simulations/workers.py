"""Running the ClientApp of many simulated clients, one after another in one process."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import cast

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from reticent.client.app import answer_together, build_client_app
from reticent.client.downlink import MODEL, remember
from reticent.client.environment import Environment
from reticent.client.order import charges
from reticent.client.records import pack, unpack
from reticent.core.errors import PayloadError, PlanError, PrivacyError
from reticent.core.plan import plan_from_json
from reticent.core.protocol import Order
from reticent.privacy.ledger import Grants, Ledger
from reticent.server.folding import Kept

from .devices import Devices, client_index, device_name, granted
from .grid import call_client, client_of, context_of, enter_task
from .memory import keep_freed_memory
from .prefetch import Prefetch

BLOCK = 13
"""Clients that are trained together: neighbours among the messages of a round, from the first on.

With small students blocks of 12 and more take 15 to 25 % less time than those of 8, and larger ones
no less than these, but occupy fewer cores; of 13, a hundred clients are eight shares. The number is
part of what a run's seed stands for: another one gives other bits of float32 rounding. Every window
and every share is a whole number of blocks. On an accelerator a block is a window.
"""

WINDOW = 20 * BLOCK
"""Clients that one worker is handed at a time."""


class Site:
    """The simulated devices that one process plays, one after another."""

    def __init__(self, devices: Devices, plan_json: str, ledger: Ledger | Grants) -> None:
        """Build the ClientApp of devices whose charges are in ``ledger``."""
        enter_task()
        keep_freed_memory()
        self.ledger = ledger
        self._devices = devices
        self._plan, self._plan_json = plan_from_json(plan_json), plan_json
        self._app: ClientApp = build_client_app(self._environment, lambda _: plan_json)
        self._state: dict[str, ConfigRecord] = {}
        self._charged: frozenset[str] = frozenset()
        # On an accelerator a worker is never handed a second block.
        loads = self._plan.engine.prefetch and devices.accelerator is None
        self._prefetch = Prefetch() if loads else None

    def keep_constants(self, constants: bytes) -> None:
        """Keep the run's public constants, which the server sends to each client only once."""
        self._state["constants"] = pack(constants)

    def keep(self, kept: Kept) -> None:
        """Keep what clients hold of earlier rounds: a process that was not there can then go on."""
        self.keep_constants(kept.constants)
        if kept.model is not None:
            state = RecordDict()
            remember(state, kept.model)
            self._state[MODEL] = cast(ConfigRecord, state[MODEL])

    def charge(self, messages: Sequence[Message]) -> None:
        """Charge all of them with one fsync; each client then finds its own charge.

        Where others charged before, it finds that. Clients over their budget, and orders that make
        no sense, are left to the ClientApp, which refuses them one by one.
        """
        self._charged = frozenset()
        try:
            order = Order.from_config(dict(messages[0].content.config_records["order"]))
            due = charges(self._plan, order.noise_multiplier, order.run, order.round)
            names = [device_name(client_of(m.metadata.dst_node_id)) for m in messages]
            for one in due:
                names = granted(self.ledger, names, one, self._devices.budget)
        except (PayloadError, PrivacyError, PlanError, KeyError):
            return
        self._charged = frozenset(names)

    def answer(self, message: Message) -> Message:
        """Run the ClientApp of the client that ``message`` is for."""
        state = RecordDict(dict(self._state))
        reply = call_client(self._app, message, state)
        if MODEL in state:  # public, and the same for every client of the round
            self._state[MODEL] = cast(ConfigRecord, state[MODEL])
        return reply

    def answer_many(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Yield the replies to whole blocks, in order; each is what :meth:`answer` gives.

        Equal up to float32 rounding of gradients, and so after one local step within one
        quantization step of the codec: :data:`BLOCK` clients at a time are trained together, unless
        public constants say that it does not pay (:mod:`reticent.client.together`). But a student
        that draws in training (dropout) draws once for them all, and not as for each. A reply is a
        function of the messages of its block, so the same blocks give the same bits, whoever
        answers them.

        While a block is trained, one thread loads the examples of the next one's clients that
        :meth:`charge` charged; between replies it is idle.
        """
        size = BLOCK if self._devices.accelerator is None else WINDOW
        with closing(self._in_turn(iter(messages), size)) as blocks:
            for block in blocks:
                state = RecordDict(dict(self._state))
                contexts = [context_of(message, state) for message in block]
                replies = answer_together(block, contexts, self._environment, self._plan_json)
                if self._prefetch is not None:
                    self._prefetch.wait()
                yield from replies
                if MODEL in state:  # public, and the same for every client of the round
                    self._state[MODEL] = cast(ConfigRecord, state[MODEL])

    def _in_turn(
        self, messages: Iterator[Message], size: int
    ) -> Generator[list[Message], None, None]:
        """Yield blocks, and tell the loader, where there is one, which block comes next."""
        block = list(islice(messages, size))
        try:
            while block:
                following: list[Message] = []
                if self._prefetch is not None:
                    following = list(islice(messages, size))
                    self._prefetch.turn(self._known(following))
                yield block
                block = following or list(islice(messages, size))
        finally:
            if self._prefetch is not None:
                self._prefetch.rest()

    def _known(self, messages: Sequence[Message]) -> Iterator[int]:
        """Yield the clients of ``messages`` that were charged."""
        clients = [client_of(m.metadata.dst_node_id) for m in messages]
        return (client for client in clients if device_name(client) in self._charged)

    def _environment(self, context: Context) -> Environment:
        return self._devices.environment(client_index(context), self.ledger, self._prefetch)


class Inline:
    """Plays every client in this process."""

    window = WINDOW

    def __init__(self, devices: Devices, plan_json: str) -> None:
        """Open the ledger."""
        self.ledger = Ledger.open(devices.ledger, verify=False)  # simulate() did, once
        self._site = Site(devices, plan_json, self.ledger)

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None:
        self.ledger.close()

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


def _constants_in(messages: list[Message]) -> bytes:
    """Return the public constants that some message of a window carries, or ``b""``."""
    for message in messages:
        if "constants" in message.content:
            return unpack(message.content, "constants")
    return b""
