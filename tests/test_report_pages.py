"""Reports of small runs, made through the real run directory and the real ledger."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from reticent.core.errors import LedgerError, RunError
from reticent.core.plan import Plan, parse_plan
from reticent.core.protocol import Refusal
from reticent.core.run import Run, create_run
from reticent.core.seeds import numpy_generator
from reticent.privacy.accounting import epsilon
from reticent.privacy.events import Event, NonPrivate, PoissonGaussian
from reticent.privacy.ledger import Budget, Ledger
from reticent.privacy.report import collect, render, render_html, render_md, write_reports
from reticent.privacy.report.collect import coarse
from reticent.privacy.schedule import participations

ROUNDS = 8
PRIVATE = 'privacy = { noise_multiplier = 1.5, trust = "aggregator", budget = 9.0 }'
LOCAL = 'privacy = { noise_multiplier = 1.5, trust = "local" }'
OFF = 'privacy = "off"'


def plan_of(privacy: str, clients: int = 12, cohort: int = 4) -> Plan:
    return parse_plan(
        f"{privacy}\n[task]\nclients = {clients}\n"
        f"[federation]\nrounds = {ROUNDS}\nclients_per_round = {cohort}\neval_every = 2\n"
        "sampling_rate = 0.2\n"
    )


def build(folder: Path, plan: Plan, *, ledger: bool = True, finished: bool = True) -> Run:
    """Write a run as the server and the devices do; who takes part is dealt in passes."""
    run = create_run(folder, plan)
    counts = charge(run, plan) if ledger else {0: participations(plan)}
    write_metrics(run, plan)
    if finished:
        run.summary.write_text(json.dumps(summary_of(plan, max(counts.values()))))
    return run


def charge(run: Run, plan: Plan) -> dict[int, int]:
    counts: dict[int, int] = {}
    federation, size = plan.federation, plan.federation.clients_per_round
    per_pass = plan.task.clients // size
    with Ledger.open(run.ledger) as ledger:
        for number in range(1, ROUNDS + 1):
            order = numpy_generator(0, "cohort", (number - 1) // per_pass)
            dealt = order.permutation(plan.task.clients)
            first = (number - 1) % per_pass * size
            cohort = [int(c) for c in dealt[first : first + size]]
            event: Event = NonPrivate()
            budget = Budget(math.inf, 1e-5)
            if plan.private and plan.private.noise_multiplier:
                sigma = plan.private.noise_multiplier
                event = PoissonGaussian(federation.sampling_rate, sigma, 1)
                budget = Budget(plan.private.budget or math.inf, plan.private.delta)
            names = [f"client-{c}" for c in cohort]
            ledger.charge_many(names, "run", number, event, budget)
            counts |= {c: counts.get(c, 0) + 1 for c in cohort}
    return counts


def write_metrics(run: Run, plan: Plan) -> None:
    lines: list[str] = []
    for number in range(1, ROUNDS + 1):
        tested = number % 2 == 0
        so_far = -(-number // (plan.task.clients // plan.federation.clients_per_round))
        value = None
        if tested and plan.private and plan.private.noise_multiplier:
            event = PoissonGaussian(0.2, plan.private.noise_multiplier, so_far)
            value = epsilon([event], plan.private.delta)
        metrics: dict[str, Any] = {
            "round": number,
            "replies": 4,
            "dropped": {Refusal.BUDGET.text: 1} if number > 6 else {},
            "bytes_up": 4 * 3700 + number,
            "bytes_down": 4 * 7300,
            "bytes_constants": 4 * 1900 if number <= 3 else 0,
            "seconds": 0.2,
            "accuracy": 0.78 + 0.005 * number if tested else None,
            "epsilon": value,
        }
        lines.append(json.dumps(metrics) + "\n")
    run.metrics.write_text("".join(lines))


def summary_of(plan: Plan, rounds: int) -> dict[str, Any]:
    private = plan.private
    privacy = {"trust": "off", "epsilon": "infinity", "server_epsilon": "infinity"}
    if private is not None:
        privacy = {
            "trust": private.trust,
            "noise_multiplier": private.noise_multiplier,
            "largest_participation": rounds,
        }
    return {
        "plan": plan.digest,
        "model": "ab" * 32,
        "rounds": ROUNDS,
        "parameters": {"kept": 7300, "total": 14600},
        "privacy": privacy,
        "accuracy": {
            "teacher": 0.842,
            "public_only": 0.775,
            "public_only_pruned": 0.771,
            "fp32": 0.821,
            "public_only_int8": float("nan"),
            "int8": 0.82,
        },
        "agreement": {"fake_quantized": 1.0, "largest_logit_difference": 0.0, "fp32": 0.985},
        "latency_us": {"teacher": 812.5, "fp32": 143.2, "int8": 88.1},
        "latency_p95_us": {"teacher": 990.0, "fp32": 166.0, "int8": 97.4},
        "bytes": {"teacher": 1_690_000, "fp32": 60_400, "int8": 17_200},
    }


@pytest.fixture(scope="module")
def aggregator(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return build(tmp_path_factory.mktemp("runs") / "aggregator", plan_of(PRIVATE))


def by_name(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in data["adversaries"]}


def answers(data: dict[str, Any]) -> dict[str, str]:
    return {row["field"]: row["answer"] for row in data["checklist"]}


def test_the_three_files_are_written_and_their_paths_returned(aggregator: Run) -> None:
    paths = write_reports(aggregator)
    assert [p.name for p in paths] == ["report.html", "report.json", "report.md"]
    assert all(p.parent == aggregator.folder and p.stat().st_size > 2000 for p in paths)
    assert paths[2].read_text() == render(aggregator, "md")


def test_json_is_strict_and_round_trips(aggregator: Run) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    data = collect(aggregator)
    text = render(aggregator, "json")
    assert json.loads(text, parse_constant=refuse) == data
    assert json.loads(json.dumps(data)) == data


def test_each_adversary_has_the_number_of_what_it_sees(aggregator: Run) -> None:
    rows = by_name(collect(aggregator))
    steps = participations(aggregator.plan())
    quorum = aggregator.plan().federation.quorum
    readers = epsilon([PoissonGaussian(0.2, 1.5, steps)], 1e-5)
    server = epsilon([PoissonGaussian(0.2, 1.5 / quorum**0.5, steps)], 1e-5)
    fellow = epsilon([PoissonGaussian(0.2, 1.5 * ((quorum - 1) / quorum) ** 0.5, steps)], 1e-5)
    assert rows["Readers of the models"]["epsilon"] == pytest.approx(readers, abs=1e-9)
    assert rows["The server"]["epsilon"] == pytest.approx(server, rel=1e-9)
    assert rows["Another client"]["epsilon"] == pytest.approx(fellow)
    assert server > fellow > readers


def test_the_server_is_never_left_out(tmp_path: Path) -> None:
    for name, privacy in (("a", PRIVATE), ("l", LOCAL), ("o", OFF)):
        run = build(tmp_path / name, plan_of(privacy))
        for text in (render(run, "md"), render(run, "html")):
            assert "Readers of the models" in text
            assert "The server" in text


def test_local_trust_gives_everyone_the_same_number(tmp_path: Path) -> None:
    data = collect(build(tmp_path / "run", plan_of(LOCAL)))
    rows = by_name(data)
    assert len(rows) == 3
    assert len({row["epsilon"] for row in rows.values()}) == 1
    assert data["promise"]["share_multiplier"] == data["promise"]["noise_multiplier"]
    assert data["spent"]["hard_stop"] == "infinity"
    assert "trusted to look only at the sum" not in render_md(data)
    assert "trusted to look only at the sum" not in render_html(data)


def test_the_network_is_promised_no_more_than_the_server_leaves_it(tmp_path: Path) -> None:
    rows = by_name(collect(build(tmp_path / "run", plan_of(PRIVATE))))
    assert rows["Someone on the network"]["epsilon"] == rows["The server"]["epsilon"]
    assert rows["Someone on the network"]["epsilon"] > rows["Readers of the models"]["epsilon"]


def test_without_privacy_everything_is_infinite_and_nothing_is_promised(tmp_path: Path) -> None:
    data = collect(build(tmp_path / "run", plan_of(OFF)))
    assert [row["epsilon"] for row in data["adversaries"]] == ["infinity", "infinity"]
    assert data["spent"]["maximum"] == "infinity"
    assert data["spent"]["clients"] == 12
    for text in (render_md(data), render_html(data)):
        assert "ε = ∞" in text
        assert "nothing is promised" in text
        assert "protection" not in text.replace("without any protection", "")


def test_without_a_ledger_the_servers_count_is_used(tmp_path: Path) -> None:
    plan = plan_of(PRIVATE)
    here = collect(build(tmp_path / "here", plan))
    away = build(tmp_path / "away", plan, ledger=False)
    data = collect(away)
    assert data["spent"]["maximum"] == here["spent"]["maximum"]
    assert data["spent"]["clients"] is None
    assert data["spent"]["hard_stop"] is None
    assert set(data["spent"]["quantiles"].values()) == {None}
    assert not data["run"]["simulated"]
    assert "operating-system key" in answers(data)["Randomness"]
    assert "simulation" not in render_html(data).lower()
    assert not away.ledger.exists()


def test_without_a_ledger_rounds_whose_update_came_too_late_count_as_spent(tmp_path: Path) -> None:
    plan = plan_of(PRIVATE)
    run = build(tmp_path / "run", plan, ledger=False)
    in_time = collect(run)["spent"]["maximum"]
    summary = json.loads(run.summary.read_text())
    most = summary["privacy"]["largest_participation"]
    summary["privacy"] |= {"largest_participation": most - 2, "largest_asked": most}
    run.summary.write_text(json.dumps(summary))
    assert collect(run)["spent"]["maximum"] == in_time
    summary["privacy"]["largest_asked"] = most - 1
    run.summary.write_text(json.dumps(summary))
    assert collect(run)["spent"]["maximum"] < in_time
    summary["privacy"]["largest_asked"] = "all"
    run.summary.write_text(json.dumps(summary))
    with pytest.raises(RunError, match=r"summary\.json"):
        collect(run)


def test_quantiles_and_counts_come_from_the_ledger(tmp_path: Path) -> None:
    # 8 rounds of 4 among 16 clients: two passes of four rounds, so everybody takes part twice.
    run = build(tmp_path / "run", plan_of(PRIVATE, clients=16))
    event = PoissonGaussian(0.2, 1.5, 1)
    with Ledger.open(run.ledger) as ledger:
        ledger.charge_many(["client-0", "client-1"], "other", 1, event, Budget(9.0, 1e-5))
    spent = collect(run)["spent"]
    two, three = (epsilon([PoissonGaussian(0.2, 1.5, n)], 1e-5) for n in (2, 3))
    assert spent["clients"] == 16
    assert spent["quantiles"] == {"50%": two, "90%": three, "99%": three}
    assert spent["groups"] == [
        {"clients": 2, "epsilon": three, "left": 9.0 - three},
        {"clients": 14, "epsilon": two, "left": 9.0 - two},
    ]
    assert (spent["refusals"], spent["rounds_with_refusals"]) == (2, 2)


def test_bytes_are_means_of_what_was_measured(aggregator: Run) -> None:
    traffic = collect(aggregator)["traffic"]
    assert traffic["up"] == 3800  # 3700 + 36 / 32, which the promise to readers does not cover
    assert traffic["down"] == 7300
    assert traffic["fp32"] == 4 * 14600
    assert traffic["total_constants"] == 3 * 4 * 1900


def test_the_statement_answers_every_field_and_says_what_is_not_done(aggregator: Run) -> None:
    given = answers(collect(aggregator))
    assert given["User-level ε"] == "none possible: no bound on examples per user is given"
    assert given["Audit (empirical lower bound on ε)"] == "not done: run `reticent audit RUN`"
    assert given["Secure aggregation"].startswith("not used")
    assert given["Charge for tuning"].startswith("not counted")
    assert given["Composition window and renewal"].startswith("this run only")
    assert given["μ-GDP and its regret"].startswith("μ = ")
    assert all(given.values())
    assert "not covered yet" not in "".join(given.values())


def test_the_ledger_head_is_stated_and_a_damaged_ledger_is_not_reported(tmp_path: Path) -> None:
    run = build(tmp_path / "run", plan_of(PRIVATE))
    with Ledger.open(run.ledger) as ledger:
        head = ledger.head()
    assert head.mac in answers(collect(run))["Ledger head"]
    (run.ledger / "ledger.key").write_bytes(bytes(32))
    with pytest.raises(LedgerError, match="entry 1"):
        collect(run)
    assert not (run.folder / "report.json").exists()


def test_a_ledger_that_counts_less_than_the_server_is_refused(tmp_path: Path) -> None:
    plan = plan_of(PRIVATE)
    run = build(tmp_path / "run", plan)
    run.summary.write_text(json.dumps(summary_of(plan, ROUNDS)))
    with pytest.raises(LedgerError, match="rolled back"):
        collect(run)


def test_a_ledger_folder_without_a_ledger_is_refused_and_not_filled(tmp_path: Path) -> None:
    run = build(tmp_path / "run", plan_of(PRIVATE), ledger=False)
    run.ledger.mkdir()
    with pytest.raises(LedgerError, match=r"no ledger\.db"):
        collect(run)
    assert not list(run.ledger.iterdir())


def test_a_run_that_has_not_finished_is_refused(tmp_path: Path) -> None:
    run = build(tmp_path / "run", plan_of(PRIVATE), finished=False)
    with pytest.raises(RunError, match="has not finished"):
        write_reports(run)


def test_a_summary_of_another_plan_is_refused(tmp_path: Path) -> None:
    run = build(tmp_path / "run", plan_of(PRIVATE))
    run.summary.write_text(json.dumps(summary_of(plan_of(LOCAL), 3)))
    with pytest.raises(RunError, match="belongs to plan"):
        collect(run)


def test_an_unknown_kind_is_refused_by_name(aggregator: Run) -> None:
    with pytest.raises(RunError, match="'pdf': must be one of html, json, md"):
        render(aggregator, "pdf")


def test_the_page_is_self_contained(aggregator: Run) -> None:
    page = render(aggregator, "html")
    namespaces = re.sub(r'xmlns="http://www\.w3\.org/2000/svg"', "", page)
    assert "http://" not in namespaces
    assert "https://" not in namespaces
    for request in ("<script", "<link", "<img", "<iframe", "@import", "url(", "src="):
        assert request not in page
    assert page.count("<svg") == page.count('role="img"') == 4
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_text_from_a_plan_is_escaped(tmp_path: Path) -> None:
    plan = plan_of(PRIVATE)
    evil = plan.model_copy(
        update={"task": plan.task.model_copy(update={"name": "<script>alert(1)</script>"})}
    )
    run = build(tmp_path / "run", evil)
    assert "<script" not in render(run, "html")
    assert "&lt;script&gt;" in render(run, "html")


def test_a_report_is_the_same_whenever_it_is_written(aggregator: Run) -> None:
    first = [p.read_bytes() for p in write_reports(aggregator)]
    assert first == [p.read_bytes() for p in write_reports(aggregator)]


def test_a_huge_epsilon_is_said_to_promise_nothing(tmp_path: Path) -> None:
    run = build(tmp_path / "run", plan_of("privacy = { noise_multiplier = 0.02 }"))
    data = collect(run)
    page = render_html(data)
    assert by_name(data)["The server"]["verdict"] == "no meaningful protection"
    assert "In effect nothing is promised" in page
    assert data["accounting"]["prv"]["epsilon"] is None
    assert "out of its reach" in page


def test_the_recorded_noise_counts_not_what_would_be_calibrated_now(tmp_path: Path) -> None:
    plan = plan_of("privacy = { epsilon = 4.0 }")
    run = build(tmp_path / "run", plan, ledger=False)
    summary = summary_of(plan, 3)
    summary["privacy"]["noise_multiplier"] = 2.5
    run.summary.write_text(json.dumps(summary))
    data = collect(run)
    assert data["spent"]["maximum"] == epsilon([PoissonGaussian(0.2, 2.5, 3)], 1e-5)
    assert data["promise"]["target"] == 4.0


def test_a_summary_without_its_noise_is_refused(tmp_path: Path) -> None:
    run = build(tmp_path / "run", plan_of("privacy = { epsilon = 4.0 }"), ledger=False)
    with pytest.raises(RunError, match=r"privacy\.noise_multiplier=None"):
        collect(run)


def test_sizes_are_exact_only_where_the_promise_covers_them(tmp_path: Path) -> None:
    """Under local trust an update is private by itself, and its size with it."""
    sizes = {
        name: collect(build(tmp_path / name, plan_of(privacy)))["traffic"]["total_up"]
        for name, privacy in (("aggregator", PRIVATE), ("local", LOCAL), ("off", OFF))
    }
    assert sizes["local"] == sizes["off"]
    assert sizes["aggregator"] == coarse(sizes["local"]) > sizes["local"]
