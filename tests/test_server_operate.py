"""What ``reticent server run`` does when a SuperLink dies; real ones are in test_server_faults."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from reticent.core.errors import NetworkError, RunError
from reticent.core.plan import parse_plan
from reticent.core.run import create_run
from reticent.server import operate
from reticent.server.attempt import Teller, read_attempt
from reticent.server.certificates import utc_now
from reticent.server.flower import SuperLinkError
from reticent.server.home import create_home
from reticent.server.operate import Operation, prepare_operation

STARTS, DIES = "starts", "is killed while it starts"
KILLED = "the SuperLink died"


class Link:
    """A SuperLink that goes with the first attempt."""

    def __init__(self) -> None:
        self.attempted = False

    def ended(self) -> bool:
        return self.attempted


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    home = create_home(tmp_path / "server", ["127.0.0.1"], 8000, utc_now())

    def served(links: Sequence[str], attempts: Sequence[str]) -> list[str]:
        """Serve with SuperLinks that come to this and attempts that end so; return what is said."""
        remaining, outcomes, said = iter(links), iter(attempts), list[str]()

        @contextmanager
        def superlink(*_: object) -> Iterator[Link]:
            if next(remaining) == DIES:
                raise SuperLinkError("the SuperLink ended with status -9")
            yield Link()

        def attempt(self: Operation, link: Link) -> str:
            link.attempted = True
            return next(outcomes)

        monkeypatch.setattr(operate, "superlink", superlink)
        monkeypatch.setattr(operate, "synchronize", lambda *_: [])
        monkeypatch.setattr(Operation, "_attempt", attempt)
        monkeypatch.setattr(operate.time, "sleep", lambda _: None)
        plan, run = parse_plan(""), tmp_path / "run"
        prepare_operation(home, plan, run, False, said.append, lambda _: None).serve()
        assert next(remaining, None) is next(outcomes, None) is None
        return said

    return served


def test_a_superlink_that_is_killed_while_it_starts_again_is_started_once_more(
    serve: Callable[..., list[str]],
) -> None:
    said = serve([STARTS, DIES, DIES, STARTS], [KILLED, ""])
    assert sum("going on after round 0" in line for line in said) == 3


def test_a_superlink_that_never_started_is_an_error_at_once(
    serve: Callable[..., list[str]],
) -> None:
    with pytest.raises(SuperLinkError, match="status -9"):
        serve([DIES], [])


def test_five_deaths_in_a_row_without_a_round_are_enough(serve: Callable[..., list[str]]) -> None:
    with pytest.raises(NetworkError, match="status -9, 5 times in a row"):
        serve([STARTS, DIES, DIES, DIES, DIES], [KILLED])


SERVERAPP = """
import sys, time
from pathlib import Path
from reticent.core.run import Run
from reticent.server.attempt import Teller
Teller(Run(Path(sys.argv[1])), "token")
time.sleep(600)
"""
SUPEREXEC = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


def test_a_run_that_ended_by_itself_meanwhile_is_not_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ServerApp outlived the call that started it, and ended while this one looked around."""
    home = create_home(tmp_path / "server", ["127.0.0.1"], 8000, utc_now())
    said = list[str]()
    made = prepare_operation(
        home, parse_plan(""), tmp_path / "run", False, said.append, lambda _: None
    )
    made.run.summary.write_text("{}")
    monkeypatch.setattr(Operation, "_submitted", lambda self: pytest.fail("it was begun again"))
    assert made._attempt(None) == ""
    assert said == ["the run has ended by itself meanwhile"]


def test_a_run_that_budgets_ended_meanwhile_is_an_error_and_can_be_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ServerApp died after the summary, before it could say why."""
    home = create_home(tmp_path / "server", ["127.0.0.1"], 8000, utc_now())
    said, plan, folder = list[str](), parse_plan(""), tmp_path / "run"

    def prepared(resume: bool) -> Operation:
        return prepare_operation(home, plan, folder, resume, said.append, lambda _: None)

    made = prepared(False)
    made.run.summary.write_text('{"rounds": 3, "stopped": {"round": 4}}')
    with pytest.raises(NetworkError, match="budgets ended the training after round 3"):
        made._attempt(None)
    again = prepared(True)
    assert said[-1].endswith("whose model is kept; it is taken up again")
    monkeypatch.setattr(Operation, "_submitted", lambda self: "token")
    monkeypatch.setattr(Operation, "_watch", lambda self, token, link: "begun again")
    assert again._attempt(None) == "begun again"
    made.run.summary.write_text('{"rounds": 60}')
    with pytest.raises(RunError, match="nothing to continue"):
        prepared(True)


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_serverapp_that_outlives_its_superlink_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run would wait for ever: for a ServerApp that waits for a SuperLink that is gone."""
    monkeypatch.setattr(operate, "_ORPHAN_SECONDS", 0.0)
    monkeypatch.setattr(operate, "_POLL_SECONDS", 0.05)
    home = create_home(tmp_path / "server", ["127.0.0.1"], 8000, utc_now())
    plan, folder, said = parse_plan(""), tmp_path / "run", list[str]()
    made = prepare_operation(home, plan, folder, False, said.append, lambda _: None)
    words = [sys.executable, "-c", SUPEREXEC, SERVERAPP, str(folder)]
    superexec = subprocess.Popen(words)
    link = Link()
    try:
        until(lambda: read_attempt(made.run) is not None)
        attempt = read_attempt(made.run)
        assert attempt is not None and attempt.alive() and not attempt.orphaned()
        superexec.kill()
        superexec.wait()
        until(attempt.orphaned)
        link.attempted = True
        assert made._watch("token", link) == "the SuperLink died"  # type: ignore[arg-type]
        assert not attempt.alive() and not attempt.orphaned()
        assert any("it is killed" in line for line in said)
    finally:
        superexec.kill()
        attempt = read_attempt(made.run)
        if attempt is not None and attempt.alive():
            os.kill(attempt.pid, signal.SIGKILL)


def test_an_attempt_of_an_unknown_parent_is_no_orphan(tmp_path: Path) -> None:
    run = create_run(tmp_path / "run", parse_plan(""))
    Teller(run, "token")
    attempt = read_attempt(run)
    assert attempt is not None and attempt.parent == os.getppid()
    assert not replace(attempt, parent=0).orphaned()
    assert replace(attempt, parent=attempt.parent + 1).orphaned()
