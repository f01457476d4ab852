"""Who is asked: passes, a fixed number, coins; bounds on participation; a million in no memory."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from reticent.core.errors import NetworkError, PlanError
from reticent.core.plan import Plan, parse_plan
from reticent.core.seeds import derive_key, numpy_generator
from reticent.core.uniforms import permuted
from reticent.privacy.accounting import epsilon
from reticent.privacy.randomness import SeededRandomness, SystemRandomness
from reticent.privacy.schedule import cohort_rate, participations, schedule_for
from reticent.server.sampling import Sampler, cohort_in_time


def plan_of(clients: int, size: int, *overrides: str) -> Plan:
    return parse_plan(
        "",
        [
            f"task.clients={clients}",
            f"federation.clients_per_round={size}",
            "privacy.unit=client",
            "privacy.noise_multiplier=1.0",
            *overrides,
        ],
    )


def sampler_of(plan: Plan) -> Sampler:
    return Sampler(plan, SeededRandomness(plan.seed), "run")


def cohorts(plan: Plan, rounds: int) -> list[list[int]]:
    sampler, asked = sampler_of(plan), Counter[int]()
    dealt: list[list[int]] = []
    for number in range(1, rounds + 1):
        dealt.append(sampler.cohort(number, range(plan.task.clients), asked))
        asked.update(dealt[-1])
    return dealt


def passes_by_hand(plan: Plan, number: int, nodes: Sequence[int], asked: Counter[int]) -> list[int]:
    """The loop that the sampler replaces: a sorted list of everybody, permuted and rolled."""
    size = plan.federation.clients_per_round
    per_pass = max(1, len(nodes) // size)
    generator = numpy_generator(plan.seed, "cohort", (number - 1) // per_pass)
    order = np.roll(generator.permutation(len(nodes)), -((number - 1) % per_pass * size))
    free = [nodes[i] for i in order if asked[nodes[i]] < participations(plan)]
    return sorted(free[:size])


@pytest.mark.parametrize(("clients", "size"), [(10, 3), (31, 7), (8, 8)])
def test_passes_are_those_of_a_plain_loop(clients: int, size: int) -> None:
    plan = plan_of(clients, size, "federation.rounds=12")
    sampler, asked = sampler_of(plan), Counter[int]()
    nodes = [5 * n + 2 for n in range(clients)]
    for number in range(1, 13):
        found = sampler.cohort(number, nodes, asked)
        assert found == passes_by_hand(plan, number, nodes, asked)
        asked.update(found)


def test_the_stream_of_one_by_one_deals_the_same_cohorts() -> None:
    plan = plan_of(23, 5, "federation.rounds=9")
    stream = sampler_of(plan).stream(range(23), 5)
    for cohort in cohorts(plan, 9):
        assert sorted(next(stream) for _ in range(5)) == cohort


def awake(nodes: NDArray[np.int64]) -> NDArray[np.bool_]:
    return nodes % 8 == 0


def test_whoever_was_asked_in_a_pass_is_not_asked_again_while_others_are_there() -> None:
    """Of 1,000 clients 125 are awake, and a round asks 100: the second asks the other 25."""
    plan = plan_of(1000, 100, "federation.rounds=60")
    sampler, asked, dealt = sampler_of(plan), Counter[int](), list[set[int]]()
    for number in range(1, 5):
        dealt.append(set(sampler.cohort(number, range(1000), asked, awake)))
        asked.update(dealt[-1])
    assert [len(cohort) for cohort in dealt] == [100] * 4
    assert len(dealt[0] | dealt[1]) == 125


@pytest.mark.parametrize("share", [0.9, 0.4])
def test_nobody_is_asked_more_often_than_passes_while_one_is_there_who_was_not(
    share: float,
) -> None:
    plan = plan_of(200, 20, "federation.rounds=40")
    sampler, asked, repeated = sampler_of(plan), Counter[int](), 0
    for number in range(1, 41):
        coins = numpy_generator(0, "awake", number).random(200)
        there = set(np.flatnonzero(coins < share).tolist())
        found = sampler.cohort(number, range(200), asked, lambda some, c=coins: c[some] < share)
        passes = (number - 1) // 10 + 1
        ahead = {node for node in found if asked[node] >= passes}
        others = {n for n in there if asked[n] < passes}
        assert set(found) <= there and len(found) <= 20
        assert not ahead or others <= set(found)
        assert len(found) == 20 or all(asked[n] >= participations(plan) for n in there - set(found))
        repeated += len(ahead)
        asked.update(found)
    assert max(asked.values()) <= participations(plan) == 4
    assert repeated > 0


def test_where_all_are_there_passes_are_those_without_a_fleet() -> None:
    plan = plan_of(31, 7, "federation.rounds=12")
    sampler, asked, everybody = sampler_of(plan), Counter[int](), np.ones(31, dtype=bool)
    for number, cohort in enumerate(cohorts(plan, 12), 1):
        assert sampler.cohort(number, range(31), asked, lambda some: everybody[some]) == cohort
        asked.update(cohort)


@pytest.mark.parametrize("sampling", ["passes", "fixed"])
def test_nodes_may_have_any_id_of_64_bits(sampling: str) -> None:
    """As those of real devices have: whoever is chosen is one of them."""
    nodes = sorted([1, 2**63 - 1, 2**63, 2**64 - 1, 11106844511284742700])
    plan = plan_of(5, 2, f"federation.sampling={sampling}", "federation.rounds=2")
    sampler = sampler_of(plan)
    chosen = [sampler.cohort(number, nodes, {2**64 - 1: 10**6}) for number in (1, 2)]
    assert all(len(found) == 2 and set(found) < set(nodes) for found in chosen)
    assert all(2**64 - 1 not in found for found in chosen)


def test_a_fixed_cohort_is_uniform_and_has_its_size() -> None:
    plan = plan_of(20, 4, "federation.sampling=fixed", "federation.rounds=2000")
    dealt = cohorts(plan, 2000)
    assert all(len(set(c)) == 4 for c in dealt)
    counts = Counter(n for cohort in dealt for n in cohort)
    observed = [counts[n] for n in range(20)]
    assert stats.chisquare(observed).pvalue > 1e-3
    skewed = [count + (60 if n < 10 else -60) for n, count in enumerate(observed)]
    assert stats.chisquare(skewed).pvalue < 1e-3


def test_poisson_cohorts_are_independent_coins_of_the_rate() -> None:
    plan = plan_of(30, 6, "federation.sampling=poisson", "federation.rounds=3000")
    joined = np.zeros((3000, 30))
    for number, cohort in enumerate(cohorts(plan, 3000)):
        joined[number, cohort] = 1
    sizes = joined.sum(axis=1)
    assert stats.binomtest(int(sizes.sum()), 90_000, 0.2).pvalue > 1e-3
    assert stats.binomtest(int(sizes.sum()), 90_000, 0.2 * 2 / 3).pvalue < 1e-3
    # A fixed size would have no variance; coins have that of a binomial.
    assert sizes.var() == pytest.approx(30 * 0.2 * 0.8, rel=0.15)
    correlation = np.corrcoef(joined[:, 0], joined[:, 1])[0, 1]
    assert abs(correlation) < 4 / np.sqrt(3000)


def test_an_empty_poisson_cohort_is_a_cohort() -> None:
    plan = plan_of(50, 1, "federation.sampling=poisson", "federation.rounds=40")
    assert [] in cohorts(plan, 40)
    assert cohort_in_time(sampler_of(plan), 1, range(0), {}, None, 0.0) == ([], 0.0)


def test_coins_come_from_the_operating_system_on_a_real_server() -> None:
    plan = plan_of(200, 50, "federation.sampling=poisson")
    drawn = [Sampler(plan, SystemRandomness(), "run").cohort(1, range(200), {}) for _ in range(2)]
    assert drawn[0] != drawn[1]
    assert sampler_of(plan).cohort(1, range(200), {}) == sampler_of(plan).cohort(1, range(200), {})


@pytest.mark.parametrize("sampling", ["fixed", "poisson"])
@pytest.mark.parametrize(("limit", "window"), [(1, 5), (2, 7), (3, 3)])
def test_a_limit_holds_in_every_window_of_rounds(sampling: str, limit: int, window: int) -> None:
    plan = plan_of(
        60,
        5,
        f"federation.sampling={sampling}",
        f"federation.limit={limit}",
        f"federation.window={window}",
        "federation.rounds=40",
    )
    dealt = cohorts(plan, 40)
    for first in range(40 - window + 1):
        within = Counter(n for cohort in dealt[first : first + window] for n in cohort)
        assert max(within.values(), default=0) <= limit
    most = max(Counter(n for cohort in dealt for n in cohort).values())
    assert most <= participations(plan) == 40 // window * limit + min(limit, 40 % window)
    if sampling == "poisson":
        assert np.mean([len(c) for c in dealt]) == pytest.approx(5, rel=0.35)


def limited(clients: int, size: int, limit: int, window: int, *overrides: str) -> Plan:
    turns = [f"federation.limit={limit}", f"federation.window={window}"]
    return plan_of(clients, size, "federation.sampling=fixed", *turns, *overrides)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("clients", "size", "limit", "window"), [(1000, 100, 1, 10), (103, 10, 1, 10), (23, 6, 2, 7)]
)
def test_with_a_limit_that_is_accepted_every_cohort_is_whole(
    clients: int, size: int, limit: int, window: int, seed: int
) -> None:
    plan = limited(clients, size, limit, window, f"seed={seed}", "federation.rounds=40")
    assert {len(cohort) for cohort in cohorts(plan, 40)} == {size}


@pytest.mark.parametrize(
    ("clients", "limit", "window"), [(1000, 1, 21), (15, 2, 10), (19, 3, 4), (12, 5, 5), (29, 4, 6)]
)
def test_a_limit_is_refused_where_a_round_would_have_too_few(
    clients: int, limit: int, window: int
) -> None:
    plan = limited(clients, 1, limit, window, f"federation.rounds={2 * window}")
    sampler, asked = sampler_of(plan), Counter[int]()
    turns = [sum(1 for _ in sampler._free(n, [np.arange(clients)], range(2, clients + 2), asked,
                                          99, None)) for n in range(1, window + 1)]  # fmt: skip
    assert sum(turns) == clients * limit
    assert limited(clients, min(turns), limit, window).federation.quorum <= min(turns)
    if min(turns) < clients:
        with pytest.raises(PlanError, match=f"must be at most {min(turns)}, the clients"):
            limited(clients, min(turns) + 1, limit, window)


def test_places_of_a_permutation_are_all_others_and_uniform() -> None:
    key = derive_key(0, "test")
    for count in (*range(1, 70), 255, 256, 257, 4099):
        found = permuted(key, np.arange(count), count)
        assert sorted(found.tolist()) == list(range(count))
    one = np.array([7])
    assert permuted(key, one, 4099) == permuted(key, np.arange(4099), 4099)[7]
    keys = [derive_key(seed, "test") for seed in range(3000)]
    pairs = np.array([permuted(k, np.array([3, 4]), 10) for k in keys])
    # Of two neighbours, where one is, and how far the other is from it.
    for values, size in ((pairs[:, 0], 10), ((pairs[:, 1] - pairs[:, 0]) % 10 - 1, 9)):
        counts = np.bincount(values, minlength=size)
        assert stats.chisquare(counts).pvalue > 1e-3
        skewed = counts + np.where(np.arange(size) == 0, 150, 0)
        assert stats.chisquare(skewed).pvalue < 1e-3


def test_too_few_that_may_be_asked_are_an_error_with_the_limit() -> None:
    plan = limited(20, 4, 1, 5, "federation.min_replies=4")
    sampler = sampler_of(plan)
    # The turns of so few real devices are uneven, so some round has fewer than four.
    with pytest.raises(
        NetworkError, match=r"turn in it \(federation.limit=1 in any window=5 rounds\); 4 are"
    ):
        [cohort_in_time(sampler, n, [*range(20)], {}, None, 0.0) for n in range(1, 6)]


def test_a_device_that_comes_back_as_another_node_keeps_its_turn() -> None:
    plan = limited(40, 8, 1, 5, "federation.min_replies=1", "federation.rounds=5")
    sampler = Sampler(plan, SeededRandomness(0), "run", identity=lambda node: node % 1000)
    first = [sampler.able(n, list(range(40)), {}) for n in range(1, 6)]
    renewed = [sampler.able(n, list(range(3000, 3040)), {}) for n in range(1, 6)]
    assert [[node % 1000 for node in nodes] for nodes in renewed] == first
    assert sorted(node for nodes in first for node in nodes) == list(range(40))
    plain = sampler_of(plan)  # the control
    assert [n % 1000 for n in plain.able(1, list(range(3000, 3040)), {})] != first[0]


@pytest.mark.parametrize(
    "sampling", [["passes"], ["fixed"], ["poisson"], ["fixed", "limit=2", "window=50"]]
)
def test_a_cohort_of_a_million_makes_no_million_objects(sampling: list[str]) -> None:
    way, *limit = sampling
    given = [f"sampling={way}", *limit]
    plan = plan_of(1_000_000, 100, *(f"federation.{override}" for override in given))
    sampler, nodes = sampler_of(plan), range(2, 1_000_002)
    tracemalloc.start()
    try:
        for number in range(1, 4):
            sampler.cohort(number, nodes, {})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20e6 if way == "passes" else peak < 1e6  # a list of ints would be 40 MB


def secret(*overrides: str) -> Plan:
    return plan_of(
        1000,
        50,
        "federation.sampling=poisson",
        "federation.rounds=100",
        "privacy.secret_cohort=true",
        *overrides,
    )


def test_a_secret_poisson_cohort_is_amplified_and_a_seen_one_is_not() -> None:
    """The figures of docs/results.md: 3.50 against 91.8 for 50 of 1,000 clients, 100 rounds."""
    hidden = schedule_for(secret())
    seen = schedule_for(secret("privacy.secret_cohort=false"))
    assert hidden is not None and seen is not None
    claims = [epsilon([s.over(s.round_event(), s.participations)], s.delta) for s in (hidden, seen)]
    assert claims == [pytest.approx(3.502, abs=2e-3), pytest.approx(91.8, abs=0.1)]
    assert (hidden.participations, seen.participations) == (100, 100)
    assert hidden.server_event() == seen.server_event()  # nothing against the server


def test_a_limit_lowers_the_rounds_that_are_counted_and_raises_the_rate() -> None:
    plan = secret("federation.limit=1", "federation.window=10")
    assert cohort_rate(plan) == 0.5
    assert participations(plan) == 10


def test_sum_and_count_of_one_secret_sample_are_one_event() -> None:
    plan = secret("privacy.clip_quantile=0.5", "privacy.noise_multiplier=0.9")
    schedule = schedule_for(plan)
    assert schedule is not None
    (event,) = [schedule.round_event()]
    assert (event.sampling_rate, round(event.noise_multiplier, 9)) == (0.05, 0.9)  # pyright: ignore


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["privacy.unit=example", "federation.sampling=fixed"], "earns nothing"),
        (["federation.sampling=fixed"], 'must be "poisson"'),
        (["fleet.availability.kind=diurnal"], "amplification by sampling cannot be claimed"),
        (["fleet.over_selection=1.5"], "over_selection=1.5: must be 1"),
        (["federation.min_replies=5"], "min_replies=5: must be absent"),
    ],
)
def test_a_secret_that_is_none_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        secret(*overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["federation.sampling=poisson", "privacy.unit=example"], "sized for a number of replies"),
        (["federation.limit=2"], "must be absent when sampling"),
        (
            ["federation.sampling=poisson", "federation.enough=20", "privacy=off"],
            r'federation\.enough=20: must be absent when federation\.sampling is "poisson"',
        ),
        (["federation.sampling=fixed", "federation.window=2"], "no effect without limit"),
        (["federation.sampling=fixed", "federation.limit=2"], "at most window=1"),
        (
            ["federation.sampling=fixed", "federation.limit=1", "federation.window=21"],
            "clients_per_round=50: must be at most 47",
        ),
    ],
)
def test_sampling_that_cannot_be_kept_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        plan_of(1000, 50, *overrides)
