"""Numbers and charts of the report."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reticent.privacy.report.svg import Chart, Rule, line_chart, ticks
from reticent.privacy.report.words import (
    bytes_text,
    certainty,
    certainty_text,
    delta_text,
    epsilon_text,
    number_text,
    portable,
    tier,
)

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.00"),
        (0.001, "0.01"),
        (7.9996, "8.00"),
        (8.0, "8.00"),
        (8.0001, "8.01"),
        (99.999, "100.00"),
        (163.2, "164"),
        (12_345.1, "12,346"),
        (4_991_234.0, "5.0 million"),
        (2.01e9, "2.1 billion"),
        (math.inf, "∞"),
        ("infinity", "∞"),
        (None, "not known"),
    ],
)
def test_epsilon_is_rounded_up(value: float | str | None, text: str) -> None:
    assert epsilon_text(value) == text


@given(st.floats(min_value=0, max_value=99))
def test_a_shown_epsilon_is_never_below_the_bound(value: float) -> None:
    shown = float(epsilon_text(value))
    assert value - 1e-9 <= shown <= value + 0.01 + 1e-9


@given(st.floats(min_value=0, max_value=700), st.floats(min_value=0.001, max_value=0.999))
def test_certainty_multiplies_the_odds_by_at_most_exp_epsilon(value: float, prior: float) -> None:
    after = certainty(value, prior)
    assert prior - 1e-12 <= after <= 1
    if after < 0.999:
        odds = after / (1 - after)
        assert odds == pytest.approx(math.exp(value) * prior / (1 - prior), rel=1e-6)


def test_certainty_of_half_is_the_textbook_value() -> None:
    assert certainty(math.log(3)) == pytest.approx(0.75)
    assert certainty_text(certainty(8.0)) == "99.97 %"
    assert certainty_text(certainty(5e6)) == "100 %"


def test_no_finite_certainty_that_can_be_shown_is_called_100_percent() -> None:
    assert certainty_text(certainty(12.0)) == "99.9994 %"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (1.0, "strong protection"),
        (1.01, "reasonable protection"),
        (10.0, "reasonable protection"),
        (10.1, "weak to no protection"),
        (5e6, "no meaningful protection"),
        ("infinity", "nothing is promised"),
    ],
)
def test_tiers(value: float | str, words: str) -> None:
    assert tier(value) == words


def test_numbers_that_json_cannot_hold() -> None:
    assert portable(math.inf) == "infinity"
    assert portable(math.nan) is None
    assert portable(1.5) == 1.5


def test_sizes_and_numbers() -> None:
    assert [bytes_text(n) for n in (0, 999, 1000, 3.2e9)] == ["0 B", "999 B", "1.0 kB", "3.2 GB"]
    assert [number_text(n) for n in (0, 1e6, 1.25, 1e-8)] == ["0", "1,000,000", "1.25", "1e-08"]


@given(
    st.floats(min_value=-1e6, max_value=1e6),
    st.floats(min_value=0, max_value=1e6),
)
def test_ticks_cover_the_range_evenly(low: float, span: float) -> None:
    values = ticks(low, low + span)
    assert 1 <= len(values) <= 6
    assert values[0] <= low + 1e-6 * max(1, abs(low))
    assert values[-1] >= low + span - 1e-6 * max(1, abs(low + span))
    gaps = [b - a for a, b in pairwise(values)]
    assert all(gap > 0 for gap in gaps)


def chart_of(points: tuple[tuple[float, float], ...], rules: tuple[Rule, ...] = ()) -> Chart:
    return Chart("id", "A <title>", "what & how", "round", "ε", points, rules, from_zero=True)


def test_a_chart_is_well_formed_and_named() -> None:
    root = ElementTree.fromstring(line_chart(chart_of(((1, 2.0), (2, 3.0)), (Rule("stop", 8),))))
    title, desc = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert title is not None
    assert desc is not None
    assert (title.text, desc.text) == ("A <title>", "what & how")
    assert root.get("role") == "img"
    assert root.get("aria-labelledby") == f"{title.get('id')} {desc.get('id')}"


def test_points_stand_where_their_values_say() -> None:
    page = line_chart(chart_of(((5, 0.0), (10, 4.0), (20, 8.0))))
    dots = [
        (float(x), float(y)) for x, y in re.findall(r'<circle[^>]* cx="([^"]+)" cy="([^"]+)"', page)
    ]
    (x0, y0), (x1, y1), (x2, y2) = dots
    assert (x2 - x1) == pytest.approx(2 * (x1 - x0), abs=0.2)
    assert (y0 - y1) == pytest.approx(y1 - y2, abs=0.2)
    assert y0 > y1 > y2


def test_labels_of_close_rules_do_not_overlap() -> None:
    rules = (Rule("teacher", 0.842), Rule("public", 0.838), Rule("other", 0.836))
    page = line_chart(chart_of(((1, 0.5), (2, 0.8)), rules))
    places = sorted(float(y) for y in re.findall(r'class="label[^>]* y="([^"]+)"', page))
    assert len(places) == 3
    assert all(b - a >= 15 for a, b in pairwise(places))


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e-5, "10⁻⁵"), (1e-10, "10⁻¹⁰"), (3e-6, "3 × 10⁻⁶"), (9.9999e-6, "10⁻⁵"), (0.05, "0.05")],
)
def test_delta_as_a_power_of_ten(value: float, text: str) -> None:
    assert delta_text(value) == text
