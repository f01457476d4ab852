"""What a fleet's clock and a price say goes up and down is what a run sends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fleets import SIZES, fleet_of, plan_of

from reticent.core.plan import Plan, parse_plan
from reticent.core.run import Run
from reticent.server.journal import Journal
from reticent.simulations.explain import explain_plan
from reticent.simulations.fleet import fleet_for, granting
from reticent.simulations.grid import node_of
from reticent.simulations.simulate import simulate

NODES = [node_of(c) for c in range(20)]
ALIKE = ['fleet.classes=[{kind="pi5",dropout=0.0}]', "fleet.spread=0.0", "fleet.jitter=0.0"]
ONCE = 7000


def small(*overrides: str) -> Plan:
    """A plan whose messages have the same size whatever is in them, also without the mask."""
    given = [
        "task.name=digits",
        "task.public_examples=200",
        "teacher.epochs=1",
        "student.epochs=1",
        "student.prune.kind=none",
        "federation.rounds=3",
        "federation.eval_every=3",
        "privacy.trust=local",
        "privacy.noise_multiplier=1.0",
        "engine.workers=1",
        'updates.codec=["identity"]',
        'updates.broadcast=["identity"]',
    ]
    return parse_plan("", [*given, *overrides])


def sent(run: Run) -> tuple[int, int, int]:
    keys = ("bytes_up", "bytes_down", "bytes_constants")
    up, down, constants = (sum(line[key] for line in run.read_metrics()) for key in keys)
    return up, down, constants


def test_constants_are_sent_to_a_device_with_its_first_model() -> None:
    plan = plan_of(20, 20)
    fleet = fleet_for(plan, 10_000, SIZES, granting, ONCE)
    with_them = fleet_for(plan, 10_000, (SIZES[0], SIZES[1] + ONCE), granting)
    assert fleet.ask(2, 0, NODES, 0.0, 20) == fleet_of(plan).ask(2, 0, NODES, 0.0, 20)
    assert fleet.ask(2, 0, NODES, 0.0, 20, NODES) == with_them.ask(2, 0, NODES, 0.0, 20)
    arrived = [
        f.trips(np.arange(20), 0.0, (2, 0), np.arange(20) < k).arrived
        for f, k in ((fleet, 10), (with_them, 0), (fleet, 0))
    ]
    assert (arrived[0] == np.where(np.arange(20) < 10, arrived[1], arrived[2])).all()


def test_in_a_buffered_run_constants_are_sent_to_each_device_once() -> None:
    plan = plan_of(20, 5, "federation.buffered.concurrency=5", *ALIKE, "federation.rounds=8")
    found = list(fleet_for(plan, 10_000, SIZES, granting, ONCE).releases(range(2, 22)))
    assert sum(release.bytes_down for release in found) == 40 * SIZES[1] + 20 * ONCE
    assert sum(release.bytes_down for release in found[:4]) == 20 * (SIZES[1] + ONCE)


@pytest.mark.parametrize("way", [[], ["federation.buffered.concurrency=6"]])
def test_bytes_on_the_fleet_are_those_that_the_run_sends(way: list[str], tmp_path: Path) -> None:
    clients = ["task.clients=12", "federation.clients_per_round=6", *ALIKE]
    plan = small(*clients, *way)
    price = explain_plan(plan)["fleet"]
    run = simulate(plan, tmp_path / "run")
    up, down, constants = sent(run)
    assert constants > 0
    for figures in (price, run.read_summary()["fleet"]):
        assert (figures["bytes_up"], figures["bytes_down"]) == (up, down + constants)


@pytest.mark.parametrize(("clients", "within"), [(6, 0.01), (10, 0.1)])
def test_with_changes_a_model_down_costs_what_it_does_on_average(
    clients: int, within: float, tmp_path: Path
) -> None:
    """Of six of ten clients some hold the last model; of six of six all do."""
    many = ["federation.rounds=10", f"task.clients={clients}", "federation.clients_per_round=6"]
    plan = small(*many, 'updates.delta=["int8"]', *ALIKE)
    price, run = explain_plan(plan), simulate(plan, tmp_path / "run")
    _, down, constants = sent(run)
    assert 60 * price["bytes"]["down"] == pytest.approx(down, rel=within)
    for figures in (price["fleet"], run.read_summary()["fleet"]):
        assert figures["bytes_down"] == pytest.approx(down + constants, rel=within)


@pytest.mark.parametrize(("over", "asked"), [(None, 6), (1.5, 9)])
def test_the_price_of_a_whole_run_is_what_it_sends(
    over: float | None, asked: int, tmp_path: Path
) -> None:
    """Without a fleet and, on one, with models for those too whose update is not used."""
    fleet = [*ALIKE, f"fleet.over_selection={over}"] if over else []
    plan = small("task.clients=12", "federation.clients_per_round=6", *fleet)
    run = simulate(plan, tmp_path / "run")
    up, down, constants = sent(run)
    assert sum(line["asked"] for line in run.read_metrics()) == 3 * asked
    # In a simulation they are counted of those whose update is used.
    journal = Journal(run)
    used = sum(rounds > 0 for rounds in journal.participations().values())
    journal.close()
    assert explain_plan(plan)["bytes"]["total"] == up + down + 12 * constants // used
