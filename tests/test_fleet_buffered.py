"""FedBuff: the schedule of a plain loop, the guarantee's conditions, and the synchronous limit."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from fleets import ROUGH, fleet_of, one_trip, plan_of, spent

from reticent.core.errors import PlanError
from reticent.core.plan import Plan
from reticent.privacy.randomness import SeededRandomness
from reticent.privacy.schedule import participations, schedule_for
from reticent.server.fleet import DROPPED, LATE, LEFT, SMALL, STALE, SURPLUS, Release
from reticent.server.sampling import Sampler
from reticent.simulations.fleet.buffered import _Desk, schedule
from reticent.simulations.fleet.clock import Trips
from reticent.simulations.grid import client_of


def buffered(clients: int, size: int, concurrency: int, *overrides: str) -> Plan:
    return plan_of(clients, size, f"federation.buffered.concurrency={concurrency}", *overrides)


def releases(plan: Plan, count: int) -> list[Release]:
    nodes = range(2, 2 + plan.task.clients)
    return list(islice(fleet_of(plan).releases(nodes), count))


def by_hand(plan: Plan, count: int) -> list[tuple[list[tuple[int, int]], Counter[str], float]]:
    """The same in plain lists: devices that are away are skipped, nobody is looked up ahead."""
    fleet, f = fleet_of(plan), plan.federation
    nodes = range(2, 2 + plan.task.clients)
    stream = Sampler(plan, SeededRandomness(0), "").stream(nodes, f.clients_per_round)
    assert f.buffered is not None and f.buffered.concurrency is not None
    waiting: list[int] = []
    busy: dict[int, tuple[float, int, int, str | None]] = {}  # node: end, asked, model, why not
    buffer: list[tuple[int, int]] = []
    rounds, of_model = Counter[int](), set[int]()
    dropped, model, asked, now = Counter[str](), 0, 0, 0.0
    found: list[tuple[list[tuple[int, int]], Counter[str], float]] = []
    while len(found) < count:
        while len(busy) < f.buffered.concurrency:
            passed: list[int] = []
            while True:
                node = waiting.pop(0) if waiting else next(stream)
                if rounds[node] >= participations(plan):
                    continue
                if node in busy or node in dict(buffer) or node in of_model:
                    passed.append(node)
                elif fleet.available(np.array([node]), now)[0]:
                    break
            waiting = passed + waiting
            trip, latest = one_trip(fleet, client_of(node), now, (model + 1, 0)), now + f.timeout
            end, why = latest, None
            if trip["lost"] < latest:
                why = trip["why"]
            elif not trip["fits"]:
                why, end = (SMALL, trip["arrived"]) if trip["arrived"] <= latest else (LATE, latest)
            elif trip["finish"] > latest:
                why = LATE
            else:
                end = trip["finish"]
            busy[node] = (end, asked, model, why)
            rounds[node] += 1
            of_model.add(node)
            asked += 1
        now = min(end for end, *_ in busy.values())
        for node in sorted((n for n in busy if busy[n][0] == now), key=lambda n: busy[n][1]):
            _, _, given, why = busy.pop(node)
            if why is None and model - given > f.buffered.max_staleness:
                why = STALE
            if why is None:
                buffer.append((node, given))
            else:
                dropped[why] += 1
            if len(buffer) == f.clients_per_round:
                found.append((buffer, dropped, now))
                buffer, dropped, model = [], Counter(), model + 1
                of_model = set()
    return found


CASES = {
    "plain": (50, 8, 16, []),
    "little staleness": (50, 4, 20, ["federation.buffered.max_staleness=1"]),
    "fewer busy than fill the buffer": (50, 10, 3, []),
    "deadline": (50, 5, 15, ["federation.timeout=12"]),
    "away": (
        80, 5, 10,
        ["fleet.availability.kind=diurnal", "fleet.availability.slot=10",
         "fleet.availability.low=0.4", "fleet.availability.high=0.9"],
    ),
    "all alike": (50, 6, 12, ['fleet.classes=[{kind="pi5"}]', "fleet.spread=0.0",
                              "fleet.jitter=0.0"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_schedule_is_that_of_a_plain_loop(case: str) -> None:
    clients, size, concurrency, overrides = CASES[case]
    plan = buffered(clients, size, concurrency, *ROUGH, *overrides, "federation.rounds=200")
    seen = Counter[str]()
    for release, (used, dropped, time) in zip(releases(plan, 40), by_hand(plan, 40), strict=True):
        assert list(release.used) == used
        assert release.dropped == dropped
        assert release.ends == pytest.approx(time, abs=1e-9)
        seen += dropped
    wanted = {"little staleness": STALE, "deadline": LATE, "away": LEFT, "plain": DROPPED}
    assert case not in wanted or seen[wanted[case]] > 0


def test_the_conditions_of_the_guarantee_hold() -> None:
    """One update of a client in a buffer, each used once, none too stale, all charged before."""
    limits = ["federation.buffered.max_staleness=2", "fleet.over_selection=2.0"]
    plan = buffered(60, 6, 30, *ROUGH, *limits, "federation.rounds=60")
    charged, used, started = set[tuple[int, int]](), set[tuple[int, int]](), Counter[int]()
    stalest = 0
    found = releases(plan, 60)
    assert len(found) == 60
    for release in found:
        nodes = [node for node, _ in release.used]
        assert len(set(nodes)) == len(nodes) == 6
        started.update(release.started)
        charged |= set(release.began)
        assert set(release.used) <= charged and not set(release.used) & used
        used |= set(release.used)
        stalest = max(stalest, *(release.number - 1 - given for _, given in release.used))
        assert len(release.unused) <= sum(release.dropped.values())
        assert set(release.unused) <= charged
    assert stalest == 2
    assert max(started.values()) <= participations(plan)


@pytest.mark.parametrize("timeout", [600, 12])
def test_by_the_end_of_a_run_all_that_was_asked_is_counted(timeout: int) -> None:
    """Those in flight at the last release too: they go on, and are charged for it."""
    more = ["federation.rounds=12", f"federation.timeout={timeout}", "fleet.over_selection=4.0"]
    plan = buffered(60, 5, 25, *ROUGH, *more)
    fleet, asked = fleet_of(plan), list[tuple[int, float, int]]()

    def trip_of(node: int, time: float, model: int) -> Trips:
        asked.append((node, time, model))
        return fleet.trips(np.array([node - 2]), time, (model + 1, 0))

    stream, there = fleet.dealt.stream(range(2, 62)), fleet.available
    found = list(schedule(fleet.dealt, stream, 60, there, fleet.next_change, trip_of, fleet.work))
    assert len(found) == 12
    used, unused, began = (
        Counter(pair for release in found for pair in getattr(release, name))
        for name in ("used", "unused", "began")
    )
    assert used + unused == began and max(began.values()) == 1
    dropped = sum((release.dropped for release in found), Counter[str]())
    assert dropped[SURPLUS] > 5
    assert used.total() + dropped.total() == len(asked) == sum(len(r.started) for r in found)
    parts = np.zeros(3)
    for node, start, model in asked:
        parts += spent(one_trip(fleet, node - 2, start, (model + 1, 0)), start, start + timeout)
    for figure, name in zip(parts, ("energy", "bytes_down", "bytes_up"), strict=True):
        assert sum(getattr(release, name) for release in found) == pytest.approx(figure, abs=20)


def test_a_run_that_is_continued_meets_the_same_releases() -> None:
    plan = buffered(50, 5, 15, *ROUGH, "federation.rounds=30")
    assert releases(plan, 20)[11:] == list(islice(fleet_of(plan).releases(range(2, 52)), 11, 20))


def test_where_all_are_alike_and_none_stale_releases_are_the_synchronous_rounds() -> None:
    alike = ['fleet.classes=[{kind="pi5",dropout=0.0}]', "fleet.spread=0.0", "fleet.jitter=0.0"]
    plan = buffered(20, 5, 5, *alike, "federation.rounds=10")
    synchronous = plan_of(20, 5, *alike, "federation.rounds=10")
    sampler, asked, now = Sampler(synchronous, SeededRandomness(0), ""), Counter[int](), 0.0
    for number, release in enumerate(releases(plan, 10), 1):
        cohort = sampler.cohort(number, range(2, 22), asked)
        asked.update(cohort)
        outcome = fleet_of(synchronous).ask(number, 0, cohort, now, 5)
        now = outcome.ends
        assert sorted(node for node, _ in release.used) == cohort == list(outcome.replied)
        assert {given for _, given in release.used} == {number - 1}
        assert release.ends == pytest.approx(now)
        assert release.energy == pytest.approx(outcome.energy)
    assert participations(plan) == participations(synchronous)


def test_when_nobody_is_left_the_schedule_ends() -> None:
    plan = buffered(10, 5, 5, "federation.rounds=3", 'fleet.classes=[{kind="phone",dropout=0.9}]')
    assert len(releases(plan, 3)) < 3


def away(low: float, high: float) -> str:
    return f'fleet.availability={{kind="diurnal",low={low},high={high}}}'


def test_a_buffer_that_nobody_can_fill_is_given_up_after_two_weeks() -> None:
    """Ten updates are needed, of ten devices, and one that was lost is not asked again."""
    lossy = 'fleet.classes=[{kind="phone",dropout=0.3}]'
    plan = buffered(10, 10, 10, lossy, away(0.9, 0.9), "federation.rounds=3")
    fleet = fleet_of(plan)
    looked = list[float]()
    there = fleet.presence.there

    def watched(clients: np.ndarray, time: float) -> np.ndarray:
        looked.append(time)
        return there(clients, time)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(fleet.presence), "there", lambda _, *given: watched(*given))
        assert list(fleet.releases(range(2, 12))) == []
    assert 13 * 86_400 < looked[-1] < 15 * 86_400


def test_devices_that_come_back_are_asked_however_long_others_wait_in_the_buffer() -> None:
    plan = buffered(20, 10, 10, away(0.05, 0.1), "federation.rounds=3", "fleet.over_selection=2.0")
    assert len(releases(plan, 3)) == 3


FEW = [*ROUGH, "federation.rounds=400", "fleet.over_selection=2.0"]


@pytest.mark.parametrize("awake", [away(0.05, 0.15), "fleet.over_selection=2.0"])
def test_a_place_stays_free_only_where_nobody_may_be_asked(
    awake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More places than devices that are awake, or that there are: all of them looked at by hand."""
    plan = buffered(120, 6, 100, *FEW, awake)
    fleet, rounds, of_model = fleet_of(plan), Counter[int](), set[int]()
    everybody = np.arange(2, 122)
    outcomes = Counter[bool]()
    choose, renew = _Desk.next, _Desk.next_model

    def watched(self: _Desk, now: float, taken: set[int]) -> int | None:
        there = fleet.available(everybody, now)
        able = {node for node, here in zip(everybody.tolist(), there, strict=True) if here}
        able = {n for n in able - taken - of_model if rounds[n] < participations(plan)}
        chosen = choose(self, now, taken)
        assert chosen in able if able else chosen is None
        outcomes[chosen is None] += 1
        if chosen is not None:
            rounds[chosen] += 1
            of_model.add(chosen)
        return chosen

    monkeypatch.setattr(_Desk, "next", watched)
    monkeypatch.setattr(_Desk, "next_model", lambda self: (of_model.clear(), renew(self)))
    assert len(list(islice(fleet.releases(range(2, 122)), 60))) == 60
    assert min(outcomes[True], outcomes[False]) > 200


def test_that_nobody_is_left_is_found_out_once_a_model_and_not_once_an_event() -> None:
    """A million devices of which few are awake would take seconds an event otherwise."""
    clients = 5_000
    plan = buffered(clients, 10, 60, "federation.rounds=400", "fleet.over_selection=10.0")
    fleet, looked = fleet_of(plan), 0
    awake = set(range(2, clients, clients // 40))

    def few(some: np.ndarray, time: float) -> np.ndarray:
        nonlocal looked
        looked += len(some)
        return np.array([node in awake for node in some.tolist()], dtype=bool)

    found = schedule(
        fleet.dealt,
        fleet.dealt.stream(range(2, 2 + clients)),
        clients,
        few,
        lambda time: np.inf,
        lambda node, time, model: fleet.trips(np.array([node - 2]), time, (model + 1, 0)),
        fleet.work,
    )
    assert len(list(islice(found, 10))) == 10
    assert looked < 5 * clients * 10


def test_what_is_in_flight_at_the_end_counts_towards_the_bound() -> None:
    assert participations(buffered(20, 5, 5, "federation.rounds=8")) == 2
    assert participations(buffered(20, 5, 6, "federation.rounds=8")) == 3
    assert (
        participations(buffered(20, 5, 5, "federation.rounds=8", "fleet.over_selection=1.5")) == 4
    )


def test_shares_are_sized_for_the_fewest_updates_of_a_buffer() -> None:
    plan = buffered(20, 5, 8, "privacy.trust=aggregator", "federation.min_replies=4")
    schedule = schedule_for(plan)
    assert schedule is not None and schedule.shares == 4


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["privacy.trust=aggregator", "federation.buffered.weight=inverse-sqrt"],
            "stale noise shares",
        ),
        (["federation.sampling=fixed"], 'must be "passes" with buffered'),
        (
            ["federation.local.scaffold=true"],
            r"local\.scaffold=true: must be false with federation\.buffered: .* newer than it",
        ),
        (
            ["federation.enough=5"],
            r"federation\.enough=5: must be absent with federation\.buffered",
        ),
        (["federation.buffered.concurrency=51"], "at most task.clients=50"),
        (['updates.delta=["int4"]', "federation.clients_per_round=40"], "different models"),
        (
            ["privacy.unit=client", "privacy.trust=aggregator", "privacy.clip_quantile=0.5"],
            "bounds of earlier rounds",
        ),
    ],
)
def test_what_buffering_would_break_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        buffered(50, 5, 10, *overrides)


def test_a_robust_rule_sees_updates_of_a_buffer_as_they_were_sent() -> None:
    rule = "federation.robust.kind=median"
    assert buffered(50, 5, 10, rule).federation.robust.kind == "median"
    assert buffered(50, 5, 10, "federation.buffered.weight=inverse-sqrt").federation.buffered
    with pytest.raises(PlanError, match="updates as they were sent"):
        buffered(50, 5, 10, rule, "federation.buffered.weight=inverse-sqrt")
