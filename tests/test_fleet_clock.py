"""A fleet's virtual clock agrees with a simulation of one event after another."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from fleets import ROUGH, SIZES, by_events, fleet_of, plan_of
from scipy import stats

from reticent.core.errors import PlanError
from reticent.core.fleet import BUILT_IN
from reticent.core.plan import parse_plan
from reticent.core.uniforms import uniforms
from reticent.server.fleet import DROPPED, LATE, LEFT, SMALL, SURPLUS
from reticent.simulations.grid import node_of

NODES = [node_of(c) for c in range(50)]
DIURNAL = ["fleet.availability.kind=diurnal", "fleet.availability.slot=6"]
CASES = {
    "as many as are needed": (50, []),
    "over-selected": (20, []),
    "deadline": (50, ["federation.timeout=12"]),
    "devices that leave": (40, [*DIURNAL, "fleet.availability.high=1.0"]),
    "everyone drops out": (10, ['fleet.classes=[{kind="phone",dropout=0.99}]']),
    "nobody has the memory": (10, ["fleet.runtime_memory=1e12"]),
    "all alike": (30, ['fleet.classes=[{kind="pi5",dropout=0.0}]', "fleet.spread=0.0"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_round_is_that_of_an_event_by_event_simulation(case: str) -> None:
    want, overrides = CASES[case]
    fleet = fleet_of(plan_of(50, 50, *ROUGH, *overrides))
    seen = set[str]()
    for number in range(1, 21):
        found = fleet.ask(number, 0, NODES, 1000.0, want)
        reference = by_events(fleet, number, NODES, 1000.0, want)
        assert found.ends == pytest.approx(reference.ends, abs=1e-9)
        assert found.energy == pytest.approx(reference.energy)
        for name in ("replied", "charged", "dropped", "bytes_down", "bytes_up"):
            close = getattr(found, name), getattr(reference, name)
            assert close[0] == close[1] if "bytes" not in name else abs(close[0] - close[1]) < 50
        assert len(found.replied) + sum(found.dropped.values()) == 50
        seen |= set(found.dropped)
    expected = {
        "over-selected": {DROPPED, SURPLUS},
        "deadline": {DROPPED, SMALL, LATE},
        "devices that leave": {DROPPED, LEFT, SMALL},
    }
    assert seen >= expected.get(case, set())


def test_a_round_that_asks_nobody_lasts_until_the_deadline() -> None:
    fleet = fleet_of(plan_of(50, 5, "federation.timeout=12", "federation.sampling=poisson"))
    found = fleet.ask(1, 0, [], 1000.0, 0)
    assert found == by_events(fleet, 1, [], 1000.0, 0)
    assert found.ends == 1012.0 and found.energy == 0 == found.bytes_down


def test_who_is_lost_before_training_begins_is_not_charged_and_who_after_is() -> None:
    fleet = fleet_of(plan_of(400, 400, "fleet.step_seconds=2", "fleet.runtime_memory=0"))
    found = fleet.ask(1, 0, [node_of(c) for c in range(400)], 0.0, 400)
    trips = fleet.trips(np.arange(400), 0.0, (1, 0))
    lost = np.flatnonzero(np.isfinite(trips.lost))
    trained = {node_of(int(c)) for c in lost if trips.begin[c] < trips.lost[c]}
    assert 0 < len(trained) < len(lost)
    assert set(found.charged) == trained


def test_whoever_has_the_order_trains_and_is_charged_though_the_round_has_closed() -> None:
    """As on real devices: a ClientApp is not told that enough others were faster."""
    calm = ['fleet.classes=[{kind="pi5",dropout=0.0},{kind="phone",dropout=0.0}]']
    fleet = fleet_of(plan_of(50, 50, *calm))
    all_used, one_used = (fleet.ask(1, 0, NODES, 0.0, want) for want in (50, 1))
    assert len(all_used.replied) == 50 and len(one_used.replied) == 1
    assert one_used.ends < all_used.ends and one_used.dropped == {SURPLUS: 49}
    assert set(one_used.charged) == {*NODES} - {*one_used.replied}
    for figure in ("energy", "bytes_up", "bytes_down"):
        assert getattr(one_used, figure) == getattr(all_used, figure)
    assert one_used.bytes_up == 50 * SIZES[0]


@pytest.mark.parametrize(("rate", "fetched"), [(50.0, True), (0.01, False)])
def test_an_order_that_was_not_fetched_by_the_deadline_is_void(rate: float, fetched: bool) -> None:
    """Training begins after 12 s, when nothing is taken; who has the order trains all the same."""
    slow = f'fleet.classes=[{{kind="pi5",dropout=0.0,down={rate}}}]'
    more = [slow, "federation.timeout=12", "fleet.startup=60", "fleet.spread=0.0"]
    fleet = fleet_of(plan_of(50, 50, *more))
    found, trips = fleet.ask(1, 0, NODES, 0.0, 50), fleet.trips(np.arange(50), 0.0, (1, 0))
    assert (trips.begin > 12).all() and found.dropped == {LATE: 50} and found.bytes_up == 0
    assert set(found.charged) == (set(NODES) if fetched else set())
    joules = 12 * 0.8 * 50
    if fetched:
        computing = (trips.trained - trips.arrived).sum()
        joules = trips.arrived.sum() * 0.8 + computing * 5.0
    assert found.energy == pytest.approx(joules)


def test_a_device_is_the_same_whoever_else_is_looked_at() -> None:
    fleet = fleet_of(plan_of(1_000_000, 10))
    many = np.arange(0, 1_000_000, 999)
    alone = [fleet.description.traits(many[i : i + 1]) for i in (0, 5, 1000)]
    together = fleet.description.traits(many)
    for name in vars(together):
        values = [getattr(t, name)[0] for t in alone]
        assert values == [getattr(together, name)[i] for i in (0, 5, 1000)]


def test_classes_have_their_shares_and_devices_their_spread() -> None:
    plan = plan_of(100, 10, 'fleet.classes=[{kind="pi4",share=3.0},{kind="phone",share=1.0}]')
    description = fleet_of(plan).description
    clients = np.arange(20_000)
    phones = int(description.kinds(clients).sum())
    assert stats.binomtest(phones, 20_000, 0.25).pvalue > 1e-3
    assert stats.binomtest(phones, 20_000, 0.25 * 2 / 3).pvalue < 1e-3
    logs = np.log(description.factors(clients, 0.3, "speed"))
    assert stats.kstest(logs, "norm", (0, 0.3)).pvalue > 1e-3
    assert stats.kstest(logs, "norm", (0, 0.2)).pvalue < 1e-3


def test_draws_by_counter_are_uniform_and_those_of_two_keys_independent() -> None:
    first, second = (uniforms(bytes([k]) * 32, np.arange(50_000)) for k in (1, 2))
    assert stats.kstest(first, "uniform").pvalue > 1e-3
    assert stats.kstest(first**1.05, "uniform").pvalue < 1e-3
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.02
    assert len(set(first)) == 50_000


def test_a_million_devices_cost_nothing_until_they_are_asked() -> None:
    fleet = fleet_of(plan_of(1_000_000, 100, *DIURNAL))
    nodes = np.array([node_of(c) for c in range(7, 1_000_000, 10_000)])
    tracemalloc.start()
    try:
        fleet.available(nodes, 5.0)
        fleet.ask(1, 0, nodes.tolist(), 0.0, 100)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1e6


def test_measured_steps_a_second_and_a_stated_slowdown_mean_the_same() -> None:
    measured, stated = (
        fleet_of(plan_of(9, 3, "fleet.step_seconds=0.01", f'fleet.classes=[{{kind="pi4",{how}}}]'))
        for how in ("steps_per_second=20.0", "slowdown=5.0")
    )
    pair = [f.description.traits(np.arange(9)).step_slowdown for f in (measured, stated)]
    assert pair[0] == pytest.approx(pair[1])


@pytest.mark.parametrize("also", ["", ",slowdown=2.0"])
@pytest.mark.parametrize("steps", [2.0, 5000.0])
def test_start_up_takes_its_time_whatever_steps_take(steps: float, also: str) -> None:
    """Imports know nothing of the student: 3 s on the reference machine, 7 times that on a pi4."""
    given = 'fleet.classes=[{kind="pi4",' + f"steps_per_second={steps}{also}" + "}]"
    calm = ["fleet.spread=0.0", "fleet.jitter=0.0", "fleet.startup=3.0"]
    fleet = fleet_of(plan_of(9, 3, "federation.steps_per_round=4", *calm, given))
    found = fleet.trips(np.arange(9), 0.0, (1, 0))
    assert found.begin - found.arrived == pytest.approx(6 if also else 21)
    assert found.trained - found.begin == pytest.approx(4 / steps)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ('fleet.classes=[{kind="toaster"}]', ["every figure must be given", *BUILT_IN]),
        (
            'fleet.classes=[{kind="meter",steps_per_second=4.0,memory=1e9,down=1.0,up=1.0,'
            "latency=0.1,dropout=0.0,compute_watts=1.0,radio_watts=1.0}]",
            ["missing: slowdown (slowdown is of start-up"],
        ),
        ('fleet.classes=[{kind="pi4"},{kind="pi4"}]', ["pi4 is given twice"]),
        ('fleet.classes=[{kind="pi4",sped=2.0}]', ["unknown key fleet.classes.0.sped"]),
        ("fleet.over_selection=0.5", ["fleet.over_selection=0.5"]),
        ("fleet.over_selection=2.0", ["200 clients would be asked", "task.clients=100"]),
        ("fleet.availability.kind=file", ["a path must be given"]),
        ("fleet.availability.period=500.0", ["must be absent unless kind"]),
        (
            "fleet.availability.period=59.0",
            ["fleet.availability.period=59.0", "greater than or equal to 60"],
        ),
        ("fleet.availability.low=0.5", ["low=0.5", "high=0.2"]),
        ("fleet.availability.peek=0.5", ["unknown key", "fleet.availability.peak"]),
        ("federation.buffered.concurrency=5", ["needs a [fleet]"]),
    ],
)
def test_a_fleet_that_cannot_be_is_refused(override: str, words: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        parse_plan("", [override])
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("size", "factor", "asked"),
    [(100, 1.1, 110), (50, 1.1, 55), (100, 1.3, 130), (10, 1.05, 11), (7, 1.0, 7), (3, 10.0, 30)],
)
def test_over_selection_asks_as_many_as_the_decimals_say_rounded_up(
    size: int, factor: float, asked: int
) -> None:
    assert plan_of(200, size, f"fleet.over_selection={factor}").asked_per_round == asked


def test_only_engines_whose_nodes_are_the_devices_play_a_fleet() -> None:
    assert plan_of(10, 5, "engine.kind=ray").engine.kind == "ray"
    with pytest.raises(PlanError, match=r'engine\.kind="flower-ray": must be "inprocess" or "ray"'):
        plan_of(10, 5, "engine.kind=flower-ray")


def test_a_plan_without_a_fleet_keeps_the_digest_that_it_had() -> None:
    """Digests decide simulated noise: these are those of the version before fleets."""
    assert parse_plan("").digest.startswith("9d53b955c592c6da")
    assert parse_plan("", ["privacy=off"]).digest.startswith("cfe9cb150")
    assert parse_plan("", ["fleet.jitter=0.1"]).digest != parse_plan("").digest
    assert parse_plan("", ["federation.sampling=fixed"]).digest != parse_plan("").digest
