from __future__ import annotations

import json
import os
import signal
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import loopback
import pytest
from federations import PLAN_FILE, accounts, federation, operation, plan_of, superlinks

from reticent.core.errors import NetworkError
from reticent.core.plan import load_plan
from reticent.core.run import Run
from reticent.server.attempt import read_attempt
from reticent.server.exposition import exposed
from reticent.server.home import open_home
from reticent.server.operate import Operation, prepare_operation
from reticent.simulations.simulate import simulate

ROUNDS = 4
PLAN = plan_of(ROUNDS)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model of the same plan and the same seeds in a simulation that nothing happened to."""
    run = simulate(PLAN, tmp_path_factory.mktemp("simulated") / "run")
    return run.read_summary()["model"]


@pytest.fixture
def devices(tmp_path: Path) -> Iterator[loopback.Deployment]:
    """A server that does not run yet, and two devices that wait for it."""
    with federation(tmp_path / "all", loopback.NAMES) as running:
        yield running


def kill_serverapp(operation: Operation) -> None:
    attempt = read_attempt(operation.run)
    assert attempt is not None and attempt.alive()
    os.kill(attempt.pid, signal.SIGKILL)


def kill_superlink(operation: Operation) -> None:
    (pid,) = superlinks(operation)
    os.kill(pid, signal.SIGKILL)


def both(operation: Operation) -> None:
    kill_superlink(operation)
    kill_serverapp(operation)


def check(running: loopback.Deployment, model: str) -> None:
    """Every round once, every charge once, and the model that nothing happened to."""
    run = Run(running.run)
    assert [m["round"] for m in run.read_metrics()] == list(range(1, ROUNDS + 1))
    assert run.read_summary()["model"] == model
    for account in accounts(running, loopback.NAMES).values():
        assert account == {"charges": ROUNDS, "released": set(range(1, ROUNDS + 1))}


@pytest.mark.deployment
def test_a_run_goes_on_after_its_serverapp_was_killed(
    devices: loopback.Deployment, undisturbed: str
) -> None:
    killed: list[int] = []

    def after(operation: Operation, metrics: dict[str, Any]) -> None:
        if metrics["round"] == 1:
            with exposed(operation.run, port):
                text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
            assert "reticent_rounds_total 1\n" in text and "reticent_nodes_online 2\n" in text
            kill_serverapp(operation)
            killed.append(metrics["round"])

    port = loopback.free_port()
    operation(devices, PLAN, after).serve()
    assert killed == [1]
    check(devices, undisturbed)
    status = json.loads(devices.reticent("status", "--json"))
    assert (status["run"]["state"], status["run"]["round"]) == ("finished", ROUNDS)
    assert status["server"]["superlink"] == "down"  # it was started here and ended with the run


@pytest.mark.faults
@pytest.mark.parametrize("kill", [kill_superlink, both])
def test_a_run_goes_on_after_its_superlink_was_killed(
    devices: loopback.Deployment, undisturbed: str, kill: Callable[[Operation], None]
) -> None:
    def after(operation: Operation, metrics: dict[str, Any]) -> None:
        if metrics["round"] in (1, 2):
            kill(operation)

    operation(devices, PLAN, after).serve()
    check(devices, undisturbed)


class Gone(BaseException):
    """The operator's own process went away."""


@pytest.mark.faults
def test_a_run_is_resumed_after_everything_was_killed(
    devices: loopback.Deployment, undisturbed: str
) -> None:
    def after(operation: Operation, metrics: dict[str, Any]) -> None:
        if metrics["round"] == 2:
            both(operation)
            raise Gone

    with pytest.raises(Gone):
        operation(devices, PLAN, after).serve()
    operation(devices, PLAN, lambda *_: None, resume=True).serve()
    check(devices, undisturbed)


@pytest.mark.faults
def test_a_run_without_its_devices_fails_and_names_who_is_missing(
    devices: loopback.Deployment,
) -> None:
    devices.processes.stop()
    plan = load_plan(PLAN_FILE, ("federation.timeout=15",))
    with pytest.raises(
        NetworkError,
        match=r"0 clients are connected after 15 s, 2 are needed; not"
        r" connected: device0, device1",
    ):
        operation(devices, plan, lambda *_: None).serve()


@pytest.mark.faults
def test_a_run_is_found_again_after_the_process_that_drives_it_was_killed(
    devices: loopback.Deployment, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN_FILE.read_text().replace("rounds = 2", f"rounds = {ROUNDS}"))
    words = ("reticent", "server", "run", plan, "--dir", devices.server, "--run", devices.run)
    devices.processes.start("operator", *words)
    metrics = devices.run / "metrics.jsonl"
    devices.processes.wait("a round", metrics.is_file, 300)
    operator = devices.processes.running.pop("operator")
    operator.kill()
    operator.wait()
    said: list[str] = []
    made = prepare_operation(
        open_home(devices.server), load_plan(plan), devices.run, True, said.append, lambda _: None
    )
    try:
        made.serve()
    finally:
        for pid in superlinks(made):
            os.kill(pid, signal.SIGTERM)
    assert "found its ServerApp running" in said
    assert [m["round"] for m in Run(devices.run).read_metrics()] == list(range(1, ROUNDS + 1))
    assert Run(devices.run).read_summary()["rounds"] == ROUNDS
