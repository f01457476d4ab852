"""Two runs side by side, the charts, and what the page offers to every reader."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import islice, pairwise
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_runs import build

from reticent.core.errors import RunError
from reticent.core.plan import Plan, parse_plan
from reticent.privacy.accounting import epsilon
from reticent.privacy.randomness import SeededRandomness
from reticent.privacy.report import collect, compare, render_comparison, render_html, words
from reticent.privacy.report.bars import Bar, BarChart, Claim, bar_chart, claim_chart, spread
from reticent.privacy.report.charts import capped, charts
from reticent.privacy.report.figures import planned_curve
from reticent.privacy.report.render import thinned
from reticent.privacy.schedule import participations, schedule_for
from reticent.server.sampling import Sampler, cohort_in_time
from reticent.simulations.fleet.fleet import granting
from reticent.simulations.fleet.making import fleet_for
from reticent.simulations.grid import node_of


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs")
    settings = {
        "plain": (),
        "noisier": ("privacy.noise_multiplier=3.0",),
        "client": ('privacy.unit="client"',),
        "replace": ('privacy.relation="replace-one"',),
        "delta": ("privacy.delta=1e-6",),
        "off": ('privacy="off"',),
    }
    return {name: collect(build(folder / name, *more)) for name, more in settings.items()}


def rows_of(comparison: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["what"]: row for row in comparison["rows"]}


def test_a_run_does_not_differ_from_itself(runs: dict[str, dict[str, Any]]) -> None:
    found = compare(runs["plain"], runs["plain"])
    assert found["notes"] == []
    assert {row["mark"] for row in found["rows"]} == {""}
    assert all(row["a"] == row["b"] for row in found["rows"])


def test_what_differs_is_marked_and_nothing_else(runs: dict[str, dict[str, Any]]) -> None:
    found = compare(runs["plain"], runs["noisier"])
    rows = rows_of(found)
    assert found["notes"] == []
    assert rows["Noise multiplier σ"]["mark"] == "differs"
    assert (rows["Noise multiplier σ"]["a"], rows["Noise multiplier σ"]["b"]) == ("1.5", "3")
    assert rows["ε against readers of the models"]["mark"] == "differs"
    for same in ("Rounds", "Clip", "Bytes, whole run", "Accuracy of the int8 model", "δ", "Unit"):
        assert rows[same]["mark"] == ""


@pytest.mark.parametrize(
    ("other", "note"),
    [
        ("client", "ε of different units are not comparable"),
        ("replace", "ε under different neighbouring relations are not comparable"),
        ("delta", "ε at different δ are not comparable"),
    ],
)
def test_epsilons_of_different_kinds_are_not_comparable(
    runs: dict[str, dict[str, Any]], other: str, note: str
) -> None:
    found = compare(runs["plain"], runs[other])
    assert [n.startswith(note) for n in found["notes"]] == [True]
    marks = {row["mark"] for row in found["rows"] if row["what"].startswith("ε against")}
    assert marks == {"not comparable"}
    assert rows_of(found)["Rounds"]["mark"] == ""


def test_where_kinds_differ_the_rows_that_name_the_kind_still_compare(
    runs: dict[str, dict[str, Any]],
) -> None:
    named = "ε of the client that spent most, "
    relations = rows_of(compare(runs["plain"], runs["replace"]))
    for relation in ("add-or-remove-one", "replace-one"):
        assert relations[f"{named}under {relation}"]["mark"] == ""
    deltas = rows_of(compare(runs["plain"], runs["delta"]))
    assert deltas[f"{named}at δ = 10⁻⁵"]["mark"] == ""
    units = compare(runs["plain"], runs["client"])
    assert not [row for row in units["rows"] if row["what"].startswith(named)]


def test_a_run_without_privacy_compares_as_infinite(runs: dict[str, dict[str, Any]]) -> None:
    found = compare(runs["plain"], runs["off"])
    row = rows_of(found)["ε against readers of the models"]
    assert found["notes"] == [] and row["b"] == "∞" and row["mark"] == "differs"
    assert rows_of(found)["Clip"]["b"] == "–"


def test_a_comparison_is_written_in_every_format(runs: dict[str, dict[str, Any]]) -> None:
    found = compare(runs["plain"], runs["client"])
    names = ("runs/<a>", "runs/b|c")
    assert json.loads(render_comparison(found, names, "json"))["rows"] == found["rows"]
    assert "runs/&lt;a&gt;" in render_comparison(found, names, "html")
    assert "| runs/b\\|c |" in render_comparison(found, names, "md")
    with pytest.raises(RunError, match="'pdf'"):
        render_comparison(found, names, "pdf")


def columns(svg: str) -> list[tuple[float, float]]:
    """Return height and count of every bar."""
    heights = [float(h) for h in re.findall(r'<rect class="bar"[^>]* height="([\d.]+)"', svg)]
    counts = re.findall(r'class="count"[^>]*>([\d,]+)<', svg)
    return [(h, int(c.replace(",", ""))) for h, c in zip(heights, counts, strict=True)]


def test_bars_are_as_tall_as_their_counts() -> None:
    bars = (Bar("0.00", 4), Bar("1.00", 2), Bar("2.00", 0), Bar("3.00", 1))
    svg = bar_chart(BarChart("id", "A <title>", "what & how", "ε", bars))
    ElementTree.fromstring(svg)
    (four, _), (two, _), (none, _), (one, _) = columns(svg)
    assert four == pytest.approx(2 * two, abs=0.2) and two == pytest.approx(2 * one, abs=0.2)
    assert none == 0


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 1000)), min_size=1, max_size=60))
def test_a_distribution_loses_nobody_and_has_few_bars(values: list[tuple[float, int]]) -> None:
    bars = spread(values)
    assert sum(bar.count for bar in bars) == sum(clients for _, clients in values)
    assert len(bars) <= 10


def test_the_claim_chart_puts_the_lower_bound_where_its_value_is() -> None:
    svg = claim_chart(Claim(4.0, 2.0, 0.99, False))
    ElementTree.fromstring(svg)
    (width,) = (float(w) for w in re.findall(r'<rect class="bar"[^>]* width="([\d.]+)"', svg))
    (mark,) = (float(x) for x in re.findall(r'class="found" d="M([\d.]+) ', svg))
    assert mark - 24 == pytest.approx(width / 2, abs=0.2)
    assert "not above the claim" in svg
    assert "above the claim: violated" in claim_chart(Claim(4.0, 5.0, 0.99, True))


def test_long_tables_are_thinned_and_keep_both_ends() -> None:
    rows = list(range(1000))
    assert len(thinned(rows)) == 25
    assert (thinned(rows)[0], thinned(rows)[-1]) == (0, 999)
    assert thinned(rows[:25]) == rows[:25]


def test_the_line_of_epsilon_never_passes_what_anybody_spent(
    runs: dict[str, dict[str, Any]],
) -> None:
    data = json.loads(json.dumps(runs["plain"]))
    assert 'class="planned"' not in render_html(data)
    most = data["spent"]["maximum"] = data["planned"][1]["epsilon"]
    shown = [capped(row["epsilon"], data) for row in data["rounds"]]
    assert shown == [data["planned"][0]["epsilon"], most, most, most]
    page = render_html(data)
    assert 'class="planned"' in page and "had no device stopped" in page


def test_the_line_of_epsilon_is_that_of_the_rounds_where_some_were_asked_ahead_of_their_turn(
    runs: dict[str, dict[str, Any]],
) -> None:
    """As on a fleet whose devices are away: the schedule's turns say less than was spent."""
    data = json.loads(json.dumps(runs["plain"]))
    most = data["rounds"][-1]["epsilon"]
    first = next(chart for chart in charts(data) if chart["identity"] == "epsilon")
    for row in data["planned"]:
        row["epsilon"] = min(row["epsilon"], data["rounds"][1]["epsilon"])
    again = next(chart for chart in charts(data) if chart["identity"] == "epsilon")
    assert again == first and words.epsilon_text(most) in again["svg"]


AWAY = 'fleet.availability={kind="diurnal"}'


@pytest.mark.parametrize("setting", [AWAY, "federation.buffered={}", ""])
def test_the_planned_line_is_never_below_what_a_client_was_asked(setting: str) -> None:
    base = ("task.clients=100", "federation.rounds=20", "federation.clients_per_round=20")
    more = ("privacy.noise_multiplier=1.5", "fleet={}", setting)
    plan = parse_plan('task={name="fashion"}', [text for text in (*base, *more) if text])
    schedule = schedule_for(plan)
    assert schedule is not None
    event = schedule.round_event()
    planned = {row["round"]: row["epsilon"] for row in planned_curve(schedule, plan)}
    # Later nobody is left that may still be asked, where some were asked too soon.
    rounds = islice(most_asked(plan), 12)
    found = {n: epsilon([schedule.over(event, most)], 1e-5) for n, most in rounds}
    assert list(planned) == list(range(1, 21)) and list(found) == list(range(1, 13))
    assert all(planned[n] >= found[n] for n in found)
    # Where the turns themselves are what holds, nothing is added to them.
    turns = {n: epsilon([schedule.over(event, participations(plan, n))], 1e-5) for n in found}
    assert ({n: planned[n] for n in found} == turns == found) == (setting == "")


def most_asked(plan: Plan) -> Iterator[tuple[int, int]]:
    """Yield each round, and how often the client was asked by then that was asked most often."""
    fleet = fleet_for(plan, 10_000, (20_000, 40_000), granting)
    nodes, asked = range(node_of(0), node_of(plan.task.clients)), Counter[int]()
    if plan.federation.buffered is not None:
        for release in fleet.releases(nodes):
            asked.update(release.started)
            yield release.number, max(asked.values())
        return
    sampler, now = Sampler(plan, SeededRandomness(0), "run"), 0.0
    for number in range(1, plan.federation.rounds + 1):
        cohort, now = cohort_in_time(sampler, number, nodes, asked, fleet, now)
        now = fleet.ask(number, 0, cohort, now, plan.federation.clients_per_round).ends
        asked.update(cohort)
        yield number, max(asked.values())


class Outline(HTMLParser):
    """What a screen reader relies on."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.headings: list[int] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.labelled: list[str] = []
        self.links: list[str] = []
        self.loose: list[str] = []
        self.table: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        self.ids += [given["id"]] if given.get("id") else []
        self.labelled += (given.get("aria-labelledby") or "").split()
        self.links += [given["href"] or ""] if "href" in given else []
        if tag == "table":
            self.table = []
        self.table.append(tag)
        if tag == "th" and "scope" not in given:
            self.loose.append("th without scope")
        if tag == "tbody" and "caption" not in self.table:
            self.loose.append("table without caption")


@pytest.mark.parametrize("name", ["plain", "client", "off"])
def test_the_page_has_landmarks_ordered_headings_and_named_tables(
    runs: dict[str, dict[str, Any]], name: str
) -> None:
    page = render_html(runs[name])
    outline = Outline(page)
    assert '<html lang="en">' in page
    for landmark in ("header", "main", "footer", "nav"):
        assert outline.tags.count(landmark) == 1
    assert outline.headings[0] == 1 and outline.headings.count(1) == 1
    assert all(later - former <= 1 for former, later in pairwise(outline.headings))
    assert outline.loose == []
    assert len(outline.ids) == len(set(outline.ids))
    assert set(outline.labelled) <= set(outline.ids)
    assert {link[1:] for link in outline.links} <= set(outline.ids)
    assert all(link.startswith("#") for link in outline.links)


def test_the_outline_test_would_find_a_table_without_a_name() -> None:
    assert Outline("<table><tbody><tr><th>a</th></tr></tbody></table>").loose == [
        "table without caption",
        "th without scope",
    ]


def luminance(colour: str) -> float:
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_has_enough_contrast_in_light_dark_and_print(
    runs: dict[str, dict[str, Any]],
) -> None:
    page = render_html(runs["plain"])
    themes = re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    assert len(themes) == 3
    for theme in themes:
        found = {
            k: v if len(v) == 7 else f"#{v[1] * 2}{v[2] * 2}{v[3] * 2}"
            for k, v in re.findall(r"--([a-z-]+): (#[0-9a-f]+)", theme)
        }
        pairs = [
            ("ink", "sheet"),
            ("soft", "sheet"),
            ("soft", "page"),
            ("accent", "sheet"),
            ("second", "sheet"),
            ("ink", "wash"),
            ("ink", "fair-wash"),
            ("ink", "bad-wash"),
            ("good", "good-wash"),
            ("fair", "fair-wash"),
            ("bad", "bad-wash"),
        ]
        # WCAG 2.2, criterion 1.4.3.
        assert min(contrast(found[a], found[b]) for a, b in pairs) >= 4.5
    assert contrast("#ffffff", "#777777") < 4.5 < contrast("#000000", "#ffffff") == 21.0


def test_every_bar_chart_is_a_table_as_well(runs: dict[str, dict[str, Any]]) -> None:
    figures = re.findall(r"<figure>.*?</figure>", render_html(runs["plain"]), re.DOTALL)
    assert len(figures) == 4
    for figure in figures:
        assert "<figcaption>" in figure and "<title" in figure and "<desc" in figure
    tables = [re.findall(r'<td class="num">([\d,]+)</td>', figure) for figure in figures]
    bars = [re.findall(r'class="count"[^>]*>([\d,]+)<', figure) for figure in figures]
    # Nobody spent: 2 of 6 clients; the others have less left than these.
    assert bars == tables == [[], [], ["2", "4"], ["4", "2"]]
