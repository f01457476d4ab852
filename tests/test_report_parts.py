"""What a report says of units, relations, releases and audits; its schema; its accessibility."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from report_runs import ROUNDS, build, metrics_of
from scipy import stats

from reticent.core.errors import RunError
from reticent.core.protocol import Refusal
from reticent.core.run import Run
from reticent.privacy.accounting import epsilon
from reticent.privacy.events import PoissonGaussian
from reticent.privacy.gdp import gdp
from reticent.privacy.groups import group_epsilon
from reticent.privacy.randomness import SystemRandomness
from reticent.privacy.report import collect, render_html, render_md, schema_text
from reticent.privacy.report.checklist import checklist
from reticent.privacy.report.collect import coarse
from reticent.privacy.report.schema import problems
from reticent.privacy.report.words import epsilon_text
from reticent.server.fleet import DROPPED, LATE, LEFT, SMALL, STALE, SURPLUS

CLIENT = ('privacy.unit="client"', "privacy.clip_quantile=0.5", "federation.clients_per_round=4")


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return collect(build(tmp_path_factory.mktemp("runs") / "example"))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    # Few clients: the count of the adaptive bound is noised little, so the sum needs less noise.
    settings = (*CLIENT, "privacy.noise_multiplier=0.3", "privacy.budget=1e3")
    return collect(build(tmp_path_factory.mktemp("runs") / "client", *settings))


@pytest.fixture(scope="module")
def off(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return collect(build(tmp_path_factory.mktemp("runs") / "off", 'privacy="off"'))


def answers(data: dict[str, Any]) -> dict[str, str]:
    return {row["field"]: row["answer"] for row in data["checklist"]}


def remarks(data: dict[str, Any]) -> dict[str, str]:
    return {row["what"]: row["remark"] for row in data["not_covered"]}


def released(data: dict[str, Any], start: str) -> dict[str, Any]:
    (row,) = [row for row in data["releases"] if row["value"].startswith(start)]
    return row


def audit_of(run: Run, **changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "plan": run.plan().digest,
        "unit": "example",
        "relation": "add-or-remove-one",
        "claimed": {"epsilon": 3.0, "delta": 1e-5},
        "lower_bound": 2.179,
        "weaker_bounds": {"any_dependence": 1.8, "any_mechanism": 0.9},
        "confidence": 0.99,
        "estimate": None,
        "method": "one run",
        "canaries": 400,
        "rounds": 4,
        "interval": [0.7, 0.9],
        "interval_of": "right guesses",
        "randomness": {
            "pairs": 190,
            "largest_correlation": 0.01,
            "limit": 0.05,
            "variance_ratio": 1.01,
            "variance_interval": [0.96, 1.04],
            "passed": True,
        },
        "verdict": "consistent",
        "seconds": 3.5,
        "command": "reticent audit RUN",
        **changes,
    }


def test_both_relations_are_stated_and_come_from_the_accountant(example: dict[str, Any]) -> None:
    rows = {r["relation"]: r["epsilon"] for r in example["accounting"]["by_relation"]}
    assert rows == {
        relation: epsilon([PoissonGaussian(0.2, 1.5, ROUNDS, relation)], 1e-5)
        for relation in ("add-or-remove-one", "replace-one")
    }
    assert rows["replace-one"] > rows["add-or-remove-one"] == example["spent"]["maximum"]


def test_mu_and_its_regret_are_those_of_the_worst_history(example: dict[str, Any]) -> None:
    found = gdp([PoissonGaussian(0.2, 1.5, ROUNDS)])
    assert example["accounting"]["gdp"] == {"mu": found.mu, "regret": found.regret}
    assert answers(example)["μ-GDP and its regret"].startswith("μ = ")


def test_without_a_bound_on_examples_no_user_level_number_is_possible(
    example: dict[str, Any],
) -> None:
    assert example["accounting"]["user_level"] is None
    wanted = "none possible: no bound on examples per user is given"
    assert answers(example)["User-level ε"] == wanted
    assert wanted in render_html(example)


def test_with_a_bound_the_user_level_epsilon_is_that_of_a_group(tmp_path: Path) -> None:
    data = collect(build(tmp_path / "run", "privacy.examples_per_user=3"))
    wanted = group_epsilon([PoissonGaussian(0.2, 1.5, ROUNDS)], 1e-5, 3)
    assert data["accounting"]["user_level"] == {"examples": 3, "epsilon": wanted}
    assert wanted > data["spent"]["maximum"]
    assert "at most 3 examples of one client" in answers(data)["User-level ε"]


def test_what_is_not_covered_says_how_much_less_a_person_is_protected(tmp_path: Path) -> None:
    known = remarks(collect(build(tmp_path / "known", "privacy.examples_per_user=3")))
    unknown = remarks(collect(build(tmp_path / "unknown")))
    wanted = epsilon_text(group_epsilon([PoissonGaussian(0.2, 1.5, ROUNDS)], 1e-5, 3))
    assert f"3 examples of one client, ε = {wanted}" in known["A person with several examples"]
    assert "cannot be said" in unknown["A person with several examples"]


def test_what_is_said_about_sizes_fits_the_padding_and_the_trust(tmp_path: Path) -> None:
    size = "The size of single updates"
    padded = remarks(collect(build(tmp_path / "padded")))
    bare = remarks(collect(build(tmp_path / "bare", "updates.pad=false")))
    assert "padded to one length" in padded[size] and "is not padded" in bare[size]
    # Under local trust an update is private by itself, and so is its length.
    assert size not in remarks(collect(build(tmp_path / "local", 'privacy.trust="local"')))


def test_a_round_closed_by_real_replies_is_said_to_show_their_times(tmp_path: Path) -> None:
    """In a simulation the order of replies depends on no client's data, as by a fleet's clock."""
    early, said = ("federation.enough=4",), dict[str, str]()
    for name, settings in {"real": early, "simulated": early, "whole": ()}.items():
        run = build(tmp_path / name, *settings)
        if name != "simulated":
            shutil.rmtree(run.ledger)  # it is on the devices
        data = collect(run)
        assert problems(data) == []
        said[name] = remarks(data)["Timing and dropouts"]
        source = "the server's count of the rounds for which it asked a client"
        assert (source in unescape(render_html(data))) == (name != "simulated")
    assert said["simulated"] == said["whole"]
    assert said["real"].startswith(f"{said['whole']}; a round is closed at its first 4 replies")


def test_client_level_is_promised_to_readers_and_not_against_the_server(
    client: dict[str, Any],
) -> None:
    rows = {row["name"]: row for row in client["adversaries"]}
    spent = client["spent"]["maximum"]
    # Sum and count of a round together are one Gaussian of the plan's noise multiplier.
    one = epsilon([PoissonGaussian(1.0, 0.3, ROUNDS, unit="client")], 1e-5)
    assert spent == pytest.approx(one, rel=2e-3)
    assert rows["Readers of the models"]["epsilon"] == rows["Another client"]["epsilon"] == spent
    assert rows["The server"]["epsilon"] == "infinity"
    assert len(rows["Readers of the models"]["events"]) == 2  # the sum, and the count
    assert rows["The server"]["events"] == []


def test_client_level_says_that_updates_are_not_noised(client: dict[str, Any]) -> None:
    update = released(client, "Encoded update")
    assert "not noised" in update["mechanism"] and update["depends"] == "on private examples"
    assert released(client, "Bit: ")["count"] == 3 * ROUNDS
    assert released(client, "Bound of each round")["depends"].endswith("through the mechanism")
    assert "Every update" in [row["what"] for row in client["not_covered"]]
    assert (
        "all that one client contributes"
        in answers(client)["Privacy unit and largest contribution"]
    )
    for text in (render_md(client), render_html(client)):
        assert "The server is trusted." in text
        assert "single client, with everything that it contributed" in text


def test_replace_one_is_named_and_its_events_say_so(tmp_path: Path) -> None:
    data = collect(build(tmp_path / "run", 'privacy.relation="replace-one"'))
    assert data["promise"]["relation"] == "replace-one"
    assert {e["relation"] for row in data["adversaries"] for e in row["events"]} == {"replace-one"}
    assert answers(data)["Neighbouring relation"] == "replace one example by another"
    assert data["accounting"]["prv"]["epsilon"] is None
    assert "if another example had been in its place" in data["plain"]["promise"]


def test_releases_count_what_left_with_its_bytes(example: dict[str, Any]) -> None:
    update = released(example, "Encoded update")
    assert (update["count"], update["bytes"]) == (3 * ROUNDS, coarse(ROUNDS * 3 * 3700 + 10))
    assert "share of the noise, σ/√4 = 0.75" in update["mechanism"]
    assert released(example, "Refusal 1006")["count"] == ROUNDS
    assert "never on its examples" in released(example, "Refusal 1006")["depends"]
    assert released(example, "Reply that the server did not use")["count"] == ROUNDS
    assert released(example, "Metrics")["bytes"] == 0
    assert released(example, "Broadcast model")["count"] == 5 * ROUNDS
    assert released(example, "Deployed model")["bytes"] == 17_200
    assert not [row for row in example["releases"] if row["value"].startswith("Update that")]


def test_every_refusal_code_has_its_own_row_when_it_left(tmp_path: Path) -> None:
    run = build(tmp_path / "run", 'privacy="off"')
    first, *others = (metrics_of(number) | {"dropped": {}} for number in range(1, ROUNDS + 1))
    lines = [first | {"dropped": {r.text: 2 for r in Refusal}}, *others]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [r for r in collect(run)["releases"] if r["value"].startswith("Refusal")]
    assert [r["count"] for r in rows] == [2] * len(Refusal)
    assert [int(r["value"][8:12]) for r in rows] == [int(r) for r in Refusal]


def test_updates_that_came_in_vain_or_were_not_read_have_left_all_the_same(tmp_path: Path) -> None:
    run = build(tmp_path / "run")
    first, second, *others = (metrics_of(number) | {"asked": 5} for number in range(1, ROUNDS + 1))
    vain = {LATE: 3, SURPLUS: 4, STALE: 5}
    lost = {DROPPED: 1, LEFT: 2, SMALL: 4, "the client gave no reply (Flower error 5)": 8}
    first |= {"asked": 3 + 12 + 15, "dropped": vain | lost}
    second |= {"asked": 7}  # the round was closed before two of them had answered
    lines = [first, second, *others]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = collect(run)
    update = released(data, "Encoded update")
    for start, count in (("Update that came too late", 12), ("Update that was not read", 2)):
        row = released(data, start)
        assert (row["count"], row["bytes"], row["depends"]) == (count, None, update["depends"])
        assert row["mechanism"].startswith(update["mechanism"])
    assert (released(data, "No reply")["count"], released(data, "No reply")["bytes"]) == (15, 0)
    assert problems(data) == []


BROKEN: dict[str, Any] = {
    "parameters": [7300],
    "rounds": "four",
    "accuracy": {"int8": "good"},
    "bytes": {"int8": [1]},
    "privacy": {"noise_multiplier": 1.5, "largest_participation": math.inf},
    "model": 12,
}


@pytest.mark.parametrize("key", BROKEN)
def test_a_summary_with_something_else_than_figures_is_named(tmp_path: Path, key: str) -> None:
    run = build(tmp_path / "run", **{key: BROKEN[key]})
    with pytest.raises(RunError, match=r"summary\.json"):
        collect(run)


def test_a_summary_that_is_no_object_is_named(tmp_path: Path) -> None:
    run = build(tmp_path / "run")
    for text in ("[]", "3", "null", "[" * 100_000):
        run.summary.write_text(text)
        with pytest.raises(RunError, match=r"summary\.json: damaged"):
            collect(run)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda lines: lines[:-1],
        lambda lines: [],
        lambda lines: [lines[0], *lines],
        lambda lines: [*lines[:3], "[]"],
        lambda lines: [lines[0].replace('"bytes_up"', '"bytes_down"'), *lines[1:]],
        lambda lines: [lines[0].replace('"replies": 3', '"replies": -3'), *lines[1:]],
        lambda lines: [lines[0].replace('"accuracy": null', '"accuracy": NaN'), *lines[1:]],
    ],
    ids=["cut", "empty", "twice", "no object", "no bytes", "negative", "not a number"],
)
def test_metrics_that_no_run_writes_are_named(
    tmp_path: Path, spoil: Callable[[list[str]], list[str]]
) -> None:
    run = build(tmp_path / "run")
    lines = spoil(run.metrics.read_text().splitlines())
    run.metrics.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(RunError, match=r"metrics\.jsonl"):
        collect(run)


def test_without_privacy_no_release_claims_a_mechanism(off: dict[str, Any]) -> None:
    assert released(off, "Encoded update")["mechanism"] == "none: ε = ∞"
    assert released(off, "Broadcast model")["depends"] == "on private examples"
    assert not any("through the mechanism" in row["depends"] for row in off["releases"])


def test_clients_that_spent_nothing_are_in_the_distribution(example: dict[str, Any]) -> None:
    spent = example["spent"]["maximum"]
    assert example["spent"]["groups"] == [
        {"clients": 4, "epsilon": spent, "left": 9.0 - spent},
        {"clients": 2, "epsilon": 0.0, "left": 9.0},
    ]


def test_the_odds_in_plain_words_are_bayes_rule(example: dict[str, Any]) -> None:
    value, odds = example["adversaries"][0]["epsilon"], example["plain"]["odds"][0]
    assert odds["from_half"] == pytest.approx(math.exp(value) / (1 + math.exp(value)))
    assert odds["from_thousandth"] == pytest.approx(math.exp(value) / (999 + math.exp(value)))
    assert odds["text"].startswith("someone who already suspects with probability ½ that your")


def test_delta_is_said_to_be_added_and_not_to_be_a_chance_of_failure(
    example: dict[str, Any],
) -> None:
    assert "plus δ, a chance of 1 in 100,000; and the other way" in example["plain"]["promise"]
    note = "odds of more than twice those behind these figures have a probability of at most 2δ"
    for text in (render_md(example), render_html(example)):
        assert f"{note}, 1 in 50,000" in text and "except with probability δ" not in text
    # For a Gaussian of sensitivity 1 the loss is N(1/2, 1): beyond epsilon it has more than delta,
    # and beyond epsilon + log 2 less than 2 delta, as the note says.
    value = epsilon([PoissonGaussian(1.0, 1.0, 1)], 1e-5)
    beyond = [float(stats.norm.sf(value + more - 0.5)) for more in (0.0, math.log(2))]
    assert beyond[0] > 4e-5 and beyond[1] <= 2e-5


def test_the_plain_page_says_what_happens_at_the_budget(example: dict[str, Any]) -> None:
    text = " ".join(example["plain"]["budget"])
    for words in ("ε = 9.00", "whatever the server asks", "never taken back", "refused 4 times"):
        assert words in text


def test_a_training_that_budgets_ended_says_so_and_counts_its_last_round(tmp_path: Path) -> None:
    last = metrics_of(ROUNDS + 1) | {"dropped": {Refusal.BUDGET.text: 4}, "replies": 1}
    last = {key: last[key] for key in last if key not in ("accuracy", "epsilon")}
    data = collect(build(tmp_path / "run", stopped=last))
    text = " ".join(data["plain"]["budget"])
    assert "refused 8 times, in 5 rounds" in text and "before its round 5" in text
    assert released(data, "Encoded update")["count"] == 3 * ROUNDS + 1
    assert released(data, "Refusal 1006")["count"] == ROUNDS + 4
    assert released(data, "Broadcast model")["count"] == 5 * (ROUNDS + 1)
    assert (data["run"]["rounds"], len(data["rounds"]), problems(data)) == (ROUNDS, ROUNDS, [])
    damaged = ({}, last | {"round": ROUNDS}, last | {"replies": -1}, last | {"name": "x"}, [1])
    for number, wrong in enumerate(damaged):
        with pytest.raises(RunError, match="stopped: damaged"):
            collect(build(tmp_path / str(number), stopped=wrong))


def test_an_audit_stands_beside_the_claim_and_its_bound_is_rounded_down(tmp_path: Path) -> None:
    run = build(tmp_path / "run")
    (run.folder / "audit.json").write_text(json.dumps(audit_of(run)))
    data = collect(run)
    assert data["audit"]["lower_bound"] == 2.179
    assert (
        "at least ε = 2.17 with 99 % confidence"
        in answers(data)["Audit (empirical lower bound on ε)"]
    )
    page = render_html(data)
    assert "audit: at least 2.17" in page and "claimed: at most 3.00" in page
    assert problems(data) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"plan": "ab" * 32}, "belongs to plan abababababab"),
        ({"schema": 2}, "schema=2: must be 1"),
        ({"lower_bound": "2.1"}, "lower_bound='2.1'"),
        ({"lower_bound": math.nan}, "NaN is not JSON"),
        ({"claimed": {"epsilon": 3.0}}, "delta=None"),
        ({"randomness": None}, "randomness=None"),
        ({"unit": "client"}, "unit='client'"),
        ({"lower_bound": 3.1}, "verdict='consistent' contradicts"),
        ({"verdict": "violated"}, "verdict='violated' contradicts"),
    ],
)
def test_an_audit_that_cannot_be_believed_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    run = build(tmp_path / "run")
    (run.folder / "audit.json").write_text(json.dumps(audit_of(run, **changes)))
    with pytest.raises(RunError, match=words):
        collect(run)


def test_the_precision_of_the_noise_is_that_of_who_draws_and_adds_it(
    example: dict[str, Any], client: dict[str, Any]
) -> None:
    """As :class:`Client` and :func:`noised_sum` do; whose streams say what they draw."""
    one = answers(example)["Floating point"]
    assert one.startswith("noise is drawn in float32, added in float32; it is not a discrete")
    real = SystemRandomness.description
    device = {**example, "run": {**example["run"], "randomness": real}}
    at_server = {**client, "run": {**client["run"], "server_randomness": real}}
    for data, drawn in ((device, "float64"), (client, "float32"), (at_server, "float64")):
        row = {r["field"]: r["answer"] for r in checklist(data)}["Floating point"]
        assert row.startswith(f"noise is drawn in {drawn}, added in float64 and rounded to float32")


def test_a_test_of_the_randomness_says_what_it_compared(tmp_path: Path) -> None:
    run = build(tmp_path / "run")
    nothing = {
        "pairs": 0,
        "largest_correlation": None,
        "limit": None,
        "variance_ratio": None,
        "variance_interval": None,
        "passed": True,
    }
    texts: dict[str, str] = {}
    for name, changes in {"tested": {}, "untested": {"randomness": nothing}}.items():
        (run.folder / "audit.json").write_text(json.dumps(audit_of(run, **changes)))
        texts[name] = render_html(collect(run))
    assert "passed: the largest correlation of 190 pairs of releases is 0.01" in texts["tested"]
    assert "test of the randomness passed" in texts["tested"]
    assert "not possible: there was one release" in texts["untested"]
    assert "test of the randomness not possible" in texts["untested"]
    assert "passed" not in texts["untested"]


def test_an_audit_that_showed_nothing_says_so(tmp_path: Path) -> None:
    run, words = build(tmp_path / "run"), "This one showed nothing at all"
    for bound in (0.0, 0.5):
        (run.folder / "audit.json").write_text(json.dumps(audit_of(run, lower_bound=bound)))
        assert (words in render_html(collect(run))) == (bound == 0)


def test_a_torn_audit_is_refused(tmp_path: Path) -> None:
    run = build(tmp_path / "run")
    text = json.dumps(audit_of(run))
    (run.folder / "audit.json").write_text(text[: len(text) // 2])
    with pytest.raises(RunError, match=r"audit\.json: damaged"):
        collect(run)


def test_a_violated_claim_is_the_first_thing_that_a_reader_sees(tmp_path: Path) -> None:
    run = build(tmp_path / "run")
    audit = audit_of(run, lower_bound=4.2, verdict="violated")
    (run.folder / "audit.json").write_text(json.dumps(audit))
    data = collect(run)
    for text in (render_md(data), render_html(data)):
        assert text.index("An audit contradicts this report") < text.index(
            "The promise</h2>" if text.startswith("<") else "## The promise"
        )


def test_every_report_is_as_the_schema_says(
    example: dict[str, Any], client: dict[str, Any], off: dict[str, Any]
) -> None:
    for data in (example, client, off):
        assert problems(data) == []
        assert data["schema"] == 2 and data["$schema"] == json.loads(schema_text())["$id"]


def damages(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Return copies of a report, each with one fault that the schema must find."""
    found: list[dict[str, Any]] = []

    def planted(change: Any) -> None:
        copy = json.loads(json.dumps(data))
        change(copy)
        found.append(copy)

    for key in data:
        planted(lambda d, key=key: d.pop(key))
        planted(lambda d, key=key: d.update({key: 17}))
    for key in data["promise"]:
        planted(lambda d, key=key: d["promise"].pop(key))
    for value in ("8.0", -1.0, True, None):
        planted(lambda d, value=value: d["adversaries"][0].update(epsilon=value))
    planted(lambda d: d["run"].update(rounds=2.5))
    planted(lambda d: d["run"].update(plan="ab" * 31 + "AB"))
    planted(lambda d: d["rounds"][0].update(loss=0.3))
    planted(lambda d: d["rounds"][0]["dropped"].update(why="twice"))
    planted(lambda d: d["adversaries"].pop() and d["adversaries"].pop() and d["adversaries"].pop())
    planted(lambda d: d["adversaries"][0]["events"][0].update(sampling_rate=0))
    return found


def test_the_schema_rejects_planted_damage(example: dict[str, Any]) -> None:
    assert all(problems(damaged) for damaged in damages(example))


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_number_that_json_does_not_have_is_no_number(
    example: dict[str, Any], value: float
) -> None:
    for key in ("plan", "rounds", "sampling_rate"):
        assert problems({**example, "run": {**example["run"], key: value}})


def test_our_check_agrees_with_a_full_implementation_of_json_schema(
    example: dict[str, Any], client: dict[str, Any], off: dict[str, Any]
) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(schema_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    full = jsonschema.Draft202012Validator(schema)
    for data in (example, client, off):
        assert full.is_valid(data)
    assert not any(full.is_valid(damaged) for damaged in damages(example))
