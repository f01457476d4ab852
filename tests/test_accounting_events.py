"""Events are checked, survive JSON unchanged and are refused when unknown."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reticent.core.errors import PrivacyError
from reticent.privacy.events import (
    DEEPEST,
    Composed,
    DeclaredPublic,
    Event,
    NonPrivate,
    PoissonGaussian,
    event_from_json,
    gaussian,
    merge,
    on_one_sample,
)

events = st.builds(
    PoissonGaussian,
    st.floats(0, 1, exclude_min=True),
    st.floats(1e-9, 1e9),
    st.integers(1, 10**9),
    relation=st.sampled_from(["add-or-remove-one", "replace-one"]),
    unit=st.sampled_from(["example", "client"]),
)
public = st.builds(DeclaredPublic, st.text(min_size=1).filter(str.strip))
kinds: st.SearchStrategy[Event] = st.recursive(
    events | public | st.just(NonPrivate()),
    lambda inner: st.builds(
        Composed, st.lists(inner, min_size=1, max_size=3).map(tuple), st.integers(1, 9)
    ),
    max_leaves=DEEPEST,
)


@given(kinds)
def test_json_round_trip(event: Event) -> None:
    assert event_from_json(event.to_json()) == event


def test_equal_events_have_equal_json() -> None:
    assert PoissonGaussian(1, 2, 3).to_json() == PoissonGaussian(1.0, 2.0, 3).to_json()
    assert event_from_json(NonPrivate().to_json()) == NonPrivate()


def test_unknown_mechanism_is_refused_by_name() -> None:
    with pytest.raises(PrivacyError, match="'laplace' is not known"):
        event_from_json('{"kind":"laplace","scale":1}')
    data = json.loads(PoissonGaussian(0.1, 1.0, 1).to_json())
    for bad in ({**data, "extra": 1}, {**data, "noise_multiplier": -1}, {**data, "relation": "x"}):
        with pytest.raises(PrivacyError):
            event_from_json(json.dumps(bad))
    for text in ("", "[]", "3", "{}", "null", '{"kind":["a"]}', "{"):
        with pytest.raises(PrivacyError):
            event_from_json(text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("sampling_rate", v) for v in (0.0, 1.1, -0.1, math.nan, True, "0.1")),
        *(("noise_multiplier", v) for v in (0.0, -1.0, 1e-200, 1e200, 10**400, math.inf, math.nan)),
        *(("steps", v) for v in (0, -1, 1.5, True)),
        ("relation", "replace-two"),
        ("unit", "household"),
    ],
)
def test_bad_fields_name_themselves(field: str, value: object) -> None:
    good = dataclasses.asdict(PoissonGaussian(0.1, 1.0, 1))
    with pytest.raises(PrivacyError, match=f"event.{field}="):
        PoissonGaussian(**{**good, field: value})


def test_counts_beyond_what_floats_can_tell_apart_are_refused() -> None:
    most = PoissonGaussian(0.1, 1.0, 2**63 - 1)
    twice = (lambda: most.times(2), lambda: merge([most, most]))
    for make in (*twice, lambda: Composed((most,), 2**63)):
        with pytest.raises(PrivacyError, match=r"must be < 2\*\*63"):
            make()


@given(st.lists(kinds, max_size=8))
def test_merge_keeps_every_step_once(found: list[Event]) -> None:
    merged: list[Event] = [*merge(found)]
    assert merge(merged) == merged
    assert merge([*found, *found]) == merge([*merged, *merged])

    assert sum(e.steps for e in merged if isinstance(e, PoissonGaussian)) == steps(found)
    assert (NonPrivate() in merged) == any("non-private" in e.to_json() for e in found)
    assert all(isinstance(event, PoissonGaussian | NonPrivate) for event in merged)


def steps(found: Iterable[Event]) -> int:
    total = 0
    for event in found:
        if isinstance(event, Composed):
            total += event.count * steps(event.events)
        total += event.steps if isinstance(event, PoissonGaussian) else 0
    return total


def test_merge_sums_equal_parameters_only() -> None:
    a, b = PoissonGaussian(0.1, 1.0, 2), PoissonGaussian(0.1, 1.5, 3)
    assert merge([a, b, a]) == [PoissonGaussian(0.1, 1.0, 4), b]


def test_texts_written_before_there_were_other_events_read_the_same() -> None:
    text = (
        '{"kind":"poisson-gaussian","noise_multiplier":1.5,"relation":"add-or-remove-one",'
        '"sampling_rate":0.25,"steps":3,"unit":"example"}'
    )
    assert event_from_json(text) == PoissonGaussian(0.25, 1.5, 3)
    assert PoissonGaussian(0.25, 1.5, 3).to_json() == text
    assert NonPrivate().to_json() == '{"kind":"non-private"}'
    short = '{"kind":"poisson-gaussian","noise_multiplier":2,"sampling_rate":1,"steps":1}'
    assert event_from_json(short) == gaussian(2.0)


def test_composed_events_are_taken_apart_and_public_ones_left_out() -> None:
    a, b = gaussian(2.0, 2, unit="client"), gaussian(9.0, unit="client")
    rounds = Composed((a, Composed((b, DeclaredPublic("the round's number")), 3)), 4)
    assert merge([rounds, a]) == [replace(a, steps=10), replace(b, steps=12)]
    assert rounds.times(5).count == 20
    assert merge([rounds.times(5)]) == [replace(a, steps=40), replace(b, steps=60)]
    assert merge([DeclaredPublic("x")]) == []
    assert "noise_multiplier=9" in rounds.describe() and "public: the round" in rounds.describe()
    assert "replace-one" in gaussian(1.0, relation="replace-one").describe()


def test_hostile_texts_are_refused() -> None:
    part = '{"kind":"non-private"}'
    for _ in range(DEEPEST + 1):
        part = f'{{"kind":"composed","count":1,"events":[{part}]}}'
    with pytest.raises(PrivacyError, match="at most 8 deep"):
        event_from_json(part)
    with pytest.raises(PrivacyError):
        event_from_json('{"kind":"composed","events":[' * 100_000)
    for bad in (
        '{"kind":"composed","events":[]}',
        '{"kind":"composed","events":{}}',
        '{"kind":"composed","events":[3]}',
        '{"kind":"composed","events":[{"kind":"non-private"}],"count":0}',
        '{"kind":"composed","events":[{"kind":"non-private"}],"count":true}',
        '{"kind":"composed","events":[{"kind":"laplace"}]}',
        '{"kind":"public"}',
        '{"kind":"public","what":" "}',
        '{"kind":"public","what":3}',
        '{"kind":"non-private","what":"x"}',
        '{"kind":"poisson-gaussian","noise_multiplier":NaN,"sampling_rate":1,"steps":1}',
    ):
        with pytest.raises(PrivacyError):
            event_from_json(bad)
    with pytest.raises(PrivacyError, match=r"laplace.*poisson-gaussian, non-private, public"):
        event_from_json('{"kind":"composed","events":[{"kind":"laplace"}]}')


def test_constructors_name_what_they_refuse() -> None:
    with pytest.raises(PrivacyError, match=r"event\.what=''"):
        DeclaredPublic("")
    with pytest.raises(PrivacyError, match=r"event\.events=\(\)"):
        Composed(())
    with pytest.raises(PrivacyError, match="event str is not known"):
        Composed(("x",))  # pyright: ignore[reportArgumentType]
    with pytest.raises(PrivacyError, match="on one sample"):
        on_one_sample([gaussian(1.0), gaussian(1.0, 2)])
    with pytest.raises(PrivacyError, match="0 events on one sample"):
        on_one_sample([])
