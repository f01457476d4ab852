"""The one Flower strategy: check, decode, bound, accumulate, step, commit."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from reticent.compression.codec import Codec, build_codec
from reticent.core.errors import NetworkError, PayloadError
from reticent.core.plan import Plan
from reticent.core.protocol import PROTOCOL, Order, Refusal
from reticent.core.seeds import numpy_generator
from reticent.privacy.client_level import split_bit
from reticent.privacy.schedule import participations

from .client_level import client_level_for
from .countersign import Countersigner
from .downlink import Broadcast, Downlink
from .fleet import Fleet
from .optimizer import Accumulator, ServerState, apply_round
from .rounds import Reading, RoundPlan, Tally

Committed = Callable[[ServerState, Tally, float], None]


class PrivateAveraging(Strategy):
    """Averages the accepted pseudo-gradients with uniform weights and steps the server optimizer.

    With unit ``client`` each decoded update is bounded before it is added, and the sum is noised
    and divided by the public number of clients (:mod:`.client_level`) instead of being averaged.

    Replies are folded one by one, so memory does not depend on the cohort. Nothing about a client
    but its encoded update is used: no example counts, no local metrics.
    """

    def __init__(
        self,
        plan: Plan,
        constants: RoundPlan,
        state: ServerState,
        committed: Committed,
        taken_part: Mapping[int, int] | None = None,
        countersigner: Countersigner | None = None,
        fleet: Fleet | None = None,
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
            fleet: Who the nodes are and how their replies are gathered; a simulation's when None.
        """
        self._plan = plan
        self._constants = constants
        self.state = state
        self._committed = committed
        self._codec: Codec = build_codec(plan.updates.codec, constants.layout)
        self._downlink = Downlink(plan, constants.layout)
        self._sent = Broadcast(b"")
        self._holds: dict[int, int] = {}
        self._mechanism = client_level_for(
            plan, constants.schedule, constants.run, constants.randomness
        )
        self._informed: set[int] = set()
        self._taken_part = Counter(taken_part or {})
        self._countersigner = countersigner
        self._fleet = fleet or Fleet()
        self._cohort: list[int] = []
        self._tally = Tally(Accumulator(constants.layout.size))

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
            NetworkError: If a round has too few valid replies after every retry. Committed rounds
                stay committed.
        """
        arrays, config = ArrayRecord(), ConfigRecord()
        for number in range(self.state.round + 1, self._plan.federation.rounds + 1):
            self._run_round(number, grid, arrays, config)
        return Result(arrays=ArrayRecord({"weights": _packed(self.state.weights.tobytes())}))

    def _run_round(
        self, number: int, grid: Grid, arrays: ArrayRecord, config: ConfigRecord
    ) -> None:
        began = time.monotonic()
        federation = self._plan.federation
        self._tally = Tally(Accumulator(self._constants.layout.size))
        self._cohort = self.cohort(number, grid)
        self._tally.nodes = tuple(self._cohort)
        if self._countersigner is not None:
            self._countersigner.begin()
        for _ in range(federation.retries + 1):
            messages = self.configure_train(number, arrays, config, grid)
            replies = self._fleet.gather(grid, messages, federation.timeout, self._closed)
            self.aggregate_train(number, replies)
            if self._tally.sum.count >= federation.quorum:
                break
        else:
            self._give_up(number)
        state = replace(self._applied(number), held=self._sent.model)
        self._committed(state, self._tally, time.monotonic() - began)
        if self._countersigner is not None:
            self._countersigner.commit()
        # Everyone asked: a device charges the round when it trains, not when its reply arrives.
        self._taken_part.update(map(self._fleet.identity, self._cohort))
        self.state = state

    def _applied(self, number: int) -> ServerState:
        """Return the state after the round; with unit ``client`` its noise is drawn here, once."""
        tally, federation = self._tally, self._plan.federation
        if self._mechanism is None:
            gradient = tally.sum.mean()
            return apply_round(self.state, gradient, federation.server, federation.average)
        noised = self._mechanism.release(
            tally.sum.total(), tally.sum.count, tally.inside, self._clip, number
        )
        tally.noised = noised
        state = apply_round(self.state, noised.mean, federation.server, federation.average)
        return replace(state, clip=noised.next_clip)

    @property
    def _clip(self) -> float:
        """The bound in force: of one example's gradient, or of one client's update."""
        schedule = self._constants.schedule
        if schedule is None:
            return 0.0
        return schedule.clip if self.state.clip is None else self.state.clip

    def _give_up(self, number: int) -> None:
        tally, federation = self._tally, self._plan.federation
        reasons = ", ".join(f"{count} x {why}" for why, count in tally.dropped.most_common())
        raise NetworkError(
            f"round {number}: {tally.sum.count} of {federation.clients_per_round} clients gave a "
            f"valid reply, {federation.quorum} are needed, asked {federation.retries + 1} times "
            f"({reasons or 'no reply at all'}); rounds 1 to {number - 1} are kept"
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Yield one message for each client of the round that has not replied yet."""
        self._sent = self._downlink.broadcast(self.state.weights, self.state.held, server_round)
        order = ConfigRecord({**self._order(server_round).to_config()})
        cohort = [n for n in self._asked_first(server_round) if n not in self._tally.accepted]
        self._tally.asked += len(cohort)
        # A list, because Flower's own grid goes through the messages twice; they share records.
        return list(self._messages(cohort, order, server_round))

    def _asked_first(self, number: int) -> list[int]:
        """Return the cohort in the order it is asked in.

        Where a round closes early and replies come in that order, as in a simulation, nobody must
        be left out more often than others.
        """
        if self._plan.federation.enough is None:
            return self._cohort
        generator = numpy_generator(self._plan.seed, "first", number)
        return [self._cohort[i] for i in generator.permutation(len(self._cohort))]

    def _messages(self, cohort: list[int], order: ConfigRecord, number: int) -> Iterator[Message]:
        sent = self._sent
        constants = ArrayRecord({"payload": _packed(self._constants.constants)})
        whole = {"broadcast": ArrayRecord({"payload": _packed(sent.whole)})}
        change = {
            "broadcast": ArrayRecord({"payload": _packed(sent.change or b"")}),
            "change": ArrayRecord({"payload": _packed(sent.marks)}),
        }
        for node in cohort:
            # Who was accepted in the last round holds its model; a device that lost it says so.
            latest = sent.change is not None and self._holds.get(node) == number - 1
            model = change if latest else whole
            content = RecordDict({"order": order, **model})
            self._tally.bytes_down += sum(len(r["payload"].data) for r in model.values())
            if node not in self._informed:
                content["constants"] = constants
                self._tally.first_bytes_down += len(self._constants.constants)
            if self._countersigner is not None and (anchor := self._countersigner.anchor(node)):
                content["anchor"] = ArrayRecord({"payload": _packed(anchor)})
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

    def cohort(self, number: int, grid: Grid) -> list[int]:
        """Return the clients of round ``number``, from shuffled passes over all nodes.

        Within a pass of ``nodes // clients_per_round`` rounds nobody is asked twice, which bounds
        the participations of each client (:func:`reticent.privacy.schedule.participations`). Where
        nodes come and go that bound is kept by not asking a node that has reached it.

        Raises:
            NetworkError: If fewer nodes are connected than the quorum.
        """
        federation, most = self._plan.federation, participations(self._plan)
        nodes = sorted(self._wait_for_nodes(grid))
        per_pass = max(1, len(nodes) // federation.clients_per_round)
        generator = numpy_generator(self._plan.seed, "cohort", (number - 1) // per_pass)
        first = (number - 1) % per_pass * federation.clients_per_round
        order = np.roll(generator.permutation(len(nodes)), -first)
        free = (nodes[i] for i in order if self._taken_part[self._fleet.identity(nodes[i])] < most)
        chosen = sorted(islice(free, federation.clients_per_round))
        if len(chosen) < federation.quorum:
            raise NetworkError(
                f"round {number}: {len(chosen)} connected clients have been asked in fewer than "
                f"the {most} rounds that the plan's privacy target allows each; "
                f"{federation.quorum} are needed"
            )
        return chosen

    def _wait_for_nodes(self, grid: Grid) -> list[int]:
        federation = self._plan.federation
        deadline = time.monotonic() + federation.timeout
        while True:
            nodes = list(grid.get_node_ids())
            missing = self._fleet.seen(nodes)
            if len(nodes) >= federation.clients_per_round:
                return nodes
            if time.monotonic() > deadline:
                if len(nodes) >= federation.quorum:
                    return nodes
                raise NetworkError(
                    f"{len(nodes)} clients are connected after {federation.timeout:g} s, "
                    f"{federation.quorum} are needed{missing}"
                )
            time.sleep(1.0)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold each reply as it arrives; what is broken is dropped and counted by reason.

        The round is closed once it has ``federation.enough`` replies; what comes later is not used.
        """
        for reply in replies:
            if self._closed():
                continue
            node = reply.metadata.src_node_id
            if reply.metadata.group_id != str(server_round) or node in self._tally.accepted:
                continue  # a late or repeated reply
            try:
                reading = self._read(reply)
                self._judge(node, reply, server_round)
            except PayloadError as error:
                self._drop(node, str(error))
                continue
            self._fold(reading)
            self._tally.accepted.add(node)
            self._tally.bytes_up += reading.size
            self._informed.add(node)
            self._holds[node] = server_round
        return None, None

    def _closed(self) -> bool:
        enough = self._plan.federation.enough
        return enough is not None and len(self._tally.accepted) >= enough

    def _fold(self, reading: Reading) -> None:
        if self._mechanism is None:
            self._tally.sum.add(reading.vector)
            return
        self._tally.sum.add(self._mechanism.bounded(reading.vector, self._clip))
        self._tally.inside += reading.inside

    def _judge(self, node: int, reply: Message, number: int) -> None:
        """Check the ledger statement of a reply whose update is otherwise good.

        Raises:
            PayloadError: With the reason for which the update must not be used.
        """
        if self._countersigner is None:
            return
        if "statement" not in reply.content:
            raise PayloadError("the reply holds no ledger statement")
        statement = _payload_of(reply.content, "statement")
        payload = _payload_of(reply.content, "update")
        self._countersigner.accept(node, statement, self._constants.run, number, payload)

    def _drop(self, node: int, reason: str) -> None:
        self._tally.dropped[reason] += 1
        self._informed.discard(node)
        self._holds.pop(node, None)

    def _read(self, reply: Message) -> Reading:
        """Return the decoded update, its encoded size and its bit.

        Raises:
            PayloadError: With a reason that is counted, not the client's words.
        """
        if reply.has_error():
            raise PayloadError(_refusal_text(reply.error.code))
        if "update" not in reply.content or not set(reply.content) <= {"update", "statement"}:
            raise PayloadError("the reply is not one encoded update")
        payload = _payload_of(reply.content, "update")
        size, inside = len(payload), False
        limit = 64 + 8 * self._constants.layout.size
        if size > limit:
            raise PayloadError("the payload is larger than any update of this plan")
        if self._mechanism is not None and self._mechanism.count_noise is not None:
            inside, payload = split_bit(payload)
        try:
            vector = self._codec.decode(payload, self._constants.layout.blocks)
        except PayloadError as error:
            raise PayloadError("the payload cannot be decoded") from error
        if not np.isfinite(vector).all():
            raise PayloadError("the update holds non-finite values")
        if float(np.linalg.norm(vector.astype(np.float64))) > self._constants.bound:
            raise PayloadError("the update is larger than the plan's bound")
        return Reading(vector, size, inside)

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


def _packed(data: bytes) -> Array:
    return Array(dtype="uint8", shape=(len(data),), stype="custom", data=data)


def _payload_of(content: RecordDict, name: str) -> bytes:
    record = content.get(name)
    if not isinstance(record, ArrayRecord) or list(record) != ["payload"]:
        raise PayloadError("the reply is not one encoded update")
    return record["payload"].data


def _refusal_text(code: int) -> str:
    try:
        return Refusal(code).text
    except ValueError:
        return f"the client gave no reply (Flower error {code})"
