"""When devices are there: the daily wave, files of intervals, and when those leave that are."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from fleets import fleet_of, plan_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from reticent.core.errors import DataError, NetworkError
from reticent.core.fleet import Availability
from reticent.privacy.randomness import SeededRandomness
from reticent.server.fleet import LEFT, Fleet
from reticent.server.sampling import Sampler, cohort_in_time
from reticent.simulations.fleet.availability import Diurnal, Trace
from reticent.simulations.fleet.traces import read_trace

EVERYONE = np.arange(40_000)


def wave(*overrides: str) -> Diurnal:
    presence = fleet_of(plan_of(10, 5, "fleet.availability.kind=diurnal", *overrides)).presence
    assert isinstance(presence, Diurnal)
    return presence


def test_the_daily_wave_has_the_probability_that_is_documented() -> None:
    presence = wave("fleet.availability.zones=1", "fleet.availability.peak=3")
    for hour in (0, 3, 9, 15, 21):
        expected = 0.05 + 0.15 * (1 + math.cos(2 * math.pi * (hour - 3) / 24)) / 2
        there = int(presence.there(EVERYONE, 3600.0 * hour).sum())
        assert stats.binomtest(there, len(EVERYONE), expected).pvalue > 1e-3
        assert stats.binomtest(there, len(EVERYONE), expected * 2 / 3).pvalue < 1e-3


def test_time_zones_spread_the_wave_and_a_day_later_it_is_the_same() -> None:
    presence = wave()
    by_time = [presence.there(EVERYONE, 3600.0 * h).mean() for h in range(24)]
    assert max(by_time) - min(by_time) < 0.02
    slots = int(86_400 / presence.section.slot)
    assert presence.probability(EVERYONE, 5) == pytest.approx(
        presence.probability(EVERYONE, 5 + slots)
    )


def test_a_device_stays_for_a_slot_and_leaves_at_the_first_in_which_it_is_away() -> None:
    presence = wave("fleet.availability.low=0.6", "fleet.availability.high=0.6")
    some = EVERYONE[presence.there(EVERYONE, 100.0)][:200]
    left = presence.leaves(some, 100.0, 4 * 1800.0)
    for client, time in zip(some, left, strict=True):
        own = np.array([client])
        slots = [1800.0 * k for k in range(1, 5)]
        expected = next((s for s in slots if not presence.there(own, s)[0]), math.inf)
        assert time == expected
    assert presence.next_change(100.0) == 1800.0 and presence.next_change(1800.0) == 3600.0


@pytest.mark.parametrize("kind", ["diurnal", "file"])
def test_a_device_that_is_away_when_it_is_asked_again_gives_no_reply(
    tmp_path: Path, kind: str
) -> None:
    (tmp_path / "t.csv").write_text("".join(f"{c},0,1e6\n" for c in range(0, 200, 3)))
    section = {
        "diurnal": 'kind="diurnal",low=0.3,high=0.3',
        "file": f'kind="file",path="{tmp_path / "t.csv"}"',
    }[kind]
    calm = ['fleet.classes=[{kind="pi5",dropout=0.0}]', "fleet.spread=0.0", "fleet.jitter=0.0"]
    fleet = fleet_of(plan_of(200, 200, f"fleet.availability={{{section}}}", *calm))
    nodes = np.arange(2, 202)
    there = fleet.available(nodes, 2000.0)
    assert 20 < there.sum() < 180
    found = fleet.ask(1, 1, nodes.tolist(), 2000.0, 200)
    assert found.replied == tuple(nodes[there])
    assert found.charged == () and found.dropped == {LEFT: 200 - there.sum()}


def near(border: float, side: int) -> float:
    """The border, or the float before or after it."""
    return border if side == 0 else max(0.0, math.nextafter(border, side * math.inf))


@settings(deadline=None)
@given(st.floats(1, 86_400), st.integers(0, 100_000), st.sampled_from([-1, 0, 1]))
@example(1800.1, 3, 0)
@example(100.3, 3, 0)
def test_the_next_slot_begins_later_whatever_its_length(slot: float, k: int, side: int) -> None:
    section = Availability(kind="diurnal", low=0.5, high=0.5, slot=slot)
    presence, some, time = Diurnal(section, 0), np.arange(50), near(k * slot, side)
    change = presence.next_change(time)
    assert time < change <= time + 1.001 * slot
    there, then = presence.there(some, time), presence.there(some, change)
    assert (presence.there(some, math.nextafter(change, 0.0)) == there).all()
    left = presence.leaves(some, time, change)
    assert (left[there] == np.where(then, math.inf, change)[there]).all()


@settings(deadline=None)
@given(
    st.floats(0.01, 1e6),
    st.floats(0.001, 0.4),
    st.floats(0.5, 0.9),
    st.integers(0, 100_000),
    st.sampled_from(["begin", "start", "end"]),
    st.sampled_from([-1, 0, 1]),
)
@example(3600.1, 0.1 / 3600.1, 0.9, 1, "start", 0)
def test_a_trace_goes_on_and_its_intervals_hold_their_own_start(
    period: float, first: float, last: float, number: int, border: str, side: int
) -> None:
    """Client 0 is there in the middle of a period, client 1 to its end and not at its beginning."""
    start, end = first * period, last * period
    trace = Trace(
        np.array([0, 1]), np.array([start, end]), np.array([end, period]), period, digest=""
    )
    both, offset = np.arange(2), {"begin": 0.0, "start": start, "end": end}[border]
    time = near(number * period + offset, side)
    change, there = trace.next_change(time), trace.there(both, time)
    before = trace.there(both, math.nextafter(change, 0.0))
    assert time < change <= time + 1.001 * period
    assert trace.there(both, change).any()  # somebody comes
    assert not (before & ~there).any()  # and nobody did before
    left = trace.leaves(both, time, math.inf)
    assert (left[~there] == time).all()
    for client in np.flatnonzero(there):
        assert left[client] > time
        assert trace.there(both, math.nextafter(left[client], 0.0))[client]
        assert not trace.there(both, left[client])[client]


def test_a_round_waits_through_slots_that_are_no_whole_seconds() -> None:
    """A clock that stands still at a border would never come to the two weeks."""
    away = 'fleet.availability={kind="diurnal",low=0.001,high=0.002,slot=1800.1}'
    plan = plan_of(10, 10, away, "federation.sampling=fixed")
    with pytest.raises(NetworkError, match="are available on the fleet"):
        cohort_in_time(
            Sampler(plan, SeededRandomness(0), "run"), 1, range(2, 12), {}, fleet_of(plan), 0.0
        )


def trace_of(tmp_path: Path, text: str, period: float | None = None, name: str = "t.csv") -> Trace:
    (tmp_path / name).write_text(text)
    return read_trace(tmp_path / name, 10, period)


CSV = "client,start,end\n3,10,20\n1,0,5\n3,30,40\n1,5,7.5\n7,90,100\n7,0,4\n"


def brute(client: int, phase: float) -> bool:
    rows = [line.split(",") for line in CSV.split()[1:]]
    return any(int(c) == client and float(a) <= phase < float(b) for c, a, b in rows)


@pytest.mark.parametrize("period", [None, 100.0])
def test_a_trace_is_what_its_lines_say(tmp_path: Path, period: float | None) -> None:
    trace, everyone = trace_of(tmp_path, CSV, period), np.arange(10)
    for time in np.arange(0, 250, 0.5):
        phase = time % period if period else time
        assert trace.there(everyone, time).tolist() == [brute(c, phase) for c in range(10)]
    assert trace.leaves(np.array([1, 3]), 1.0, 50.0).tolist() == [7.5, 1.0]
    assert trace.leaves(np.array([3]), 15.0, 16.0).tolist() == [math.inf]
    assert trace.next_change(40.0) == 90.0
    again = 130.0 if period else math.inf
    assert trace.next_change(110.0) == again
    if period:  # the night is one interval, over the end of the period
        assert trace.leaves(np.array([7]), 95.0, 200.0).tolist() == [104.0]


def test_json_lines_and_csv_are_the_same_trace(tmp_path: Path) -> None:
    csv = trace_of(tmp_path, "2,0,1.5\n")
    lines = trace_of(tmp_path, '{"client": 2, "start": 0, "end": 1.5}\n', name="t.jsonl")
    assert (csv.client, csv.start, csv.end) == (lines.client, lines.start, lines.end)


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ("", "t.csv", "holds no interval"),
        ("1,2\n", "t.csv", "line 1: '1,2': must be client,start,end"),
        ("0,0,1\nx,0,1\n", "t.csv", "line 2"),
        ("10,0,1\n", "t.csv", "client 10: must be 0 to 9"),
        ("-1,0,1\n", "t.csv", "client -1"),
        ("1,5,5\n", "t.csv", "from 5 to 5: must be 0 <= start < end"),
        ("1,-1,5\n", "t.csv", "from -1"),
        ("1,0,inf\n", "t.csv", "finite"),
        ("1,nan,5\n", "t.csv", "from nan"),
        ("1,0,200\n", "t.csv", "at most the period, 100"),
        ("1,0,5\n1,4,6\n", "t.csv", "client 1: the intervals from 0 to 5 and from 4 to 6 overlap"),
        ("[1]\n", "t.jsonl", "must have the keys client, start and end"),
        ('{"client": true, "start": 0, "end": 1}\n', "t.jsonl", "whole number"),
        (
            '{"client": 1, "start": 0, "end": 1}\n{"client": 1, "start": 2, "end": 1%s}\n'
            % ("0" * 330),
            "t.jsonl",
            'line 2: \'{"client": 1, "start": 2, "end": 1000',
        ),
        ('{"client": 1%s, "start": 0, "end": 1}\n' % ("0" * 330), "t.jsonl", "must be 0 to 9"),
        ("1%s,0,1\n" % ("0" * 900), "t.csv", "must be 0 to 9"),
        ("{" * 1000 + "\n", "t.jsonl", "must be a JSON object"),
        ("{" * 5000 + "\n", "t.jsonl", "line 1: holds 1,024 bytes or more"),
        ("2,0,1\n0,0,1" + " " * 1019 + "1,3,50\n", "t.csv", "line 2: holds 1,024 bytes or more"),
        ("1_0,0,1\n", "t.csv", "must be client,start,end"),
        ("1,0,1_0\n", "t.csv", "must be client,start,end"),
        ("1,0,1\n\ufeff1,2,3\n", "t.csv", "line 2"),
    ],
)
def test_a_damaged_trace_is_refused_by_its_line(
    tmp_path: Path, text: str, name: str, words: str
) -> None:
    with pytest.raises(DataError) as caught:
        trace_of(tmp_path, text, 100.0, name)
    assert words in str(caught.value)
    with pytest.raises(DataError, match="cannot be read"):
        read_trace(tmp_path / "absent.csv", 10, None)


def test_a_trace_may_begin_with_a_byte_order_mark_and_a_line_have_1023_bytes(
    tmp_path: Path,
) -> None:
    plain = trace_of(tmp_path, "client,start,end\n2,0,1.5\n")
    for text in (
        "\ufeffclient,start,end\r\n2,0,1.5\r\n",
        "\ufeff 2 , +0. ,15e-1",
        "2,0,1.5".ljust(1023),
    ):
        found = trace_of(tmp_path, text)
        assert (found.client, found.start, found.end) == (plain.client, plain.start, plain.end)


def test_a_device_that_is_there_for_the_whole_period_never_leaves(tmp_path: Path) -> None:
    trace = trace_of(tmp_path, "0,0,60\n1,0,30\n1,30,60\n2,30,60\n2,0,10\n", 60.0)
    for time in (0.0, 59.0, 600.0):
        assert trace.leaves(np.array([0, 1]), time, 1e9).tolist() == [math.inf, math.inf]
    assert trace.leaves(np.array([2]), 45.0, 1e9).tolist() == [70.0]


def test_a_trace_is_read_in_little_memory(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("".join(f"{c},{5 * k},{5 * k + 3}\n" for c in range(1000)
                                            for k in range(20)))  # fmt: skip
    tracemalloc.start()
    try:
        trace = read_trace(tmp_path / "t.csv", 1000, None)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(trace.client) == 20_000
    assert kept < 25 * 20_000 and peak < 8 * kept


def test_a_round_waits_in_virtual_time_until_enough_are_there(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("".join(f"{c},{1000 * c},1e6\n" for c in range(10)))
    path = f'fleet.availability={{kind="file",path="{tmp_path / "t.csv"}"}}'
    plan = plan_of(10, 5, path)
    fleet, sampler = fleet_of(plan), Sampler(plan, SeededRandomness(0), "run")
    nodes = range(2, 12)
    chosen, now = cohort_in_time(sampler, 1, nodes, {}, fleet, 0.0)
    assert (chosen, now) == ([2, 3, 4, 5, 6], 4000.0)
    with pytest.raises(NetworkError, match="are available on the fleet"):
        cohort_in_time(sampler, 1, nodes, {}, fleet, 2e6)


@pytest.mark.parametrize(
    ("timeout", "over", "expected"),
    [
        (600.0, 1.0, ([2, 3, 4, 5, 6, 7, 8, 9, 10], 1400.0)),  # a quorum after the timeout
        (1500.0, 1.0, ([2, 3, 4, 5, 6, 7, 8, 9, 10, 11], 2000.0)),  # or a cohort before it
        (1500.0, 1.2, ([2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], 2300.0)),  # one was not there by then
        (1500.0, 1.05, ([2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], 2200.0)),
    ],
)
def test_a_round_waits_for_all_it_would_ask_and_after_the_timeout_takes_a_quorum(
    timeout: float, over: float, expected: tuple[list[int], float], tmp_path: Path
) -> None:
    """As the real server: 8 come at 0 s, and others at 1000, 2000, 2200, 1e5 and 2e5 s."""
    comes = [*[0] * 8, 1000, 2000, 2200, 100_000, 200_000]
    lines = "".join(f"{client},{time},1e6\n" for client, time in enumerate(comes))
    (tmp_path / "t.csv").write_text(lines)
    path = f'fleet.availability={{kind="file",path="{tmp_path / "t.csv"}"}}'
    more = [f"federation.timeout={timeout}", f"fleet.over_selection={over}"]
    plan = plan_of(13, 10, path, *more)
    sampler = Sampler(plan, SeededRandomness(0), "run")
    assert plan.federation.quorum == 9
    assert cohort_in_time(sampler, 1, range(2, 15), {}, fleet_of(plan), 800.0) == expected


@pytest.mark.parametrize("spent", [0, 18])
@pytest.mark.parametrize("kind", ["kind='always'", "kind='diurnal',low=1.0,high=1.0"])
def test_where_as_many_are_there_as_a_round_asks_it_begins_whoever_may_be_asked(
    kind: str, spent: int
) -> None:
    away = f"fleet.availability={{{kind}}}"
    few = ["federation.sampling=fixed", "federation.min_replies=1", away]
    plan, asked = plan_of(20, 4, *few), dict.fromkeys(range(2, 2 + spent), 10**6)
    sampler, fleet = Sampler(plan, SeededRandomness(0), "run"), fleet_of(plan)
    for number in range(1, 6):
        chosen, now = cohort_in_time(sampler, number, range(2, 22), asked, fleet, 7.0)
        assert (chosen, now) == (sampler.cohort(number, range(2, 22), asked), 7.0)
        assert len(chosen) == (2 if spent else 4)


LATE_COMERS = "".join(f"{c},1000,1e6\n" for c in range(10))


def test_a_poisson_round_waits_while_nobody_at_all_is_there_and_draws_as_without_waiting(
    tmp_path: Path,
) -> None:
    (tmp_path / "t.csv").write_text(LATE_COMERS)
    path = f'fleet.availability={{kind="file",path="{tmp_path / "t.csv"}"}}'
    plan = plan_of(10, 2, path, "federation.sampling=poisson")
    fleet, sampler = fleet_of(plan), Sampler(plan, SeededRandomness(0), "run")
    nodes, sizes = range(2, 12), set[int]()
    for number in range(1, 41):
        found = cohort_in_time(sampler, number, nodes, {}, fleet, 3.0)
        drawn = sampler.cohort(number, nodes, {})
        assert found == (drawn, 1000.0)  # an empty draw stays empty
        assert cohort_in_time(sampler, number, nodes, {}, fleet, 1500.0) == (drawn, 1500.0)
        sizes.add(len(drawn))
    assert 0 in sizes and len(sizes) > 2
    with pytest.raises(NetworkError, match="round 1: none of 10 clients is available"):
        cohort_in_time(sampler, 1, nodes, {}, fleet, 2e6)


def test_of_a_million_few_are_looked_up_for_an_empty_poisson_cohort() -> None:
    plan = plan_of(1_000_000, 1, "fleet.availability.kind=diurnal", "federation.sampling=poisson")
    fleet, sampler = fleet_of(plan), Sampler(plan, SeededRandomness(0), "run")
    looked: list[int] = []

    class Counted(Fleet):
        def available(self, nodes: NDArray[np.int64], time: float) -> NDArray[np.bool_]:
            looked.append(len(nodes))
            return fleet.available(nodes, time)

    for number in range(1, 21):
        cohort_in_time(sampler, number, range(2, 1_000_002), {}, Counted(), 0.0)
    assert 20 <= sum(looked) < 20_000 and max(looked) > 200
