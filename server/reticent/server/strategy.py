"""The one Flower strategy: check, decode, bound, accumulate, step, commit."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
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
from reticent.core.update import Layout, Vector
from reticent.privacy.schedule import Schedule, participations

from .optimizer import Accumulator, ServerState, apply_round


@dataclass(frozen=True)
class RoundPlan:
    """Public constants of every round of a run.

    Attributes:
        run: Identity of the run.
        schedule: The mechanism; None when privacy is off.
        denominator: Expected number of examples in one client's batch.
        layout: Layout of the student.
        constants: Encoded public constants, sent once to each client.
        constants_digest: Their SHA-256.
    """

    run: str
    schedule: Schedule | None
    denominator: float
    layout: Layout
    constants: bytes
    constants_digest: str

    @property
    def bound(self) -> float:
        """Largest L2 norm of an update that is accepted.

        So far above what an honest client can send (100 times the expected batch, all gradients
        aligned, plus four times the noise) that applying it does not depend on honest data.
        """
        if self.schedule is None:
            return math.inf
        s = self.schedule
        noise = s.share_multiplier * s.clip / self.denominator * math.sqrt(self.layout.size)
        return s.steps * (100 * s.clip + 4 * noise)


@dataclass
class Tally:
    """What arrived in one round."""

    sum: Accumulator
    accepted: set[int] = field(default_factory=set)
    dropped: Counter[str] = field(default_factory=Counter)
    asked: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    first_bytes_down: int = 0


Committed = Callable[[ServerState, Tally, float], None]


class PrivateAveraging(Strategy):
    """Averages the accepted pseudo-gradients with uniform weights and steps the server optimizer.

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
    ) -> None:
        """Continue from ``state``.

        Args:
            plan: The plan.
            constants: Public constants of every round.
            state: State after the last committed round.
            committed: Makes an applied round durable.
            taken_part: Rounds that each node took part in so far.
        """
        self._plan = plan
        self._constants = constants
        self.state = state
        self._committed = committed
        self._codec: Codec = build_codec(plan.updates.codec)
        self._broadcast: Codec = build_codec(plan.updates.broadcast)
        self._informed: set[int] = set()
        self._taken_part = Counter(taken_part or {})
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
        for _ in range(federation.retries + 1):
            messages = self.configure_train(number, arrays, config, grid)
            replies = grid.send_and_receive(messages, timeout=federation.timeout)
            self.aggregate_train(number, replies)
            if self._tally.sum.count >= federation.quorum:
                break
        else:
            self._give_up(number)
        gradient = self._tally.sum.mean()
        state = apply_round(self.state, gradient, federation.server, federation.average)
        self._committed(state, self._tally, time.monotonic() - began)
        self._taken_part.update(self._tally.accepted)
        self.state = state

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
        payload = self._broadcast.encode(
            self.state.weights,
            self._constants.layout.blocks,
            numpy_generator(self._plan.seed, "broadcast", server_round),
        )
        record = ArrayRecord({"payload": _packed(payload)})
        order = ConfigRecord({**self._order(server_round).to_config()})
        cohort = [n for n in self._cohort if n not in self._tally.accepted]
        self._tally.asked += len(cohort)
        # A list, because Flower's own grid goes through the messages twice; they share records.
        return list(self._messages(cohort, record, order, server_round))

    def _messages(
        self, cohort: list[int], record: ArrayRecord, order: ConfigRecord, number: int
    ) -> Iterator[Message]:
        constants = ArrayRecord({"payload": _packed(self._constants.constants)})
        size = len(record["payload"].data)
        for node in cohort:
            content = RecordDict({"order": order, "broadcast": record})
            self._tally.bytes_down += size
            if node not in self._informed:
                content["constants"] = constants
                self._tally.first_bytes_down += len(self._constants.constants)
            yield Message(content, dst_node_id=node, message_type="train", group_id=str(number))

    def _order(self, number: int) -> Order:
        c = self._constants
        sigma = c.schedule.noise_multiplier if c.schedule else 0.0
        return Order(
            PROTOCOL, c.run, self._plan.digest, number, c.constants_digest, sigma, c.denominator
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
        free = (nodes[i] for i in order if self._taken_part[nodes[i]] < most)
        chosen = sorted(islice(free, federation.clients_per_round))
        if len(chosen) < federation.quorum:
            raise NetworkError(
                f"round {number}: {len(chosen)} connected clients have taken part in fewer than "
                f"the {most} rounds that the plan's privacy target allows each; "
                f"{federation.quorum} are needed"
            )
        return chosen

    def _wait_for_nodes(self, grid: Grid) -> list[int]:
        federation = self._plan.federation
        deadline = time.monotonic() + federation.timeout
        while True:
            nodes = list(grid.get_node_ids())
            if len(nodes) >= federation.clients_per_round:
                return nodes
            if time.monotonic() > deadline:
                if len(nodes) >= federation.quorum:
                    return nodes
                raise NetworkError(
                    f"{len(nodes)} clients are connected after {federation.timeout:g} s, "
                    f"{federation.quorum} are needed"
                )
            time.sleep(1.0)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold each reply as it arrives; what is broken is dropped and counted by reason."""
        for reply in replies:
            node = reply.metadata.src_node_id
            if reply.metadata.group_id != str(server_round) or node in self._tally.accepted:
                continue  # a late or repeated reply
            try:
                vector, size = self._read(reply)
            except PayloadError as error:
                self._drop(node, str(error))
                continue
            self._tally.sum.add(vector)
            self._tally.accepted.add(node)
            self._tally.bytes_up += size
            self._informed.add(node)
        return None, None

    def _drop(self, node: int, reason: str) -> None:
        self._tally.dropped[reason] += 1
        self._informed.discard(node)

    def _read(self, reply: Message) -> tuple[Vector, int]:
        """Return the decoded update and its encoded size.

        Raises:
            PayloadError: With a reason that is counted, not the client's words.
        """
        if reply.has_error():
            raise PayloadError(_refusal_text(reply.error.code))
        record = reply.content.get("update") if list(reply.content) == ["update"] else None
        if not isinstance(record, ArrayRecord) or list(record) != ["payload"]:
            raise PayloadError("the reply is not one encoded update")
        payload = record["payload"].data
        limit = 64 + 8 * self._constants.layout.size
        if len(payload) > limit:
            raise PayloadError("the payload is larger than any update of this plan")
        try:
            vector = self._codec.decode(payload, self._constants.layout.blocks)
        except PayloadError as error:
            raise PayloadError("the payload cannot be decoded") from error
        if not np.isfinite(vector).all():
            raise PayloadError("the update holds non-finite values")
        if float(np.linalg.norm(vector.astype(np.float64))) > self._constants.bound:
            raise PayloadError("the update is larger than the plan's bound")
        return vector, len(payload)

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


def _refusal_text(code: int) -> str:
    try:
        return Refusal(code).text
    except ValueError:
        return f"the client gave no reply (Flower error {code})"
