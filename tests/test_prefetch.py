"""Examples that are loaded while others are trained: the same replies, charges and calls."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import watched_tasks
from test_cohort import CLIENTS, MISSING, NOISE, World, payload, plan_of
from test_engine_teams import SMALL, figures, spending
from watched_tasks import DIARY, LOADS, Diary, Watched

from reticent.client import round as client_round
from reticent.client.order import round_event
from reticent.client.training import LocalTrainer
from reticent.core.errors import DataError
from reticent.core.plan import Plan, parse_plan
from reticent.core.protocol import Refusal
from reticent.core.tasks import Examples
from reticent.simulations import prefetch
from reticent.simulations.prefetch import THREAD, Prefetch
from reticent.simulations.simulate import simulate
from reticent.simulations.workers import BLOCK

HERE = "MainThread"
PATIENCE = 60.0  # seconds after which a test that would hang fails
ALL, FIRST_TWO = set(range(CLIENTS)), set(range(2 * BLOCK))


@pytest.fixture(autouse=True)
def fresh() -> None:
    vars(DIARY).update(vars(Diary()))
    prefetch._say.cache_clear()
    prefetch._jobs.cache_clear()


def ahead_is(on: bool) -> str:
    return f"engine.prefetch={str(on).lower()}"


def own(task: str, *overrides: str, ahead: bool = True) -> Plan:
    return plan_of(NOISE, f"task.name=watched_tasks:{task}", ahead_is(ahead), *overrides)


def charged(world: World, name: str, odd: dict[int, dict[str, Any]] | None = None) -> Any:
    """Return a site that has charged a round to every client, and the messages of that."""
    site, messages = world.site(name), list(world.messages(odd=odd))
    site.charge(messages)
    return site, messages


def answers(
    world: World, name: str, odd: dict[int, dict[str, Any]] | None = None
) -> list[bytes | Refusal]:
    site, messages = charged(world, name, odd)
    found = [payload(reply) for reply in site.answer_many(messages)]
    site.ledger.close()
    return found


def while_training(monkeypatch: pytest.MonkeyPatch, do: Callable[[], None]) -> None:
    """Have ``do`` done in the thread that trains, whenever it begins to."""
    train = LocalTrainer.pseudo_gradients

    def patched(self: LocalTrainer, *args: Any) -> Any:
        do()
        return train(self, *args)

    monkeypatch.setattr(LocalTrainer, "pseudo_gradients", patched)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["privacy.unit=client"],
        ["privacy.trust=local", 'updates.codec=["topk"]', "updates.error_feedback=true"],
        [
            *("privacy.trust=local", "federation.steps_per_round=3"),
            *("federation.local.scaffold=true", 'federation.local.personal=["6"]'),
        ],
    ],
)
def test_replies_and_charges_are_those_without_it(overrides: list[str], tmp_path: Path) -> None:
    """Also of clients without data, with data that cannot be read or trained on, and odd orders."""
    odd: dict[int, dict[str, Any]] = {9: {"clip": 7.0}, 12: {"round": 2}}
    found = []
    for on in (True, False):
        world = World(tmp_path, plan_of(NOISE, *overrides, ahead_is(on)))
        found.append((answers(world, str(on), odd), world.rows(str(on))))
    assert found[0] == found[1]
    assert found[0][0][MISSING] is Refusal.NO_DATA and found[0][0][9] is Refusal.BAD_ORDER


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_ends_as_without_it(workers: int, tmp_path: Path) -> None:
    keys = [*SMALL, f"engine.workers={workers}"]
    one, other = (
        simulate(parse_plan("", [*keys, ahead_is(on)]), tmp_path / str(on)) for on in (True, False)
    )
    assert one.read_summary()["model"] == other.read_summary()["model"]
    assert figures(one) == figures(other) and spending(one) == spending(other)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_goes_on_without_it_to_the_same_model(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(on: bool) -> Plan:
        few = ("federation.rounds=2", "teacher.epochs=1", "student.epochs=1")
        return own("telling", *few, f"engine.workers={workers}", ahead=on)

    def stop(_: dict[str, Any]) -> None:
        raise InterruptedError

    def threads() -> set[str]:
        names = set(told.read_text(encoding="utf-8").split())
        told.unlink()
        return names

    told = tmp_path / "told"
    monkeypatch.setenv(LOADS, str(told))
    whole = simulate(plan(True), tmp_path / "whole")
    with pytest.raises(InterruptedError):
        simulate(plan(True), tmp_path / "run", progress=stop)
    assert threads() == {THREAD}
    run = simulate(plan(False), tmp_path / "run", resume=True)
    assert threads() == {HERE}
    assert run.read_summary()["model"] == whole.read_summary()["model"]
    assert spending(run) == spending(whole)


def test_while_a_block_is_trained_the_next_one_is_loaded_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer waits here until the thread is done, so what it then sees is all it did."""
    site, messages = charged(World(tmp_path, own("watched")), "site")
    loaded: list[set[int]] = []
    held: list[int] = []
    inputs: list[weakref.ref[torch.Tensor]] = []
    load = Watched.client

    def followed(self: Watched, index: int) -> Examples:
        examples = load(self, index)
        inputs.append(weakref.ref(examples.inputs))
        return examples

    def alive() -> int:
        gc.collect()  # the error of a client that cannot be trained on holds its block in a cycle
        return sum(one() is not None for one in inputs)

    def look() -> None:
        site._prefetch.wait()
        loaded.append(set(DIARY.clients(THREAD)))
        held.append(alive())

    monkeypatch.setattr(Watched, "client", followed)
    while_training(monkeypatch, look)
    for _ in site.answer_many(messages):
        pass
    assert loaded[0] == FIRST_TWO and {len(one) for one in loaded} == {2 * BLOCK, CLIENTS}
    assert not DIARY.clients(HERE)
    assert max(held) <= 2 * BLOCK
    assert alive() == 0


@pytest.mark.parametrize("run", [False, True])
def test_loading_overlaps_training(
    run: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits for the other to have begun: one after the other, they would not meet.

    Where a run deals its clients out, the server has charged them, and a worker sees the grants.
    """
    training, loading, met = threading.Event(), threading.Event(), list[bool]()

    def load(index: int) -> None:
        if index == BLOCK:
            loading.set()
            met.append(training.wait(PATIENCE))

    def train() -> None:
        training.set()
        met.append(loading.wait(PATIENCE))

    DIARY.hook = load
    while_training(monkeypatch, train)
    if run:
        few = ("federation.rounds=1", "teacher.epochs=1", "student.epochs=1")
        simulate(own("watched", *few, "engine.workers=auto"), tmp_path / "run")
    else:
        answers(World(tmp_path, own("watched")), "site")
    assert all(met) and len(met) >= 2


def test_a_task_is_called_by_one_thread_at_a_time(tmp_path: Path) -> None:
    """Also where a block falls apart, so that some are loaded after others were trained."""
    DIARY.hook = lambda _: time.sleep(0.005)
    odd: dict[int, dict[str, Any]] = {i: {"round": 2} for i in (4, 5, 6, 12, 13)}
    found = answers(World(tmp_path, own("watched")), "site", odd)
    assert sum(isinstance(one, bytes) for one in found) == CLIENTS - 2
    assert not DIARY.clients(HERE) and DIARY.overlaps == 0


def test_the_first_thread_waits_before_it_asks_a_task_itself() -> None:
    """Where a task does not bear the second thread while that is at the next block."""
    ahead, task = Prefetch(), watched_tasks.Bound(early=True)
    ahead.turn([1])
    ahead.take(task, 0)  # fails in the thread
    ahead._suits = True
    DIARY.hook = lambda index: time.sleep(0.05 if index == 1 else 0)
    ahead.start(task)
    ahead._suits = False
    ahead.take(task, 2)
    assert DIARY.overlaps == 0 and [index for index, _ in DIARY.loads] == [0, 0, 1, 2]


def test_between_replies_the_task_is_left_alone(tmp_path: Path) -> None:
    site, messages = charged(World(tmp_path, own("watched")), "site")
    DIARY.hook = lambda _: time.sleep(0.005)
    for _ in site.answer_many(messages):
        assert not DIARY.inside.locked()
        assert set(DIARY.clients(THREAD)) in (FIRST_TWO, ALL)


@pytest.mark.parametrize("kind", ["joined", "drawing"])
def test_torchs_generator_is_left_alone_while_a_task_is_asked(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ``client`` may draw from it: where the student does so too, they take turns."""
    entered, trained, moved = threading.Event(), threading.Event(), list[bool]()
    train, restore = LocalTrainer.pseudo_gradients, torch.set_rng_state

    def load(index: int) -> None:
        if index == BLOCK:
            entered.set()
            trained.wait(PATIENCE)

    def followed(self: LocalTrainer, *given: Any) -> Any:
        if site._prefetch._ahead is not None:
            assert entered.wait(PATIENCE)
        try:
            return train(self, *given)
        finally:
            trained.set()

    def moving(state: torch.Tensor) -> None:
        moved.append(DIARY.inside.locked())
        restore(state)

    DIARY.hook = load
    monkeypatch.setattr(LocalTrainer, "pseudo_gradients", followed)
    monkeypatch.setattr(torch, "set_rng_state", moving)
    keys = ("privacy.trust=local", "federation.steps_per_round=2")
    site, messages = charged(World(tmp_path, own(kind, *keys)), "site")
    assert sum(isinstance(payload(m), bytes) for m in site.answer_many(messages)) == CLIENTS - 2
    assert entered.is_set() and moved and not any(moved)


def test_a_task_that_does_not_bear_a_second_thread_is_asked_in_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once, and the replies are those of a run without a second thread."""
    ahead = answers(World(tmp_path, own("bound_early")), "ahead")
    assert DIARY.clients(THREAD) == [0]
    assert set(DIARY.clients(HERE)) == ALL
    assert answers(World(tmp_path, own("bound_early", ahead=False)), "in turn") == ahead
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "engine.prefetch=false" in said


def test_a_connection_that_a_client_opens_serves_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ahead = answers(World(tmp_path, own("bound_late")), "ahead")
    assert set(DIARY.clients(THREAD)) == ALL and not DIARY.clients(HERE) and not caplog.records
    assert answers(World(tmp_path / "2", own("bound_late")), "again") == ahead  # the task is kept
    assert ahead[MISSING] is Refusal.NO_DATA
    assert sum(isinstance(one, bytes) for one in ahead) == CLIENTS - 2
    client_round._site.cache_clear()  # or a connection of the other thread is asked in this one
    assert answers(World(tmp_path, own("bound_late", ahead=False)), "in turn") == ahead


def test_a_client_whose_data_cannot_be_read_does_not_end_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def unreadable(index: int) -> None:
        if index == BLOCK + 1:
            raise DataError("cannot be read")

    DIARY.hook = unreadable
    found = answers(World(tmp_path, own("watched")), "site")
    assert found[MISSING] is found[BLOCK + 1] is Refusal.NO_DATA
    assert set(DIARY.clients(THREAD)) == ALL
    assert not DIARY.clients(HERE) and not caplog.records


def test_only_clients_whose_round_is_charged_are_loaded(tmp_path: Path) -> None:
    world = World(tmp_path / "rich", own("watched"))
    answers(world, "site")
    spent, event = world.rows("site")[0][1], round_event(world.plan, 1.0)
    world, poor = World(tmp_path, own("watched", f"privacy.budget={spent * 1.05}")), {2, 9, 10, 17}
    before = world.site("site")
    for client in poor:
        before.ledger.charge(f"client-{client}", "other", 1, event, before._devices.budget)
    before.ledger.close()
    DIARY.loads.clear()
    found = answers(world, "site")
    assert {i for i, one in enumerate(found) if one is Refusal.BUDGET} == poor
    assert {index for index, _ in DIARY.loads} == ALL - poor


def test_without_a_charge_nothing_is_loaded_ahead(tmp_path: Path) -> None:
    world = World(tmp_path, own("watched"))
    next(iter(world.site("site").answer_many(world.messages())))
    assert {index for index, _ in DIARY.loads} == set(range(BLOCK))


def test_torch_has_as_many_threads_there_as_where_clients_are_trained() -> None:
    found: list[int] = []
    DIARY.hook = lambda _: found.append(torch.get_num_threads())
    ahead, task, before = Prefetch(), Watched(), torch.get_num_threads()
    try:
        for threads in (2, 1):
            torch.set_num_threads(threads)
            ahead.take(task, 0)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found == [2, 1]


def test_an_interrupted_run_does_not_wait_for_storage_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "_GRACE", 0.01)
    entered, comes = threading.Event(), threading.Event()

    def hang(index: int) -> None:
        if index == BLOCK:
            entered.set()
            comes.wait(PATIENCE)

    def interrupt() -> None:
        assert entered.wait(PATIENCE)
        raise KeyboardInterrupt

    DIARY.hook = hang
    while_training(monkeypatch, interrupt)
    site, messages = charged(World(tmp_path, own("watched")), "site")
    with pytest.raises(KeyboardInterrupt):
        list(site.answer_many(messages))
    hung = site._prefetch._latest
    assert not hung.done.is_set()
    Prefetch().take(Watched(), 0)  # other runs go on
    comes.set()
    assert hung.done.wait(PATIENCE)
    assert max(DIARY.clients(THREAD)) == BLOCK  # those that were left were given up


ENDS = """
import os, signal, threading
from reticent.simulations.prefetch import Prefetch

entered = threading.Event()

class Hanging:
    def client(self, index):
        entered.set()
        threading.Event().wait()

ahead = Prefetch()
ahead.turn([1])
ahead.start(Hanging())
entered.wait()
try:
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait()
finally:
    ahead.rest()
"""


def test_a_process_ends_although_its_storage_hangs() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import signal\nsignal.signal(2, signal.default_int_handler){ENDS}",
        ],
        timeout=PATIENCE,
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGINT and b"KeyboardInterrupt" in done.stderr


def test_all_runs_of_a_process_have_one_thread() -> None:
    """So that what a task opened in it can be used again, and none is left behind."""
    before = set(threading.enumerate())
    for _ in range(3):
        Prefetch().take(Watched(), 0)
    assert len(set(threading.enumerate()) - before) == 1
