"""Both Ray engines, ours and Flower's, run the same apps to the same model."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from reticent.core.errors import DependencyError, NetworkError
from reticent.core.plan import parse_plan
from reticent.core.run import Run
from reticent.privacy.ledger import Ledger
from reticent.simulations.alike import own_marks
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


ENGINE = "reticent.simulations.ray_engine"
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.mark.parametrize("kind", ["ray", "flower-ray"])
def test_a_ray_engine_gives_the_model_of_the_in_process_engine(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    here = simulate(parse_plan("", SMALL), tmp_path / "inprocess")
    there = simulate(parse_plan("", [*SMALL, f"engine.kind={kind}"]), tmp_path / "ray")
    assert there.read_summary()["model"] == here.read_summary()["model"]
    assert len(there.read_metrics()) == 2


FLEET = [
    "task.clients=24",
    "federation.clients_per_round=10",
    "federation.min_replies=4",
    "federation.rounds=3",
    "federation.timeout=40",
    "fleet.over_selection=1.5",
    'fleet.classes=[{kind="phone",dropout=0.3},{kind="pi4"}]',
]
FLEETS = {
    "synchronous": ["federation.sampling=fixed", 'fleet.availability={kind="diurnal",high=0.9}'],
    "buffered": ["federation.buffered.concurrency=16", "federation.buffered.max_staleness=3"],
}


@pytest.mark.parametrize("kind", FLEETS)
def test_a_fleet_on_ray_gives_the_run_of_the_in_process_engine(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    plan = [*SMALL, *FLEET, *FLEETS[kind]]
    here = simulate(parse_plan("", plan), tmp_path / "inprocess")
    ray = ["engine.kind=ray", "engine.workers=2"]
    there = simulate(parse_plan("", [*plan, *ray]), tmp_path / "ray")
    for key in ("model", "fleet"):
        assert there.read_summary()[key] == here.read_summary()[key]
    lost = [sum(m["dropped"].values()) for m in here.read_metrics()]
    assert sum(lost) > 0
    for mine, theirs in zip(there.read_metrics(), here.read_metrics(), strict=True):
        assert mine | {"seconds": 0} == theirs | {"seconds": 0}
    charges: list[list[tuple[tuple[str, ...], float]]] = []
    for run in (here, there):
        with Ledger.open(run.ledger) as ledger:
            charges.append([(row.devices, row.epsilon) for row in ledger.summary(1e-5)])
    assert charges[0] == charges[1]


@pytest.mark.parametrize("kind", ["ray", "flower-ray"])
def test_an_error_in_a_ray_engine_is_the_same_error(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    plan = parse_plan(
        "", [*SMALL, f"engine.kind={kind}", "privacy.budget=0.5", "federation.retries=0"]
    )
    with pytest.raises(NetworkError, match="privacy budget"):
        simulate(plan, tmp_path / "run")


def test_a_cluster_that_loses_an_actor_and_a_node_gives_the_same_model() -> None:
    """Two nodes on loopback; an actor's process and then a whole node are killed mid-round."""
    pytest.importorskip("ray")
    script = BENCHMARKS / "ray_cluster.py"
    done = subprocess.run(
        [sys.executable, str(script), "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout[done.stdout.index("[\n") :])
    assert [row["event"] for row in rows] == ["none", "none", "an actor killed", "a node killed"]
    assert len({row["model"] for row in rows}) == 1
    assert [row["said"] == "" for row in rows] == [True, True, False, False]
    assert all("a worker ended" in row["said"] for row in rows[2:])


def test_a_blow_that_misses_its_round_or_its_aim_is_no_proof(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("ray")
    import ray_cluster

    monkeypatch.setattr(ray_cluster, "DELAY", 0.0)
    blow = ray_cluster.Blow(lambda: [][0])
    for number in (1, 2, 3):
        blow.say(f"a worker ended before the end of round {number}")
        blow.progress({"round": number, "seconds": 1.0})
    blow.say("a worker ended after it")
    assert blow.said == ["a worker ended before the end of round 3"]
    deadline = time.monotonic() + 10
    while "IndexError" not in blow.problem and time.monotonic() < deadline:
        time.sleep(0.01)
    assert blow.problem.startswith("it could not be struck: IndexError")


def test_nodes_with_other_code_are_refused_and_of_another_kind_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As seen from here: what is changed is what this process takes itself for."""
    pytest.importorskip("ray")
    plan, own = parse_plan("", [*SMALL, "engine.kind=ray", "engine.workers=2"]), own_marks()
    lines: list[str] = []
    monkeypatch.setattr(f"{ENGINE}.own_marks", lambda: replace(own, kernels="another"))
    simulate(plan, tmp_path / "kind", say=lines.append)
    assert len([line for line in lines if "need not give the same model" in line]) == 1
    monkeypatch.setattr(f"{ENGINE}.own_marks", lambda: replace(own, code="0.0.9"))
    with pytest.raises(DependencyError, match=r"this machine has reticent 0\.0\.9"):
        simulate(plan, tmp_path / "code")


class Failing:
    """An actor that cannot be made."""

    def __init__(self, *about: object) -> None:
        raise OSError("no room for it")

    def ready(self) -> None: ...

    def play(self) -> None: ...


@pytest.mark.parametrize(
    ("module", "why"), [("__main__", "OSError: no room for it"), ("elsewhere", "No module named")]
)
def test_a_node_where_no_actor_can_start_ends_the_run(
    module: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a module that nodes do not have, as reticent is where it was not installed."""
    pytest.importorskip("ray")
    monkeypatch.setitem(sys.modules, "elsewhere", ModuleType("elsewhere"))
    monkeypatch.setattr(sys.modules[module], "Failing", Failing, raising=False)
    monkeypatch.setattr(Failing, "__module__", module)  # __main__ is sent along
    monkeypatch.setattr(f"{ENGINE}._Actor", Failing)
    lines: list[str] = []
    plan = parse_plan("", [*SMALL, "engine.kind=ray", "engine.workers=2"])
    with pytest.raises(DependencyError, match=f"a Ray node cannot start an actor: .*{why}"):
        simulate(plan, tmp_path / "run", say=lines.append)
    assert not [line for line in lines if "a worker ended" in line]


def test_an_address_where_no_cluster_answers_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    plan = parse_plan("", [*SMALL, "engine.kind=ray", "engine.address=127.0.0.1:1"])
    with pytest.raises(NetworkError, match="no Ray cluster answers"):
        simulate(plan, tmp_path / "run")


def test_a_submitted_job_gives_the_model_of_the_in_process_engine(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    pytest.importorskip("aiohttp_cors", reason="jobs need ray[default]")
    here = simulate(parse_plan("", SMALL), tmp_path / "inprocess")
    port, dashboard = free_port(), free_port()
    tools = Path(sys.executable).parent
    env = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    head = [str(tools / "ray"), "start", "--head", "--block", "--num-cpus=2"]
    head += [f"--port={port}", f"--dashboard-port={dashboard}"]
    with subprocess.Popen(head, env=env, stdout=subprocess.DEVNULL) as cluster:
        try:
            run = tmp_path / "job"
            keys = [f"--set={key}" for key in (*SMALL, "engine.kind=ray")]
            submit = [
                str(tools / "ray"),
                "job",
                "submit",
                f"--address=http://127.0.0.1:{dashboard}",
            ]
            submit += ["--", str(tools / "reticent"), "simulate", f"--run={run}", *keys]
            done = answered(submit, env, dashboard)
        finally:
            cluster.terminate()
    assert done.returncode == 0, done.stdout + done.stderr
    assert Run(run).read_summary()["model"] == here.read_summary()["model"]


def answered(
    command: list[str], env: dict[str, str], port: int
) -> subprocess.CompletedProcess[str]:
    """Run ``command`` as soon as something listens at ``port``."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.5)
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
