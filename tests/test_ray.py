"""Flower's own Ray engine runs the same apps to the same model."""

from __future__ import annotations

from pathlib import Path

import pytest

from reticent.core.errors import NetworkError
from reticent.core.plan import parse_plan
from reticent.simulations.simulate import simulate

pytestmark = [
    pytest.mark.ray,
    # Ray and Flower's engine leave these to the garbage collector and to their own deprecations.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SMALL = [
    "task.name=digits",
    "task.clients=4",
    "task.public_examples=200",
    "teacher.epochs=1",
    "student.epochs=1",
    "federation.clients_per_round=4",
    "federation.rounds=2",
    "engine.workers=1",
]


def test_the_ray_engine_gives_the_model_of_the_in_process_engine(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    here = simulate(parse_plan("", SMALL), tmp_path / "inprocess")
    there = simulate(parse_plan("", [*SMALL, "engine.kind=ray"]), tmp_path / "ray")
    assert there.read_summary()["model"] == here.read_summary()["model"]
    assert len(there.read_metrics()) == 2


def test_an_error_in_the_ray_engine_is_the_same_error(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    plan = parse_plan("", [*SMALL, "engine.kind=ray", "privacy.budget=0.5", "federation.retries=0"])
    with pytest.raises(NetworkError, match="privacy budget"):
        simulate(plan, tmp_path / "run")
