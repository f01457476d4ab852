"""The journal: whole rounds or none, and damage that is named."""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from reticent.core.errors import RunError
from reticent.core.plan import parse_plan
from reticent.core.run import Run, create_run
from reticent.server.journal import Journal
from reticent.server.optimizer import ServerState


def state_of(number: int) -> ServerState:
    rng = np.random.default_rng(number)
    weights, average = rng.standard_normal((2, 20)).astype(np.float32)
    first, second = rng.standard_normal((2, 20))
    return ServerState(number, weights, average, first, second)


def metrics_of(number: int) -> dict[str, Any]:
    return {"round": number, "accuracy": 0.1 * number, "epsilon": None}


def commit(journal: Journal, number: int, clients: tuple[str, ...] = ("2", "3")) -> None:
    journal.commit(state_of(number), metrics_of(number), list(clients), f"{number}:head")


def assert_same(given: ServerState | None, expected: ServerState) -> None:
    assert given is not None and given.round == expected.round
    assert given.clip == expected.clip
    for name, array in vars(expected).items():
        if array is None:
            assert getattr(given, name) is None
        elif name not in ("round", "clip"):
            found = getattr(given, name)
            assert found.dtype == array.dtype and np.array_equal(found, array)


@pytest.mark.parametrize("clip", [None, 0.1, 1 / 3, 5e-324, 1e300])
def test_the_bound_of_the_next_round_comes_back_to_the_last_bit(
    journal: Journal, run: Run, clip: float | None
) -> None:
    state = replace(state_of(1), clip=clip)
    journal.commit(state, metrics_of(1), ["2"], None)
    assert_same(journal.latest(), state)
    held = load_file(checkpoint(run, 1))
    assert ("clip" in held) == (clip is not None), "without a bound a checkpoint is as before"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return create_run(tmp_path / "run", parse_plan(""))


@pytest.fixture
def journal(run: Run) -> Iterator[Journal]:
    journal = Journal(run)
    yield journal
    journal.close()


def checkpoint(run: Run, number: int) -> Path:
    return run.checkpoints / f"round-{number:06d}.safetensors"


def test_a_new_journal_is_empty(journal: Journal) -> None:
    assert journal.latest() is None and journal.anchor() is None
    assert journal.metrics() == [] and journal.participations() == {}


def test_what_was_committed_comes_back_after_reopening(run: Run, journal: Journal) -> None:
    for number in (1, 2, 3):
        commit(journal, number, ("2", str(2 + number)))
    again = Journal(run)
    assert_same(again.latest(), state_of(3))
    assert again.anchor() == "3:head"
    assert again.metrics() == run.read_metrics() == [metrics_of(n) for n in (1, 2, 3)]
    assert again.participations() == {"2": 3, "3": 1, "4": 1, "5": 1}
    again.close()


def test_a_round_counts_for_everyone_asked_and_as_used_for_those_in_time(journal: Journal) -> None:
    journal.commit(state_of(1), metrics_of(1), ["2"], None, ["2", "3"])
    journal.commit(state_of(2), metrics_of(2), ["3"], None, ["2", "3", "4"])
    assert journal.participations() == {"2": 1, "3": 1, "4": 0}
    assert journal.asked() == {"2": 2, "3": 2, "4": 1}


def test_who_was_asked_before_a_round_failed_is_counted_once_with_those_asked_again(
    run: Run, journal: Journal
) -> None:
    journal.commit(state_of(1), metrics_of(1), ["2"], None, ["2", "3"])
    assert journal.open(["2", "3"]) == {"2", "3"}
    again = Journal(run)  # as after a crash
    assert again.asked() == {"2": 1, "3": 1} and again.charged() == {"2": 2, "3": 2}
    assert again.open(["3", "4"]) == {"2", "3", "4"}
    again.commit(state_of(2), metrics_of(2), ["4"], None, ["3", "4"])
    assert again.asked() == again.charged() == {"2": 2, "3": 2, "4": 1}
    assert again.participations() == {"2": 1, "3": 0, "4": 1}
    again.close()


def test_the_most_charged_is_the_largest_of_what_all_have_charged(journal: Journal) -> None:
    """Of a run without rounds, of an open round with old and new clients, and of committed ones."""
    draw = random.Random(5)
    ahead = 0
    assert journal.most_charged() == 0
    for number in range(1, 41):
        who = [str(draw.randrange(12)) for _ in range(draw.randrange(4))]
        journal.open(who)
        assert journal.most_charged() == max(journal.charged().values(), default=0)
        ahead += journal.most_charged() > max(journal.asked().values(), default=0)
        used = [client for client in who if draw.random() < 0.5]
        journal.commit(state_of(number), metrics_of(number), used, None, who)
        assert journal.most_charged() == max(journal.charged().values(), default=0)
    assert 0 < ahead < 40, "the open round made the difference sometimes, and sometimes not"


def test_only_the_last_two_checkpoints_are_kept(run: Run, journal: Journal) -> None:
    for number in range(1, 6):
        commit(journal, number)
    assert sorted(run.checkpoints.iterdir()) == [checkpoint(run, 4), checkpoint(run, 5)]


def test_stored_arrays_come_back_and_are_checked(run: Run, journal: Journal) -> None:
    arrays = {"a": np.arange(5, dtype=np.float32)}
    assert journal.restore("student") is None
    journal.store("student", arrays)
    restored = journal.restore("student")
    assert restored is not None and np.array_equal(restored["a"], arrays["a"])
    save_file({"a": np.zeros(5, dtype=np.float32)}, run.checkpoints / "student.safetensors")
    with pytest.raises(RunError, match="altered"):
        journal.restore("student")


def test_a_fact_is_recorded_once(journal: Journal) -> None:
    journal.record("run", "a")
    assert journal.fact("run") == "a" and journal.fact("other") is None
    with pytest.raises(RunError):
        journal.record("run", "b")
    assert journal.fact("run") == "a"


def test_what_a_process_left_half_made_is_made_again(run: Run) -> None:
    """Facts that belong together are recorded one by one, and any of them may be the last."""
    for _ in range(2):
        journal = Journal(run)
        journal.store("teacher", {"a": np.zeros(3)})
        journal.revise("accuracy:teacher", "0.5")
        journal.close()
    journal = Journal(run)
    assert journal.fact("accuracy:teacher") == "0.5"
    restored = journal.restore("teacher")
    assert restored is not None and np.array_equal(restored["a"], np.zeros(3))
    journal.close()


def test_a_journal_that_was_lost_is_not_begun_anew(run: Run, journal: Journal) -> None:
    """Else whoever took part in the lost rounds would charge them again, and be counted once."""
    commit(journal, 1)
    journal.close()
    run.journal.write_bytes(b"")
    other = Journal(run)
    with pytest.raises(RunError, match="the journal was lost or replaced"):
        other.rewrite_metrics()
    other.close()
    assert run.read_metrics() == [metrics_of(1)]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def forge(path: Path) -> None:
    arrays = {k: v for k, v in vars(state_of(9)).items() if isinstance(v, np.ndarray)}
    save_file(arrays, path)  # a whole checkpoint, but not the one that was committed


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (flip, "truncated or altered"),
    (forge, "truncated or altered"),
    (lambda p: p.write_bytes(p.read_bytes()[:-1]), "truncated or altered"),
    (lambda p: p.write_bytes(b""), "truncated or altered"),
    (lambda p: p.unlink(), "cannot be read"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGE)
def test_a_damaged_checkpoint_is_an_error_that_names_it(
    run: Run, journal: Journal, damage: Callable[[Path], object], words: str
) -> None:
    commit(journal, 1)
    commit(journal, 2)
    damage(checkpoint(run, 2))
    with pytest.raises(RunError, match=words) as caught:
        journal.latest()
    assert checkpoint(run, 2).name in str(caught.value)


@pytest.mark.parametrize("size", [100, 50_000])
def test_garbage_instead_of_a_journal_is_an_error(run: Run, size: int) -> None:
    run.journal.write_bytes(np.random.default_rng(0).bytes(size))
    with pytest.raises(RunError, match=r"journal\.db"):
        Journal(run).latest()


def test_garbage_inside_a_journal_is_an_error(run: Run) -> None:
    journal = Journal(run)
    for number in range(1, 4):
        commit(journal, number)
    journal.close()
    data = bytearray(run.journal.read_bytes())
    data[4096:] = np.random.default_rng(0).bytes(len(data) - 4096)  # all pages but the first
    run.journal.write_bytes(data)
    damaged = Journal(run)
    with pytest.raises(RunError, match=r"journal\.db"):
        damaged.latest()
    with pytest.raises(RunError, match=r"journal\.db"):
        damaged.metrics()
    damaged.close()


def test_metrics_that_are_not_json_are_an_error(run: Run, journal: Journal) -> None:
    commit(journal, 1)
    with sqlite3.connect(run.journal) as database:
        database.execute("UPDATE rounds SET metrics = 'garbage'")
    database.close()
    with pytest.raises(RunError, match=r"journal\.db"):
        journal.rewrite_metrics()
    assert run.read_metrics() == [metrics_of(1)]


def test_a_round_that_was_not_recorded_did_not_happen(run: Run, journal: Journal) -> None:
    commit(journal, 1)
    checkpoint(run, 2).write_bytes(checkpoint(run, 1).read_bytes())
    checkpoint(run, 3).write_bytes(b"half of a file")
    assert_same(journal.latest(), state_of(1))
    commit(journal, 2)  # and is overwritten when it does happen
    assert_same(journal.latest(), state_of(2))


def test_a_round_is_committed_once_and_whole(run: Run, journal: Journal) -> None:
    commit(journal, 1)
    with pytest.raises(RunError):
        commit(journal, 1)
    assert journal.participations() == {"2": 1, "3": 1}
    assert_same(journal.latest(), state_of(1))
    with pytest.raises(
        (RunError, UnicodeEncodeError)
    ):  # a client's name that SQLite cannot hold stops the round
        journal.commit(state_of(2), metrics_of(2), ["4", "5\ud800"], None)
    assert_same(journal.latest(), state_of(1))
    assert journal.participations() == {"2": 1, "3": 1}
    assert run.read_metrics() == [metrics_of(1)]


CRASHES: list[Callable[[Path], object]] = [
    lambda p: p.write_text(json.dumps(metrics_of(1)) + "\n"),  # the last line is not there yet
    lambda p: p.write_text(p.read_text()[:-5]),  # half of the last line is
    lambda p: p.write_text(p.read_text() + json.dumps(metrics_of(3)) + "\n"),  # one too many
    lambda p: p.unlink(),
]


@pytest.mark.parametrize("crash", CRASHES)
def test_metrics_are_rewritten_from_the_journal(
    run: Run, journal: Journal, crash: Callable[[Path], object]
) -> None:
    commit(journal, 1)
    commit(journal, 2)
    whole = run.metrics.read_bytes()
    crash(run.metrics)
    journal.rewrite_metrics()
    assert run.metrics.read_bytes() == whole
    commit(journal, 3)
    assert run.read_metrics() == [metrics_of(n) for n in (1, 2, 3)]
