"""The one Flower strategy: check, decode, bound, accumulate, step, commit."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from reticent.compression.codec import Codec, build_codec
from reticent.core.errors import PayloadError, PlanError
from reticent.core.plan import Plan
from reticent.core.protocol import PROTOCOL, Order
from reticent.core.update import Vector

from .client_level import client_level_for
from .control import ControlVariates
from .countersign import Countersigner
from .downlink import Broadcast, Downlink
from .fleet import Fleet, Virtual, once_back
from .folding import Folder, FoldingGrid, Kept, Rules, largest_payload
from .nodes import LazyGrid, Nodes
from .optimizer import Floats, ServerState, apply_round
from .records import Shared, packed, payload_of
from .robust import combined, needs_all
from .rounds import RoundPlan, Tally, farthest, too_few
from .sampling import Sampler, asked_first, cohort_in_time
from .waiting import wait_for_nodes, wait_for_return

Committed = Callable[[ServerState, Tally, float], None]
Opened = Callable[[list[int]], Iterable[int]]


class PrivateAveraging(Strategy):
    """Averages the accepted pseudo-gradients with uniform weights and steps the server optimizer.

    With unit ``client`` each decoded update is bounded before it is added, and the sum is noised
    and divided by the public number of clients (:mod:`.client_level`) instead of being averaged.

    Replies are folded one by one (:mod:`.folding`), or come folded from a simulation's workers, so
    memory does not depend on the cohort, unless the plan asks for a rule that needs all updates of
    a round at once (:mod:`.robust`). Nothing about a client but its encoded update is used: no
    example counts, no local metrics.
    """

    def __init__(
        self,
        plan: Plan,
        constants: RoundPlan,
        state: ServerState,
        committed: Committed,
        taken_part: Mapping[int, int] | None = None,
        countersigner: Countersigner | None = None,
        opened: Opened | None = None,
        fleet: Fleet | None = None,
        now: float = 0.0,
        nodes: Nodes | None = None,
    ) -> None:
        """Continue from ``state``.

        Args:
            plan: The plan.
            constants: Public constants of every round.
            state: State after the last committed round.
            committed: Makes an applied round durable.
            taken_part: Rounds that each device was asked in so far, by identity.
            countersigner: Judges the ledger statements of real devices; None in a simulation,
                whose devices make none.
            opened: Makes durable which nodes are about to be asked, and returns every device that
                was in this round, also before it failed or was interrupted, by identity.
            fleet: The simulated fleet, which decides whose update arrives in time; None for all.
            now: Its virtual time at the end of the last committed round.
            nodes: Who the nodes are and how their replies are gathered; a simulation's when None.
        """
        self._plan = plan
        self._constants = constants
        self.state = state
        self._committed = committed
        self._codec: Codec = build_codec(plan.updates.codec, constants.layout)
        self._downlink = Downlink(plan, constants.layout)
        self._variates = ControlVariates(plan, constants.layout)
        self._sent = Broadcast(b"")
        self._control: bytes | None = None  # the control variate that goes with it
        self._holds: dict[int, int] = {}
        self._mechanism = client_level_for(
            plan, constants.schedule, constants.run, constants.randomness
        )
        self._informed: set[int] = set()
        self._taken_part = Counter(taken_part or {})
        self._countersigner = countersigner
        self._nodes = nodes or Nodes()
        self._opened: Opened = opened or (lambda nodes: map(self._nodes.identity, nodes))
        identity = self._nodes.identity
        self._sampler = Sampler(plan, constants.randomness, constants.run, identity)
        self._fleet = fleet
        self._time = now
        self._attempt = 0
        self._begun = set[int]()  # charged in this round, with no update yet
        self._weight = 1.0  # of every update that is folded now
        self._cohort: list[int] = []
        self._waiting = set[int]()  # asked last, and nothing was read of them since
        self._able: Collection[int] = ()  # who could be asked in this round
        self._spent = set[int]()  # whose budget refused the last round that they were asked in
        self._tally = self._new_tally()

    def summary(self) -> None:
        """Log nothing: the run directory holds the configuration."""

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run every round that is not yet committed, and return the final model.

        Rounds, timeout and configuration come from the plan; the arguments that Flower's default
        loop takes are not used.

        Raises:
            BudgetsSpent: If a round has too few valid replies because devices' budgets refuse it.
            NetworkError: If it has too few for another reason, after every retry. Committed rounds
                stay committed.
        """
        arrays, config = ArrayRecord(), ConfigRecord()
        for number in range(self.state.round + 1, self._plan.federation.rounds + 1):
            self._run_round(number, grid, arrays, config)
        return Result(arrays=ArrayRecord({"weights": _array(self.state.weights)}))

    def _run_round(
        self, number: int, grid: Grid, arrays: ArrayRecord, config: ConfigRecord
    ) -> None:
        began = time.monotonic()
        federation = self._plan.federation
        self._tally = self._new_tally()
        self._cohort = self.cohort(number, grid)
        self._tally.devices = tuple(self._opened(self._cohort))
        self._begun.clear()
        if self._countersigner is not None:
            self._countersigner.begin()
        for self._attempt in range(federation.retries + 1):
            if self._attempt:
                accepted = self._tally.accepted
                wait_for_return(grid, federation, self._nodes, self._cohort, accepted)
            messages = self.configure_train(number, arrays, config, grid)
            self._gather(number, messages, grid)
            self._remember_holders(number)
            self._spent = (self._spent | self._tally.spent) - self._tally.accepted
            if self._tally.sum.count >= federation.quorum:
                break
        else:
            self._give_up(number)
        self._close(number, began)

    def _new_tally(self) -> Tally:
        keep = needs_all(self._plan.federation.robust)
        tally = Tally.begin(self._constants.layout.size, keep)
        if self._fleet is not None:
            tally.virtual = Virtual(ends=self._time, began=self._time)
        return tally

    def _close(self, number: int, began: float) -> None:
        """Apply and commit a round whose replies are complete."""
        if self._tally.virtual is not None:
            self._tally.virtual.unused += len(self._begun - self._tally.accepted)
        state = replace(self._applied(number), held=self._sent.model)
        self._committed(state, self._tally, time.monotonic() - began)
        if self._countersigner is not None:
            self._countersigner.commit()
        # Everyone asked: a device charges the round when it trains, not when its reply arrives.
        self._taken_part.update(self._tally.devices)
        self.state = state

    def _gather(self, number: int, messages: Iterable[Message], grid: Grid) -> None:
        """Send ``messages`` and fold what comes back, here or, where the grid can, in its workers.

        A countersigner judges replies one by one, and its devices are not simulated; and where a
        round closes early, who is in it follows from the order of the replies, unless a fleet's
        clock has decided it.
        """
        one_by_one = self._countersigner is not None or self._plan.first_come
        if isinstance(grid, FoldingGrid) and not one_by_one:
            kept = Kept(self._constants.constants, self.state.held)
            for part in grid.fold(messages, self._rules(number), kept):
                self._tally.merge(part)
            return
        timeout, largest = self._plan.federation.timeout, largest_payload(self._constants.layout)
        replies = self._nodes.gather(grid, messages, timeout, self._closed, largest)
        self.aggregate_train(number, replies)

    def _applied(self, number: int) -> ServerState:
        """Return the state after the round; with unit ``client`` its noise is drawn here, once."""
        tally, federation = self._tally, self._plan.federation
        if tally.vectors is not None:
            return self._stepped(combined(federation.robust, tally.vectors), tally.sum.count)
        if self._mechanism is None:
            # A Poisson cohort has a public denominator too: its own size is random, or zero.
            if federation.sampling == "poisson":
                clients = federation.clients_per_round
                return self._stepped(tally.sum.total() / clients, clients, tally.sum.count)
            return self._stepped(tally.sum.mean(), tally.sum.count)
        noised = self._mechanism.release(
            tally.sum.total(), tally.sum.count, tally.inside, self._clip, number
        )
        tally.noised = noised
        state = self._stepped(noised.mean, federation.clients_per_round)
        return replace(state, clip=noised.next_clip)

    def _stepped(self, gradient: Floats, clients: int, replies: int | None = None) -> ServerState:
        """Return the state after a step along ``gradient``, a sum of updates over ``clients``.

        ``replies`` is how many updates the control variate takes it to be of; ``clients`` if None.
        """
        federation, whole = self._plan.federation, self._constants.spread(gradient)
        summed = clients if replies is None else replies
        control = self._variates.moved(self.state, gradient, clients, summed)
        state = apply_round(self.state, whole, federation.server, federation.average)
        if not np.isfinite(state.average).all() or not np.isfinite(state.weights).all():
            raise PlanError(
                f"round {state.round}: the model is no longer finite: training has diverged; "
                f"federation.server.learning_rate={federation.server.learning_rate:g} or "
                f"federation.learning_rate={federation.learning_rate:g} is too large"
            )
        return replace(state, control=control)

    @property
    def _clip(self) -> float:
        """The bound in force: of one example's gradient, or of one client's update."""
        schedule = self._constants.schedule
        if schedule is None:
            return 0.0
        return schedule.clip if self.state.clip is None else self.state.clip

    def _give_up(self, number: int) -> None:
        names = self._nodes.named(sorted(self._waiting))
        able = sum(node not in self._spent for node in self._able)
        raise too_few(number, self._plan.federation, self._tally, names, able)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Yield one message for each client of the round that has not replied yet."""
        shared = self._constants.shared(self.state.weights)
        self._sent = self._downlink.broadcast(shared, self.state.held, server_round)
        self._control = self._variates.payload(self.state)
        order = ConfigRecord({**self._order(server_round).to_config()})
        order_of_asking = asked_first(self._plan, server_round, self._cohort)
        cohort = [n for n in order_of_asking if n not in self._tally.accepted]
        self._tally.asked += len(cohort)
        if self._fleet is not None:
            cohort = self._in_time(server_round, cohort, self._fleet)
        self._waiting = set(cohort)
        return self._messages_for(grid, cohort, order, server_round)

    def _messages_for(
        self, grid: Grid, cohort: list[int], order: ConfigRecord, number: int
    ) -> Iterable[Message]:
        """Return the messages to ``cohort``, made as a lazy grid takes them; records are shared."""
        messages = self._messages(cohort, order, number)
        return messages if isinstance(grid, LazyGrid) else list(messages)

    def _messages(self, cohort: list[int], order: ConfigRecord, number: int) -> Iterator[Message]:
        sent = self._sent
        constants = packed(self._constants.constants)
        common = {} if self._control is None else {"control": self._control}
        whole = Shared.of({"broadcast": sent.whole, **common})
        change = Shared.of({"broadcast": sent.change or b"", "change": sent.marks, **common})
        for node in cohort:
            # Who was accepted in the last round holds its model; a device that lost it says so.
            latest = sent.change is not None and self._holds.get(node) == number - 1
            model = change if latest else whole
            content = RecordDict({"order": order, **model.records})
            self._tally.bytes_down += model.size
            if node not in self._informed:
                content["constants"] = constants
                self._tally.first_bytes_down += len(self._constants.constants)
            if self._countersigner is not None and (anchor := self._countersigner.anchor(node)):
                content["anchor"] = packed(anchor)
            yield Message(content, dst_node_id=node, message_type="train", group_id=str(number))

    def _order(self, number: int) -> Order:
        c = self._constants
        return Order(
            protocol=PROTOCOL,
            run=c.run,
            plan=self._plan.digest,
            round=number,
            constants=c.constants_digest,
            noise_multiplier=c.schedule.noise_multiplier if c.schedule else 0.0,
            denominator=c.denominator,
            clip=self._clip,
        )

    def _in_time(self, number: int, cohort: list[int], fleet: Fleet) -> list[int]:
        """Return those of ``cohort`` whose update will arrive in time; the others are counted.

        Who began to train has charged the round, in time or not, unless its budget refuses it.
        """
        tally, virtual = self._tally, self._tally.virtual or Virtual()
        want = self._plan.federation.wanted - tally.sum.count
        if self._plan.federation.sampling == "poisson":
            want = len(cohort)
        if self._attempt:
            federation, accepted = self._plan.federation, len(tally.accepted)
            self._time = once_back(fleet, federation, cohort, accepted, self._time)
        # By the journal, so that a resumed run meets the same clock; see docs/fleet.md.
        first = {node for node in cohort if not self._taken_part[node]}
        found = fleet.ask(number, self._attempt, cohort, self._time, want, first)
        multiplier = self._order(number).noise_multiplier
        charged = fleet.charge(self._constants.run, number, multiplier, found.charged)
        tally.dropped.update(found.dropped)
        sent = len(self._sent.whole) + len(self._control or b"")
        tally.bytes_down += (len(cohort) - len(found.replied)) * sent
        virtual.add(found)
        self._begun.update(charged)
        self._time = found.ends
        return list(found.replied)

    def cohort(self, number: int, grid: Grid) -> list[int]:
        """Return the clients of round ``number``, as :class:`.Sampler` chooses them.

        Where nodes come and go the bound on the participations of a client
        (:func:`reticent.privacy.schedule.participations`) is kept by not asking a node that has
        reached it; the server waits for others. On a fleet the virtual clock moves on until enough
        devices are available.

        Raises:
            NetworkError: If fewer nodes are connected than the quorum, or may be asked.
        """
        nodes = wait_for_nodes(grid, self._plan, self._nodes, lambda n: len(self._free(number, n)))
        chosen, self._time = cohort_in_time(
            self._sampler, number, nodes, self._asked(nodes), self._fleet, self._time
        )
        # A simulation would ask the same cohort again. Of real nodes another one may be drawn.
        self._able = chosen if isinstance(nodes, range) else self._free(number, nodes)
        return chosen

    def _free(self, number: int, nodes: Sequence[int]) -> Sequence[int]:
        """Return who may be asked in a round; of a simulation's clients, and for coins, all."""
        if isinstance(nodes, range) or self._plan.federation.sampling == "poisson":
            return nodes
        return self._sampler.able(number, nodes, self._asked(nodes))

    def _asked(self, nodes: Sequence[int]) -> Mapping[int, int]:
        """Return in how many rounds each node's device was asked."""
        if isinstance(nodes, range):  # a simulation's nodes are its devices
            return self._taken_part
        return {node: self._taken_part[self._nodes.identity(node)] for node in nodes}

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold each reply as it arrives; what is broken is dropped and counted by reason.

        The round is closed once it has ``federation.enough`` replies; what comes later is not used.
        On a fleet those are the first by the virtual clock, and nobody else is sent the order.
        Of a node that was asked one reply is read each time it is asked, and of any other none: a
        node can cost the server no more than :attr:`.Federation.retries` + 1 decodings a round.
        """
        folder = Folder(self._codec, self._rules(server_round))
        waiting = self._waiting
        for reply in replies:
            about = reply.metadata
            known = about.group_id == str(server_round) and about.src_node_id in waiting
            if known and not self._closed():
                waiting.discard(about.src_node_id)
                folder.take(reply, self._tally, self._judge)
        return None, None

    def _closed(self) -> bool:
        enough = self._plan.federation.enough
        return enough is not None and len(self._tally.accepted) >= enough

    def _rules(self, number: int) -> Rules:
        constants, mechanism = self._constants, self._mechanism
        bound = constants.bound
        if constants.schedule is None:
            bound = farthest(constants.shared(self.state.weights), self._plan.federation.server)
        # The bound is of what clients encode; what is compared with it was decoded.
        bound *= self._codec.expansion(constants.layout.size)
        clip = None if mechanism is None else self._clip
        bit = mechanism is not None and mechanism.count_noise is not None
        keep = needs_all(self._plan.federation.robust)
        return Rules(number, constants.layout, bound, clip, bit, self._weight, keep)

    def _judge(self, node: int, reply: Message) -> None:
        """Check the ledger statement of a reply whose update is otherwise good.

        Raises:
            PayloadError: With the reason for which the update must not be used.
        """
        if self._countersigner is None:
            return
        if "statement" not in reply.content:
            raise PayloadError("the reply holds no ledger statement")
        statement = payload_of(reply.content, "statement")
        payload = payload_of(reply.content, "update")
        number = int(reply.metadata.group_id)
        self._countersigner.accept(node, statement, self._constants.run, number, payload)

    def _remember_holders(self, number: int) -> None:
        """Note who holds the constants and the round's model: those of whom a reply was used."""
        self._informed |= self._tally.accepted
        self._informed -= self._tally.failed
        self._holds.update(dict.fromkeys(self._tally.accepted, number))
        for node in self._tally.failed:
            self._holds.pop(node, None)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nothing: metrics computed on private data would be releases."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Aggregate nothing."""
        return None


def _array(values: Vector) -> Array:
    data = values.tobytes()
    return Array(dtype="uint8", shape=(len(data),), stype="custom", data=data)
