from __future__ import annotations

import importlib
import json
import os
import signal
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from reticent.core.errors import NetworkError
from reticent.core.plan import Plan, load_plan
from reticent.core.run import Run
from reticent.privacy.ledger import Budget, Ledger
from reticent.server.attempt import read_attempt
from reticent.server.exposition import exposed
from reticent.server.home import open_home
from reticent.server.journal import Journal
from reticent.server.operate import Operation, prepare_operation
from reticent.simulations.simulate import simulate

TESTS = Path(__file__).resolve().parent
EXAMPLE = TESTS.parent / "examples" / "deployment"
ROUNDS = 4
PLAN_FILE = EXAMPLE / "plan.toml"
PLAN = load_plan(PLAN_FILE, (f"federation.rounds={ROUNDS}", "teacher.epochs=1"))


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example's module, which starts and stops everything."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    monkeypatch.setenv("PYTHONPATH", str(TESTS))  # for `seeded_device`
    return importlib.import_module("loopback")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model of the same plan and the same seeds in a simulation that nothing happened to."""
    run = simulate(PLAN, tmp_path_factory.mktemp("simulated") / "run")
    return run.read_summary()["model"]


@pytest.fixture
def devices(tmp_path: Path, loopback: Any) -> Iterator[Any]:
    """A server that does not run yet, and two devices that wait for it."""
    running = loopback.Deployment(tmp_path, loopback.Processes(tmp_path), loopback.free_port())
    port = str(running.port)
    try:
        running.processes.run("cli", "reticent", "server", "init", running.server, "--port", port)
        policy = tmp_path / "policy.toml"
        policy.write_text("[budget]\nepsilon = 99.0\ndelta = 1e-5\n")
        running.reticent("enroll", *loopback.NAMES, "--policy", policy)
        loopback.start_superlink(running)  # which admits the devices
        running.processes.stop()
        for name in loopback.NAMES:
            loopback.start_device(running, name)
        yield running
    finally:
        running.processes.stop()


def operation(
    running: Any, after: Callable[[Operation, int], None], resume: bool = False, plan: Plan = PLAN
) -> Operation:
    """Prepare to serve the run; ``after`` is called when a round was committed."""
    holder: list[Operation] = []

    def progress(metrics: dict[str, Any]) -> None:
        after(holder[0], metrics["round"])

    made = prepare_operation(
        open_home(running.server), plan, running.run, resume, print, progress, "seeded_device:app"
    )
    holder.append(made)
    journal = Journal(made.run)
    if journal.fact("run") is None:
        journal.record("run", plan.digest[:16])  # as a simulation of the plan is called
    journal.close()
    return made


def kill_serverapp(operation: Operation) -> None:
    attempt = read_attempt(operation.run)
    assert attempt is not None and attempt.alive()
    os.kill(attempt.pid, signal.SIGKILL)


def kill_superlink(operation: Operation) -> None:
    (pid,) = superlinks(operation)
    os.kill(pid, signal.SIGKILL)


def superlinks(operation: Operation) -> list[int]:
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(operation.home.database).encode() in words:
            found.append(int(path.parent.name))
    return found


def both(operation: Operation) -> None:
    kill_superlink(operation)
    kill_serverapp(operation)


def check(running: Any, names: tuple[str, ...], model: str) -> None:
    """Every round once, every charge once, and the model that nothing happened to."""
    run = Run(running.run)
    assert [m["round"] for m in run.read_metrics()] == list(range(1, ROUNDS + 1))
    assert run.read_summary()["model"] == model
    for name in names:
        with Ledger.open(running.device(name) / "state") as ledger:
            ledger.verify()
            assert ledger.overview("device", Budget(99.0, 1e-5)).charges == ROUNDS


@pytest.mark.deployment
def test_a_run_goes_on_after_its_serverapp_was_killed(
    devices: Any, loopback: Any, undisturbed: str
) -> None:
    killed: list[int] = []

    def after(operation: Operation, number: int) -> None:
        if number == 1:
            with exposed(operation.run, port):
                text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
            assert "reticent_rounds_total 1\n" in text and "reticent_nodes_online 2\n" in text
            kill_serverapp(operation)
            killed.append(number)

    port = loopback.free_port()
    operation(devices, after).serve()
    assert killed == [1]
    check(devices, loopback.NAMES, undisturbed)
    status = json.loads(devices.reticent("status", "--json"))
    assert (status["run"]["state"], status["run"]["round"]) == ("finished", ROUNDS)
    assert status["server"]["superlink"] == "down"  # it was started here and ended with the run


@pytest.mark.faults
@pytest.mark.parametrize("kill", [kill_superlink, both])
def test_a_run_goes_on_after_its_superlink_was_killed(
    devices: Any, loopback: Any, undisturbed: str, kill: Callable[[Operation], None]
) -> None:
    def after(operation: Operation, number: int) -> None:
        if number in (1, 2):
            kill(operation)

    operation(devices, after).serve()
    check(devices, loopback.NAMES, undisturbed)


class Gone(BaseException):
    """The operator's own process went away."""


@pytest.mark.faults
def test_a_run_is_resumed_after_everything_was_killed(
    devices: Any, loopback: Any, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def after(operation: Operation, number: int) -> None:
        if number == 2:
            both(operation)
            raise Gone

    with pytest.raises(Gone):
        operation(devices, after).serve()
    operation(devices, lambda *_: None, resume=True).serve()
    check(devices, loopback.NAMES, undisturbed)


@pytest.mark.faults
def test_a_run_without_its_devices_fails_and_names_who_is_missing(
    devices: Any, loopback: Any
) -> None:
    devices.processes.stop()
    plan = load_plan(PLAN_FILE, ("federation.timeout=15",))
    with pytest.raises(
        NetworkError,
        match=r"0 clients are connected after 15 s, 2 are needed; not"
        r" connected: device0, device1",
    ):
        operation(devices, lambda *_: None, plan=plan).serve()


@pytest.mark.faults
def test_a_run_is_found_again_after_the_process_that_drives_it_was_killed(
    devices: Any, loopback: Any, tmp_path: Path
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
