"""Events are checked, survive JSON unchanged and are refused when unknown."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reticent.core.errors import PrivacyError
from reticent.privacy.events import Event, NonPrivate, PoissonGaussian, event_from_json, merge

events = st.builds(
    PoissonGaussian,
    st.floats(0, 1, exclude_min=True),
    st.floats(0, 1e6, exclude_min=True),
    st.integers(1, 10**9),
    unit=st.sampled_from(["example", "client"]),
)


@given(events)
def test_json_round_trip(event: PoissonGaussian) -> None:
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
        *(("noise_multiplier", v) for v in (0.0, -1.0, math.inf, math.nan)),
        *(("steps", v) for v in (0, -1, 1.5, True)),
        ("relation", "replace-one"),
        ("unit", "household"),
    ],
)
def test_bad_fields_name_themselves(field: str, value: object) -> None:
    good = dataclasses.asdict(PoissonGaussian(0.1, 1.0, 1))
    with pytest.raises(PrivacyError, match=f"event.{field}="):
        PoissonGaussian(**{**good, field: value})


@given(st.lists(events | st.just(NonPrivate()), max_size=8))
def test_merge_keeps_every_step_once(found: list[Event]) -> None:
    merged = merge(found)
    assert merge(merged) == merged
    assert merge([*found, *found]) == merge([*merged, *merged])

    def steps(items: list[Event]) -> int:
        return sum(e.steps for e in items if isinstance(e, PoissonGaussian))

    assert steps(merged) == steps(found)
    assert (NonPrivate() in merged) == (NonPrivate() in found)


def test_merge_sums_equal_parameters_only() -> None:
    a, b = PoissonGaussian(0.1, 1.0, 2), PoissonGaussian(0.1, 1.5, 3)
    assert merge([a, b, a]) == [PoissonGaussian(0.1, 1.0, 4), b]
