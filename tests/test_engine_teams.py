"""Runs on a team of workers: the model, figures and charges of a run in one process."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from reticent.cli.main import cli
from reticent.core.errors import NetworkError, PlanError
from reticent.core.plan import Plan, parse_plan
from reticent.core.run import Run
from reticent.privacy.ledger import Ledger
from reticent.simulations import processes
from reticent.simulations.admission import check_engine
from reticent.simulations.cores import quota, usable_cores
from reticent.simulations.devices import Devices, devices_for
from reticent.simulations.growing import GrowingTeam, saved
from reticent.simulations.player import Player
from reticent.simulations.processes import Processes
from reticent.simulations.runs import describe
from reticent.simulations.simulate import simulate
from reticent.simulations.teams import LOSSES, Backlog, Task, worker_count
from reticent.simulations.workers import BLOCK, WINDOW

SMALL = [
    "task.name=digits",
    "task.clients=62",
    "task.public_examples=200",
    "teacher.epochs=1",
    "student.epochs=1",
    "federation.clients_per_round=52",
    "federation.rounds=3",
    "federation.eval_every=1",
    "federation.sampling_rate=0.3",
]
VARIANTS = {
    "default": [],
    "changes": ['updates.delta=["int8", "ans"]'],
    "client": ["privacy.unit=client", "privacy.clip_quantile=0.5"],
    "feedback": [
        "privacy.trust=local",
        'updates.codec=["topk:0.05", "ans"]',
        "updates.error_feedback=true",
    ],
    "off": ["privacy=off"],
    "steps": [
        "privacy.trust=local",
        "federation.steps_per_round=3",
        "federation.local.scaffold=true",
        'federation.local.personal=["7"]',
    ],
}


class Here:
    """A team in this process whose workers forget everything whenever ``loses`` says so."""

    def __init__(
        self, devices: Devices, text: str, size: int, loses: Callable[[int], bool]
    ) -> None:
        self.size, self._loses, self._count = size, loses, 0
        self.window = WINDOW * size
        self._new = lambda: Player(devices, text)

    def __enter__(self) -> Here:
        self._players: list[tuple[Player, bytes]] = [(self._new(), b"") for _ in range(self.size)]
        return self

    def __exit__(self, *_: object) -> None:
        return

    def play(self, tasks: Iterable[Task]) -> Iterator[bytes]:
        backlog = Backlog(self.size, print)
        backlog.begin(tasks)
        while task := backlog.next():
            self._count += 1
            index = self._count % self.size
            player, has = self._players[index]
            if has is not task[0]:
                player.begin(task[0])
            self._players[index] = player, task[0]
            part = player.play(task[1])
            if self._loses(self._count):  # after all the work was done, and before it was told
                self._players[index] = self._new(), b""
                backlog.lost(task, "in a test")
            else:
                backlog.done()
                yield part


@pytest.fixture
def team_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def use(size: int, loses: Callable[[int], bool] = lambda count: False) -> None:
        def team(plan: Plan, devices: Devices, text: str, say: object, rounds: int) -> Here:
            return Here(devices, text, size, loses)

        monkeypatch.setattr("reticent.simulations.simulate._team", team)

    return use


def plan_of(*overrides: str) -> Plan:
    return parse_plan("", [*SMALL, "engine.workers=1", *overrides])


def figures(run: Run) -> list[dict[str, Any]]:
    return [{k: v for k, v in m.items() if k != "seconds"} for m in run.read_metrics()]


def spending(run: Run) -> list[tuple[tuple[str, ...], float]]:
    with Ledger.open(run.ledger) as ledger:
        ledger.verify()
        return [(row.devices, row.epsilon) for row in ledger.summary(1e-5)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_team_gives_the_model_figures_and_charges_of_one_process(
    variant: str, tmp_path: Path, team_of: Callable[..., None]
) -> None:
    plan = plan_of(*VARIANTS[variant])
    one = simulate(plan, tmp_path / "one")
    team_of(3, lambda count: count in (2, 5))
    many = simulate(plan, tmp_path / "many")
    assert many.read_summary()["model"] == one.read_summary()["model"]
    assert figures(many) == figures(one)
    assert spending(many) == spending(one)


def test_refusals_reach_the_round_from_a_team_as_from_one_process(
    tmp_path: Path, team_of: Callable[..., None]
) -> None:
    plan = plan_of("privacy.budget=7.0", "federation.retries=1", "federation.min_replies=52")
    found = []
    for name in ("one", "many"):
        with pytest.raises(NetworkError, match="the privacy budget of the device") as caught:
            simulate(plan, tmp_path / name)
        found.append((str(caught.value), figures(Run(tmp_path / name))))
        team_of(2)
    assert found[0] == found[1] and found[0][1]
    assert spending(Run(tmp_path / "one")) == spending(Run(tmp_path / "many"))


def test_a_run_that_was_stopped_goes_on_with_a_team_to_the_same_model(
    tmp_path: Path, team_of: Callable[..., None]
) -> None:
    plan = plan_of()
    whole = simulate(plan, tmp_path / "whole")
    with pytest.raises(InterruptedError):
        simulate(plan, tmp_path / "run", progress=_stop)
    team_of(2)
    run = simulate(plan, tmp_path / "run", resume=True)
    assert run.read_summary()["model"] == whole.read_summary()["model"]
    assert spending(run) == spending(whole)


def _stop(metrics: dict[str, Any]) -> None:
    raise InterruptedError


def test_killed_worker_processes_are_replaced_and_the_model_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is killed while it holds a share that it cannot finish, one when it has none."""
    one = simulate(plan_of(), tmp_path / "one")
    teams: list[Processes] = []
    start = Processes.__enter__
    monkeypatch.setattr(Processes, "__enter__", lambda team: teams.append(team) or start(team))

    def strike(metrics: dict[str, Any]) -> None:
        if metrics["round"] == 1:
            first, second = teams[0].pids
            os.kill(first, signal.SIGSTOP)
            threading.Timer(0.5, os.kill, (first, signal.SIGKILL)).start()
            os.kill(second, signal.SIGKILL)

    lines: list[str] = []
    two = plan_of("engine.workers=2")
    run = simulate(two, tmp_path / "two", progress=strike, say=lines.append)
    lost = "a worker ended with exit code -9; its share is played again"
    assert [line for line in lines if "ended" in line] == [lost, lost]
    assert run.read_summary()["model"] == one.read_summary()["model"]
    assert figures(run) == figures(one)
    assert spending(run) == spending(one), "a share that was played again was charged again"


DRIVER = """
import sys, time
from pathlib import Path

from reticent.core.plan import parse_plan
from reticent.simulations.devices import devices_for
from reticent.simulations.processes import Processes

plan = parse_plan("", sys.argv[1:])
with Processes(devices_for(plan, Path("nowhere")), plan.canonical(), 2, print) as team:
    while not team.ready():
        time.sleep(0.05)
    print(*team.pids, flush=True)
    time.sleep(600)
"""


def test_workers_of_a_process_that_is_killed_end_with_it_whatever_they_do() -> None:
    """They are stopped in here, and so look at their pipes as little as in a long share."""
    command = [sys.executable, "-c", DRIVER, *SMALL]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        workers = [int(pid) for pid in driver.stdout.readline().split()]
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        driver.kill()
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(map(lives, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [pid for pid in workers if lives(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def lives(pid: int) -> bool:
    """Return whether a process is there and has not ended; nobody may have collected it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_worker_whose_run_was_killed_before_it_began_does_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    signals: list[int] = []
    monkeypatch.setattr(processes, "end_with_parent", signals.append)
    monkeypatch.setattr("multiprocessing.parent_process", lambda: SimpleNamespace(pid=0))
    monkeypatch.setattr(processes, "Player", None)
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        plan = plan_of()
        processes._work(theirs, devices_for(plan, Path("nowhere")), plan.canonical())
        assert not ours.poll() and signals == [signal.SIGKILL]


def test_a_run_whose_workers_keep_dying_ends_with_the_reason() -> None:
    backlog = Backlog(2, print)
    for _ in range(2 + LOSSES):
        backlog.lost((b"", b""), "with exit code -9")
    with pytest.raises(NetworkError, match=r"13 workers ended .* exit code -9; committed rounds"):
        backlog.lost(None, "with exit code -9")


def test_a_machine_that_takes_its_workers_along_does_not_end_a_run_that_goes_on() -> None:
    """Sixteen at once, again and again: a share was done in between."""
    backlog = Backlog(32, print)
    for _ in range(5):
        for _ in range(16):
            backlog.lost((b"", b""), "in a test")
        backlog.done()


def test_a_share_that_ends_every_worker_ends_the_run(
    tmp_path: Path, team_of: Callable[..., None]
) -> None:
    """The others are done in between, until it is all that is left of the round."""
    team_of(2, lambda count: count > 3)
    with pytest.raises(NetworkError, match="13 workers ended"):
        simulate(plan_of(), tmp_path / "run")
    assert len(Run(tmp_path / "run").read_metrics()) == 1


def test_reticent_runs_shows_why_workers_ended_a_run(
    tmp_path: Path, team_of: Callable[..., None]
) -> None:
    team_of(2, lambda count: True)
    keys = [part for key in SMALL for part in ("--set", key)]
    done = CliRunner().invoke(cli, ["simulate", "--run", str(tmp_path / "run"), *keys])
    assert isinstance(done.exception, NetworkError) and done.exception.exit_code == 6
    row = describe(tmp_path / "run")
    assert row["state"] == "failed" and "workers ended" in row["problem"]


def test_lost_tasks_are_done_before_new_ones_are_begun() -> None:
    said: list[str] = []
    backlog = Backlog(1, said.append)
    backlog.begin([(b"w", b"1"), (b"w", b"2")])
    first = backlog.next()
    backlog.lost(first, "in a test")
    assert [backlog.next(), backlog.next(), backlog.next()] == [first, (b"w", b"2"), None]
    backlog.lost(None, "while it started")
    assert said == [
        "a worker ended in a test; its share is played again",
        "a worker ended while it started; another is started",
    ]


def test_files_that_clients_keep_are_not_looked_for_on_another_machine() -> None:
    kept = plan_of(*VARIANTS["feedback"])
    check_engine(kept)
    with pytest.raises(PlanError, match=r'engine.kind="ray": must be "inprocess"'):
        check_engine(plan_of(*VARIANTS["feedback"], "engine.kind=ray"))


def test_auto_is_one_worker_a_core_and_none_without_a_block() -> None:
    auto = plan_of("engine.workers=auto")
    assert [worker_count(auto, cores) for cores in (1, 2, 64)] == [1, 2, 4]
    assert worker_count(plan_of("engine.workers=7"), 2) == 7


@pytest.mark.parametrize("engine", [["engine.workers=2"], ["engine.kind=ray"]])
def test_no_workers_start_for_a_run_that_takes_the_first_replies(
    engine: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their order is that of one process; a fleet's clock knows who is first without it."""
    first = ["federation.enough=30", "federation.min_replies=29"]
    one = simulate(plan_of(*first), tmp_path / "one")
    monkeypatch.setattr("reticent.simulations.simulate.Processes", None)
    monkeypatch.setattr("reticent.simulations.ray_engine.RayTeam", None)
    said: list[str] = []
    many = simulate(plan_of(*first, *engine), tmp_path / "many", say=said.append)
    assert many.read_summary()["model"] == one.read_summary()["model"]
    assert figures(many) == figures(one)
    assert any("trained in this process: federation.enough" in line for line in said)
    assert worker_count(plan_of(*first, "engine.workers=3"), 4) == 1
    assert worker_count(plan_of(*first, "engine.workers=3", "fleet.jitter=0.0"), 4) == 3


def grown(monkeypatch: pytest.MonkeyPatch, start: float, cores: int = 2) -> list[GrowingTeam]:
    """Make runs see ``cores``, and saving ``start`` seconds enough; return the teams they get."""
    monkeypatch.setattr("reticent.simulations.growing.START", start)
    monkeypatch.setattr("reticent.simulations.simulate.usable_cores", lambda: cores)
    teams: list[GrowingTeam] = []
    enter = GrowingTeam.__enter__
    monkeypatch.setattr(GrowingTeam, "__enter__", lambda team: teams.append(team) or enter(team))
    return teams


@pytest.mark.parametrize(("start", "size"), [(0.0, 2), (1e9, 1)])
def test_a_team_that_grows_while_it_plays_gives_the_model_of_one_process(
    start: float, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = simulate(plan_of(), tmp_path / "one")
    teams = grown(monkeypatch, start)
    lines: list[str] = []

    def wait(metrics: dict[str, Any]) -> None:
        """Let the others come between the first round and the second."""
        deadline = time.monotonic() + 60
        while metrics["round"] == 1 and teams[0].size < size and time.monotonic() < deadline:
            time.sleep(0.05)

    plan = plan_of("engine.workers=auto")
    run = simulate(plan, tmp_path / "grown", say=lines.append, progress=wait)
    assert teams[0].size == size
    assert any("2 worker processes of one thread each" in line for line in lines) == (size > 1)
    assert run.read_summary()["model"] == one.read_summary()["model"]
    assert figures(run) == figures(one)
    assert spending(run) == spending(one)


def test_a_team_whose_processes_end_before_they_begin_stays_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those do of a script that is not guarded by ``if __name__ == "__main__"``."""
    one = simulate(plan_of(), tmp_path / "one")
    teams = grown(monkeypatch, 0.0)
    monkeypatch.setattr("reticent.simulations.processes._work", slice)  # returns at once
    lines: list[str] = []

    def wait(metrics: dict[str, Any]) -> None:
        deadline = time.monotonic() + 60
        while not any("ended" in line for line in lines) and time.monotonic() < deadline:
            assert teams[0].size == 1
            time.sleep(0.05)

    plan = plan_of("engine.workers=auto")
    run = simulate(plan, tmp_path / "alone", say=lines.append, progress=wait)
    (said,) = (line for line in lines if "ended" in line)
    assert said.startswith("a worker ended with exit code 0 before it began")
    assert run.read_summary()["model"] == one.read_summary()["model"]
    assert spending(run) == spending(one)


def test_a_team_whose_processes_cannot_be_started_stays_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a limit on processes or open files is reached; the first of two was started."""
    one = simulate(plan_of(), tmp_path / "one")
    grown(monkeypatch, 0.0)
    begun = limited(monkeypatch, 1)
    lines: list[str] = []
    run = simulate(plan_of("engine.workers=auto"), tmp_path / "alone", say=lines.append)
    (said,) = (line for line in lines if "cannot be started" in line)
    assert "temporarily unavailable; clients go on being trained in this process" in said
    assert [process.exitcode for process in begun] == [-signal.SIGTERM]
    assert run.read_summary()["model"] == one.read_summary()["model"]
    assert spending(run) == spending(one)


def test_workers_that_were_asked_for_and_cannot_be_started_end_the_run_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(monkeypatch, 0)
    with pytest.raises(NetworkError, match=r"process cannot be started: .* unavailable"):
        simulate(plan_of("engine.workers=2"), tmp_path / "run")


def limited(monkeypatch: pytest.MonkeyPatch, most: int) -> list[SpawnProcess]:
    """Let no more than so many processes start; return those that do."""
    begun: list[SpawnProcess] = []
    start = SpawnProcess.start

    def limit(process: SpawnProcess) -> None:
        if len(begun) == most:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        start(process)
        begun.append(process)

    monkeypatch.setattr(SpawnProcess, "start", limit)
    return begun


def test_a_resumed_run_starts_processes_for_the_rounds_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []

    def saved(clients: int, pace: float, workers: int) -> float:
        left.append(clients)
        return 0.0

    monkeypatch.setattr("reticent.simulations.growing.saved", saved)
    grown(monkeypatch, 0.0)
    plan = plan_of("engine.workers=auto")
    with pytest.raises(InterruptedError):
        simulate(plan, tmp_path / "run", progress=_stop)
    begun = len(left)
    simulate(plan, tmp_path / "run", resume=True)
    assert (left[0], left[begun]) == (3 * 52 - 4 * BLOCK, 2 * 52 - 4 * BLOCK)
    assert (begun, len(left) - begun) == (1, 2)  # the second half of a round; and then a round


class Told:
    """A player that takes ``new`` seconds to begin, and those of ``takes`` for its shares."""

    now = 0.0
    new = 100.0

    def __init__(self, takes: Callable[[int], float]) -> None:
        self._takes = takes
        self._shares = 0

    def __call__(self, *about: object) -> Told:
        self.now += self.new
        return self

    def begin(self, work: bytes) -> None:
        self.now += self.new

    def play(self, share: bytes) -> bytes:
        self.now += self._takes(self._shares)
        self._shares += 1
        return share


def told(
    monkeypatch: pytest.MonkeyPatch, cohort: int, rounds: int, takes: Callable[[int], float]
) -> list[str]:
    """Return what a growing team says that plays ``rounds`` of ``cohort`` clients."""
    player = Told(takes)
    lines: list[str] = []
    monkeypatch.setattr("reticent.simulations.growing.Player", player)
    monkeypatch.setattr("reticent.simulations.growing.perf_counter", lambda: player.now)
    monkeypatch.setattr("reticent.simulations.growing.Processes", NeverReady)
    plan = plan_of(f"federation.clients_per_round={cohort}")
    devices = devices_for(plan, Path("nowhere"))
    with GrowingTeam(devices, "", plan, 2, rounds, lines.append) as team:
        for number in range(rounds):
            list(team.play(dealt(team, cohort, number)))
    return lines


def dealt(team: GrowingTeam, cohort: int, number: int) -> Iterator[Task]:
    work, clients = str(number).encode(), list(range(cohort))
    while clients:
        share, clients = clients[: team.window], clients[team.window :]
        yield work, json.dumps(["train", "", [], share, [], {}]).encode()


class NeverReady:
    """Processes that import for ever."""

    size = 2

    def __init__(self, *about: object) -> None:
        pass

    def __enter__(self) -> NeverReady:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def ready(self) -> bool:
        return False


def test_what_is_new_at_first_starts_no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of 0.04 s; the first blocks take a second more."""
    assert told(monkeypatch, 20, 30, lambda share: 0.04 if share else 1.04) == []


def test_a_team_grows_for_the_clients_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins in the second round; a cohort's last share has one client, and is not timed."""
    lines = told(monkeypatch, 27, 30, lambda share: 13.0)
    assert lines == ["2 worker processes of one thread each: one would take another 378 s"]


def test_every_client_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr("reticent.simulations.growing.saved", lambda n, *_: left.append(n) or 0.0)
    told(monkeypatch, 27, 4, lambda share: 13.0)
    assert left == [3 * 27 - 26, 27, 0]  # in the second round, then after whole ones


@pytest.mark.parametrize(
    ("limits", "cores"),
    [
        ({}, 2.0**20),
        ({"a/b": "max 100000"}, 2.0**20),
        ({"a/b": "150000 100000"}, 1.5),
        ({"a": "50000 100000", "a/b": "max 100000"}, 0.5),
        ({"a": "300000 100000", "a/b": "200000 100000", "": "100000 50000"}, 2.0),
        ({"a/b": "1 0"}, 2.0**20),
        ({"a/b": "?"}, 2.0**20),
    ],
)
def test_a_quota_is_the_least_of_all_groups_above(
    limits: dict[str, str], cores: float, tmp_path: Path
) -> None:
    own = tmp_path / "cgroup"
    own.write_text("1:cpu:/x\n0::/a/b\n")
    for name in ("", "a", "a/b"):
        (tmp_path / "fs" / name).mkdir(parents=True, exist_ok=True)
    for name, text in limits.items():
        (tmp_path / "fs" / name / "cpu.max").write_text(text + "\n")
    assert quota(tmp_path / "fs", own) == cores
    own.write_text("1:cpu:/x\n")  # version 1 alone
    assert quota(tmp_path / "fs", own) == 2.0**20
    assert quota(tmp_path / "fs", tmp_path / "none") == 2.0**20


def test_a_quota_below_one_core_leaves_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for found, cores in ((0.5, 1), (1.9, 1), (2.0**20, 4)):
        monkeypatch.setattr("reticent.simulations.cores.quota", lambda *_, found=found: found)
        monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
        assert usable_cores() == cores


def test_more_processes_start_only_when_they_save_more_than_they_take() -> None:
    assert saved(1000, 0.01, 2) == pytest.approx(5.0)
    assert saved(1000, 0.01, 4) == pytest.approx(7.5)
    assert saved(0, 0.01, 4) == 0.0
