"""Whole federations with client-level privacy: artifact, summary, reproducible and resumable."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from flwr.app import Context, RecordDict

from reticent.core.errors import PlanError, RunError
from reticent.core.plan import Plan, parse_plan
from reticent.core.run import Run, without_none
from reticent.privacy.accounting import epsilon
from reticent.privacy.ledger import Ledger
from reticent.privacy.randomness import SystemRandomness
from reticent.privacy.schedule import schedule_for
from reticent.server import deployment
from reticent.server.journal import Journal
from reticent.simulations import simulate as engine
from reticent.simulations.explain import explain_plan
from reticent.simulations.simulate import simulate

SMALL = [
    "task.name=digits",
    "task.clients=40",
    "task.public_examples=200",
    "task.partition.examples_per_client=20",
    "teacher.epochs=1",
    "student.epochs=2",
    "federation.clients_per_round=40",
    "federation.rounds=3",
    "federation.sampling_rate=0.5",
    "federation.steps_per_round=2",
    "federation.learning_rate=0.1",
    "federation.eval_every=1",
    "engine.workers=1",
    "privacy.unit=client",
    "privacy.noise_multiplier=1.5",
    "privacy.clip=0.2",
]
ADAPTIVE = "privacy.clip_quantile=0.5"


def plan_of(*overrides: str) -> Plan:
    return parse_plan("", [*SMALL, *overrides])


class Stopped(Exception):
    """Stands for a crash: raised where a process could have been killed."""


def stop_after(rounds: int) -> Any:
    def progress(metrics: dict[str, Any]) -> None:
        if metrics["round"] == rounds:
            raise Stopped

    return progress


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return simulate(plan_of(ADAPTIVE), tmp_path_factory.mktemp("adaptive") / "run")


def test_a_client_level_run_ends_with_artifact_and_summary(finished: Run) -> None:
    assert (finished.artifact / "manifest.json").is_file()
    privacy = finished.read_summary()["privacy"]
    schedule = schedule_for(plan_of(ADAPTIVE))
    assert schedule is not None
    whole = schedule.over(schedule.round_event(), 3)
    assert privacy["epsilon"] == epsilon([whole], 1e-5)
    assert privacy["server_epsilon"] == "infinity"
    assert (privacy["unit"], privacy["relation"]) == ("client", "add-or-remove-one")
    assert privacy["denominator"] == 40 and privacy["clip"] == 0.2
    assert privacy["server_randomness"].startswith("seeded AES-256-CTR")
    manifest = json.loads((finished.artifact / "manifest.json").read_text())
    assert manifest["privacy"]["epsilon"] == privacy["epsilon"]


def test_the_metrics_hold_the_noised_bound_and_nothing_that_is_not_noised(finished: Run) -> None:
    lines = finished.read_metrics()
    assert lines[0]["clip"] == 0.2
    assert len({m["clip"] for m in lines}) == 3
    votes = [m["within_clip"] * 40 for m in lines]
    assert all(abs(v - round(v)) > 1e-9 for v in votes), "a count without noise is a whole number"
    assert not {"inside", "norm", "norms"} & set(lines[0])
    assert finished.read_summary()["privacy"]["final_clip"] == latest_clip(finished)
    assert lines[-1]["epsilon"] == finished.read_summary()["privacy"]["epsilon"]


def latest_clip(run: Run) -> float | None:
    journal = Journal(run)
    try:
        state = journal.latest()
        return state.clip if state else None
    finally:
        journal.close()


def test_a_real_server_takes_its_noise_from_the_operating_system(tmp_path: Path) -> None:
    text = tomli_w.dumps(without_none(plan_of().model_dump(mode="json")))
    config: dict[str, Any] = {"plan": text, "run-dir": str(tmp_path / "run")}
    settings = deployment._settings(Context(1, 0, {}, RecordDict(), config))
    try:
        assert isinstance(settings.randomness, SystemRandomness)
        # Nothing that the run configuration or the plan can say reaches the source.
        first, again = (settings.randomness.stream("server", "sum", "r", 1) for _ in range(2))
        assert not np.array_equal(first.normal(8), again.normal(8))
    finally:
        settings.close()


def test_every_device_is_charged_what_the_summary_says(finished: Run) -> None:
    said = finished.read_summary()["privacy"]["epsilon"]
    with Ledger.open(finished.ledger) as ledger:
        assert len(ledger.devices()) == 40
        assert [ledger.spent(d, 1e-5) for d in ledger.devices()] == pytest.approx([said] * 40)


def test_two_worker_processes_give_the_same_model(finished: Run, tmp_path: Path) -> None:
    run = simulate(plan_of(ADAPTIVE, "engine.workers=2"), tmp_path / "two")
    assert run.read_summary()["model"] == finished.read_summary()["model"]


def test_another_seed_gives_another_model(finished: Run, tmp_path: Path) -> None:
    run = simulate(plan_of(ADAPTIVE, "seed=1"), tmp_path / "other")
    assert run.read_summary()["model"] != finished.read_summary()["model"]


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_resumed_run_ends_bit_for_bit_with_the_same_bounds(
    finished: Run, tmp_path: Path, rounds: int
) -> None:
    folder = tmp_path / "stopped"
    with pytest.raises(Stopped):
        simulate(plan_of(ADAPTIVE), folder, progress=stop_after(rounds))
    run = simulate(plan_of(ADAPTIVE), folder, resume=True)
    assert run.read_summary()["model"] == finished.read_summary()["model"]
    same = [[m[k] for m in r.read_metrics()] for r in (run, finished) for k in ("clip",)]
    assert same[0] == same[1]


def test_a_run_keeps_the_source_of_its_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        simulate(plan_of(), folder, progress=stop_after(1))
    monkeypatch.setattr(engine, "SeededRandomness", lambda _: SystemRandomness())
    with pytest.raises(RunError, match="one run must have one source"):
        simulate(plan_of(), folder, resume=True)


@pytest.mark.parametrize("codec", [["int4", "ans"], ["topk:0.2"], ["identity"]])
def test_a_fixed_bound_runs_with_every_codec(codec: list[str], tmp_path: Path) -> None:
    plan = plan_of("federation.rounds=1", f"updates.codec={json.dumps(codec)}")
    run = simulate(plan, tmp_path / "run")
    (line,) = run.read_metrics()
    assert (line["clip"], line["within_clip"], line["replies"]) == (0.2, None, 40)
    assert latest_clip(run) == 0.2


def test_a_plan_is_priced_before_it_runs() -> None:
    plan = plan_of(ADAPTIVE, "privacy.budget=12.0")
    price = explain_plan(plan)["privacy"]
    assert price["server_epsilon"] == "infinity" and price["unit"] == "client"
    schedule = schedule_for(plan)
    assert schedule is not None
    fit, half = price["rounds_that_fit"], price["half_noise_rounds"]
    assert 1 <= half < fit
    assert epsilon([schedule.over(schedule.round_event(), fit)], 1e-5) <= 12.0
    assert epsilon([schedule.over(schedule.round_event(), fit + 1)], 1e-5) > 12.0
    assert price["half_noise_epsilon"] > price["epsilon"] == price["unamplified_epsilon"]


def test_rounds_are_counted_against_the_budget_where_it_is_not_the_target() -> None:
    given = [text for text in SMALL if "noise_multiplier" not in text]
    plan = parse_plan("", [*given, "privacy.epsilon=8.0", "privacy.budget=12.0"])
    price, whole = explain_plan(plan)["privacy"], schedule_for(plan)
    assert whole is not None
    half = replace(whole, noise_multiplier=whole.noise_multiplier / 2)
    for schedule, fit in ((whole, price["rounds_that_fit"]), (half, price["half_noise_rounds"])):
        most = epsilon([schedule.over(schedule.round_event(), fit)], 1e-5) if fit else 0.0
        assert most <= 12.0 < epsilon([schedule.over(schedule.round_event(), fit + 1)], 1e-5)
    assert price["half_noise_epsilon"] == epsilon([half.over(half.round_event(), 3)], 1e-5)


def test_the_price_in_bytes_is_that_of_updates_at_their_bound(finished: Run) -> None:
    up = explain_plan(plan_of(ADAPTIVE))["bytes"]["up"]
    line = finished.read_metrics()[-1]
    assert 0.97 < up / (line["bytes_up"] / line["replies"]) < 1.03


def test_a_count_that_reveals_too_much_is_an_error_before_anything_is_written(
    tmp_path: Path,
) -> None:
    with pytest.raises(PlanError, match="clip_quantile"):
        simulate(plan_of(ADAPTIVE, "privacy.noise_multiplier=5.0"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_with_little_noise_client_level_training_learns(tmp_path: Path) -> None:
    run = simulate(
        plan_of(
            "task.clients=20",
            "federation.clients_per_round=20",
            "federation.rounds=8",
            "federation.steps_per_round=3",
            "privacy.noise_multiplier=0.1",
            "federation.eval_every=8",
            "federation.server.learning_rate=0.01",
        ),
        tmp_path / "run",
    )
    found = run.read_summary()["accuracy"]
    assert found["fp32"] > found["public_only_pruned"] + 0.05
    assert np.isfinite(found["fp32"])
