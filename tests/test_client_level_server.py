"""Client-level privacy on the server, through the real strategy with scripted clients."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from scipy import stats
from torch import nn

from reticent.client.records import pack
from reticent.compression.codec import build_codec
from reticent.core.errors import NetworkError, PlanError
from reticent.core.plan import Plan, parse_plan
from reticent.core.protocol import Constants, Order
from reticent.core.seeds import numpy_generator
from reticent.core.update import Layout
from reticent.privacy.client_level import CLIP_RATE, with_bit
from reticent.privacy.randomness import Randomness, SeededRandomness, SystemRandomness
from reticent.privacy.schedule import schedule_for
from reticent.server.optimizer import ServerState, apply_round
from reticent.server.rounds import RoundPlan, Tally
from reticent.server.strategy import PrivateAveraging
from reticent.simulations.admission import check_codecs
from reticent.simulations.grid import InProcessGrid, enter_task, node_of

CONSTANTS = Constants(b"", np.zeros((0, 0), dtype=np.float32)).encode()
LAYOUT = Layout.of(nn.Linear(99, 20))  # 2,000 parameters
CODEC = build_codec(("identity",))
UNIT = np.full(LAYOUT.size, LAYOUT.size**-0.5, dtype=np.float32)
Answer = Callable[[Message], bytes | None]
CLIP = 0.5


def plan_of(clients: int, rounds: int, *overrides: str) -> Plan:
    """A plan that steps along the mean itself, so that models show the released means."""
    given = [
        f"task.clients={clients}",
        f"federation.clients_per_round={clients}",
        f"federation.rounds={rounds}",
        "federation.min_replies=1",
        "federation.retries=0",
        "federation.server.kind=sgd",
        "federation.server.momentum=0.0",
        "federation.server.learning_rate=1.0",
        "federation.average=0.0",
        'updates.codec=["identity"]',
        'updates.broadcast=["identity"]',
        "privacy.unit=client",
        f"privacy.clip={CLIP}",
        "privacy.noise_multiplier=1.2",
    ]
    return parse_plan("", [*given, *overrides])


class Script:
    """Answers each message with the payload that a function makes, or not at all."""

    window = 3

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.clips: dict[int, float] = {}

    def answer(self, messages: list[Message]) -> Iterator[Message]:
        for message in messages:
            order = order_in(message)
            self.clips[order.round] = order.clip
            payload = self._answer(message)
            if payload is not None:
                yield Message(RecordDict({"update": pack(payload)}), reply_to=message)


class Federation:
    """The real strategy on a grid of scripted clients, from a model of zeros."""

    def __init__(
        self,
        plan: Plan,
        answer: Answer,
        randomness: Randomness | None = None,
        run: str = "run",
        state: ServerState | None = None,
    ) -> None:
        enter_task()
        self.script = Script(answer)
        self.grid = InProcessGrid(plan.task.clients, self.script)
        self.tallies: list[Tally] = []
        self.states: list[ServerState] = []
        digest = hashlib.sha256(CONSTANTS).hexdigest()
        source = randomness or SeededRandomness(plan.seed)
        schedule = schedule_for(plan)
        rounds = RoundPlan(run, schedule, 10.0, LAYOUT, CONSTANTS, digest, source)
        self.start = state or ServerState.begin(np.zeros(LAYOUT.size, np.float32), CLIP)
        self.strategy = PrivateAveraging(plan, rounds, self.start, self._commit)

    def _commit(self, state: ServerState, tally: Tally, seconds: float) -> None:
        self.states.append(state)
        self.tallies.append(tally)

    def run(self) -> Federation:
        self.strategy.start(self.grid)
        return self

    @property
    def means(self) -> list[np.ndarray]:
        """The released means, in float64."""
        return [t.noised.mean for t in self.tallies if t.noised is not None]


def order_in(message: Message) -> Order:
    return Order.from_config(dict(message.content.config_records["order"]))


def encoded(vector: np.ndarray) -> bytes:
    given = vector.astype(np.float32)
    return CODEC.encode(given, LAYOUT.blocks, numpy_generator(0))


ZERO = encoded(np.zeros(LAYOUT.size))


def zeros(_: Message) -> bytes:
    return ZERO


def only(nodes: set[int], payload: bytes) -> Answer:
    """A zero update from everybody but ``nodes``, which send ``payload``."""
    return lambda m: payload if m.metadata.dst_node_id in nodes else ZERO


def voting(norm: float, clip: float, update: np.ndarray) -> bytes:
    return with_bit(encoded(min(1.0, clip / norm) * update), inside=norm <= clip)


def accepts(draws: np.ndarray, scale: float) -> bool:
    tail, square = stats.chi2(len(draws)), float(np.sum(np.square(draws / scale)))
    return bool(min(tail.cdf(square), tail.sf(square)) > 1e-4) and bool(
        stats.kstest(draws / scale, "norm").pvalue > 1e-4
    )


@pytest.mark.parametrize("source", [SeededRandomness(5), SystemRandomness()])
def test_a_round_of_zero_updates_releases_the_whole_noise_and_two_thirds_is_rejected(
    source: Randomness,
) -> None:
    draws = Federation(plan_of(8, 1), zeros, source).run().means[0]
    scale = 1.2 * CLIP / 8
    assert accepts(draws, scale)
    assert not accepts(draws * 2 / 3, scale)


def test_an_adaptive_round_has_the_larger_noise_of_its_sum() -> None:
    plan = plan_of(40, 1, "privacy.clip_quantile=0.5")
    found = Federation(plan, lambda _: with_bit(ZERO, True)).run().means[0]
    z = (1.2**-2 - (2 * 40 / 20) ** -2) ** -0.5
    assert accepts(found, z * CLIP / 40)
    assert not accepts(found, 1.5 * z * CLIP / 40)


def test_sum_and_count_of_a_round_share_no_noise() -> None:
    """One draw for both would let a reader subtract the noise of the other."""
    plan = plan_of(40, 3, "privacy.clip_quantile=0.5")

    def half(message: Message) -> bytes:
        return with_bit(ZERO, message.metadata.dst_node_id % 2 == 0)

    federation = Federation(plan, half).run()
    z = (1.2**-2 - (2 * 40 / 20) ** -2) ** -0.5
    counts: list[float] = []
    for tally in federation.tallies:
        assert tally.noised is not None and tally.noised.fraction is not None
        counts.append((tally.noised.fraction - 0.5) * 40 / (40 / 20))
        sums = tally.noised.mean * 40 / (z * tally.noised.clip)
        assert np.abs(sums - counts[-1]).min() > 1e-9
        assert np.abs(sums + counts[-1]).min() > 1e-9
    assert len({round(c, 9) for c in counts}) == 3, "nor do two rounds"


@pytest.mark.parametrize("replying", [1, 3, 8])
def test_the_noise_is_whole_and_the_denominator_public_however_few_reply(replying: int) -> None:
    nodes = {node_of(c) for c in range(replying)}

    def some(update: bytes) -> Answer:
        return lambda m: update if m.metadata.dst_node_id in nodes else None

    silent = Federation(plan_of(8, 1), some(ZERO)).run()
    loud = Federation(plan_of(8, 1), some(encoded(CLIP * UNIT))).run()
    assert silent.tallies[0].sum.count == replying
    assert accepts(silent.means[0], 1.2 * CLIP / 8)
    moved = loud.means[0] - silent.means[0]  # the same seed: the same noise
    assert float(np.linalg.norm(moved)) == pytest.approx(replying * CLIP / 8, rel=1e-6)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.001, 1e6, 1e30])
@pytest.mark.parametrize("replying", [2, 8])
def test_one_client_moves_the_mean_by_at_most_the_bound_over_the_denominator(
    factor: float, replying: int
) -> None:
    nodes = {node_of(c) for c in range(replying)}
    huge = encoded(factor * CLIP * UNIT)

    def answer(first: bytes) -> Answer:
        others = only({node_of(0)}, first)
        return lambda m: others(m) if m.metadata.dst_node_id in nodes else None

    with_it = Federation(plan_of(8, 1), answer(huge)).run().means[0]
    without = Federation(plan_of(8, 1), answer(ZERO)).run().means[0]
    moved = float(np.linalg.norm(with_it - without))
    assert moved <= CLIP / 8 * (1 + 1e-12)
    assert moved == pytest.approx(min(1.0, factor) * CLIP / 8, rel=1e-6)
    # The wrong denominator, so that it is seen to fail: a mean over the replies moves further.
    if replying < 8 and factor >= 1:
        assert moved * 8 / replying > 3 * CLIP / 8


def flipped(vector: np.ndarray, value: float) -> bytes:
    """A payload of the identity codec with one value that it would not encode."""
    import struct
    import zlib

    marker = np.float32(1234.5)
    given = vector.astype(np.float32)
    given[7] = marker
    data = encoded(given).replace(marker.tobytes(), np.float32(value).tobytes())
    head, rest = data[:13], data[17:]
    return head + struct.pack("<I", zlib.crc32(rest, zlib.crc32(head))) + rest


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_update_is_dropped_counted_and_moves_nothing(value: float) -> None:
    bad = only({node_of(1)}, flipped(UNIT, value))
    federation = Federation(plan_of(4, 1), bad).run()
    assert sum(federation.tallies[0].dropped.values()) == 1
    assert federation.tallies[0].sum.count == 3
    assert np.array_equal(federation.means[0], Federation(plan_of(4, 1), zeros).run().means[0])


def test_nobody_at_all_is_too_few_and_releases_nothing() -> None:
    federation = Federation(plan_of(4, 1), lambda _: None)
    with pytest.raises(NetworkError, match="0 of 4 clients"):
        federation.run()
    assert federation.states == []


@pytest.mark.parametrize("payload", [ZERO, b"\x02" + ZERO, b"\xff" + ZERO, b""])
def test_an_adaptive_round_takes_no_vote_but_a_bit(payload: bytes) -> None:
    plan = plan_of(40, 1, "privacy.clip_quantile=0.5")
    bad = node_of(3)
    federation = Federation(
        plan, lambda m: payload if m.metadata.dst_node_id == bad else with_bit(ZERO, True)
    ).run()
    assert federation.tallies[0].sum.count == 39
    assert sum(federation.tallies[0].dropped.values()) == 1


def test_no_two_rounds_or_runs_share_noise() -> None:
    plan = plan_of(4, 6)
    rows = np.stack(
        [mean for run in ("a", "b") for mean in Federation(plan, zeros, run=run).run().means]
        + Federation(plan_of(4, 2), zeros, SystemRandomness()).run().means
    )
    correlation = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlation).max() < 5 / LAYOUT.size**0.5


def test_the_noise_of_the_count_is_not_that_of_the_sum() -> None:
    source = SeededRandomness(0)
    total = source.stream("server", "sum", "run", 1).normal(1)[0]
    assert source.stream("server", "count", "run", 1).normal(1)[0] != total


def test_the_same_seed_gives_the_same_noise_and_the_operating_system_never_does() -> None:
    def models(source: Randomness | None) -> np.ndarray:
        return Federation(plan_of(4, 3), zeros, source).run().states[-1].weights

    assert np.array_equal(models(None), models(None))
    assert not np.array_equal(models(SystemRandomness()), models(SystemRandomness()))


def test_the_model_moves_along_the_noised_mean() -> None:
    plan = plan_of(4, 1)
    federation = Federation(plan, only({node_of(2)}, encoded(0.1 * UNIT))).run()
    section = plan.federation.server
    expected = apply_round(federation.start, federation.means[0], section, 0.0)
    assert np.array_equal(federation.states[0].weights, expected.weights)
    assert federation.states[0].clip == CLIP


ADAPTIVE = ["privacy.clip_quantile=0.5", "privacy.noise_multiplier=0.8"]


@pytest.mark.parametrize("norm", [10.0, 0.02])
def test_the_bound_moves_towards_the_norms_of_the_updates(norm: float) -> None:
    """Norms of 10 under a bound of 0.5 must raise it, and norms of 0.02 lower it."""
    plan = plan_of(60, 25, *ADAPTIVE)
    answer: Answer = lambda m: voting(norm, order_in(m).clip, norm * UNIT)  # noqa: E731
    federation = Federation(plan, answer).run()
    clips = [t.noised.clip for t in federation.tallies if t.noised]
    assert clips[0] == CLIP and clips == list(federation.script.clips.values())
    towards = math.copysign(1.0, norm - CLIP)
    assert np.all(np.diff(np.log(clips)) * towards > 0)
    steady = math.log(clips[-1] / CLIP) / 24
    assert steady == pytest.approx(towards * CLIP_RATE / 2, rel=0.1)


def test_a_bound_depends_on_bits_of_earlier_rounds_only() -> None:
    plan = plan_of(60, 2, *ADAPTIVE)

    def answer(last: bool) -> Answer:
        return lambda m: with_bit(ZERO, order_in(m).round == 1 or last)

    yes, no = (Federation(plan, answer(bit)).run() for bit in (True, False))
    assert yes.script.clips == no.script.clips
    assert yes.states[0].clip == no.states[0].clip == yes.script.clips[2]
    assert yes.states[1].clip != no.states[1].clip
    # Nor does the noise of a round follow the bound that the round leads to.
    assert np.array_equal(yes.means[1], no.means[1])


def test_a_run_continued_from_a_state_gives_the_same_bits() -> None:
    plan = plan_of(60, 6, *ADAPTIVE)
    answer: Answer = lambda m: voting(2.0, order_in(m).clip, 2.0 * UNIT)  # noqa: E731
    whole = Federation(plan, answer).run()
    rest = Federation(plan, answer, state=whole.states[2]).run()
    assert [s.clip for s in rest.states] == [s.clip for s in whole.states[3:]]
    for a, b in zip(rest.states, whole.states[3:], strict=True):
        assert np.array_equal(a.weights, b.weights)


def test_what_is_not_noised_is_not_among_what_is_released() -> None:
    plan = plan_of(60, 1, *ADAPTIVE)
    noised = Federation(plan, lambda _: with_bit(ZERO, True)).run().tallies[0].noised
    assert noised is not None and noised.fraction is not None
    assert noised.fraction != 1.0 and noised.fraction == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize("codec", ['["int4", "ans"]', '["topk:0.1"]', '["dither4", "ans"]'])
def test_every_codec_is_admitted_because_what_is_decoded_is_bounded(codec: str) -> None:
    check_codecs(plan_of(4, 1, f"updates.codec={codec}"))
    shared = ["privacy.unit=example", f"updates.codec={codec}"]
    if "dither" not in codec:
        with pytest.raises(PlanError):
            check_codecs(plan_of(4, 1, *shared))


def test_a_codec_that_lengthens_an_update_does_not_lengthen_what_is_added() -> None:
    coarse = build_codec(("int4",))
    payload = coarse.encode(
        (CLIP * UNIT * 1.0).astype(np.float32), LAYOUT.blocks, numpy_generator(3)
    )
    longer = coarse.encode(
        (CLIP * numpy_generator(1).standard_normal(LAYOUT.size)).astype(np.float32),
        LAYOUT.blocks,
        numpy_generator(2),
    )
    assert np.linalg.norm(coarse.decode(longer, LAYOUT.blocks)) > CLIP
    plan = plan_of(4, 1, 'updates.codec=["int4"]')
    zero = coarse.encode(np.zeros(LAYOUT.size, np.float32), LAYOUT.blocks, numpy_generator(0))

    def first(data: bytes) -> Answer:
        return lambda m: data if m.metadata.dst_node_id == node_of(0) else zero

    base = Federation(plan, first(zero)).run().means[0]
    for data in (payload, longer):
        moved = Federation(plan, first(data)).run().means[0] - base
        assert np.linalg.norm(moved) <= CLIP / 4 * (1 + 1e-12)


def test_a_state_without_a_bound_begins_with_the_plans() -> None:
    federation = Federation(plan_of(4, 1), zeros)
    bare = Federation(plan_of(4, 1), zeros, state=replace(federation.start, clip=None))
    assert np.array_equal(bare.run().means[0], federation.run().means[0])
    assert bare.script.clips == {1: CLIP}
