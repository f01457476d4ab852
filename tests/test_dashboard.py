"""The live view: what a frame says, and what a real terminal is left with."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest
from interrupts import heeds_ctrl_c
from rich.console import Console

from reticent.cli.dashboard import Board, Dashboard, frame_of, progress_for, sparkline
from reticent.cli.output import Progress
from reticent.cli.simulations import committed_rounds
from reticent.core.plan import parse_plan
from reticent.core.run import Run

SETTINGS = (
    "task.name=digits",
    "task.clients=10",
    "task.public_examples=200",
    "teacher.epochs=2",
    "student.epochs=2",
    "federation.rounds=3",
    "federation.clients_per_round=10",
    "federation.eval_every=1",
    "engine.workers=1",
)


def metrics(number: int, **changed: Any) -> dict[str, Any]:
    return {
        "round": number,
        "replies": 10,
        "dropped": {"late": 2},
        "bytes_up": 1000,
        "bytes_down": 2000,
        "bytes_constants": 500,
        "seconds": 0.5,
        "accuracy": 0.1 * number,
        "epsilon": 1.0 * number,
        **changed,
    }


def board(rounds: int = 3, target: float | None = 8.0, private: bool = True) -> Board:
    made = Board(10, target, private)
    for number in range(1, rounds + 1):
        made.add(metrics(number))
    return made


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> Callable[[], list[str]]:
    """Make standard output a terminal; return what gives the live lines that it was sent."""
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    return lambda: [re.sub(r"\x1b\[[0-9]*K", "", t) for t in out.getvalue().split("\r")[1:]]


def drawn(frame: object, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(frame)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_a_frame_says_everything() -> None:
    lines = drawn(frame_of(board(), 83.0, 80), 80)
    words = " ".join(" ".join(lines).split())
    for part in ("3/10", "1:23 left", "30.0%", "best 30.0%", "3.00", "of 8", "3.0 kB up"):
        assert part in words
    assert "7.5 kB down" in words and "20/s, 10 replies, 2 dropped" in words
    assert "▁" in words and "█" in words


@pytest.mark.parametrize("width", [20, 30, 47, 48, 60, 80, 200])
def test_a_frame_is_never_wider_than_the_terminal_and_always_as_high(width: int) -> None:
    lines = drawn(frame_of(board(), 5.0, width), width)
    assert len(lines) == 5 and all(len(line) <= width for line in lines)
    assert any("3/10" in line for line in lines)


@pytest.mark.parametrize("width", [30, 80])
def test_a_frame_says_what_time_it_is_on_the_fleet(width: int) -> None:
    made = Board(10, 8.0, True, fleet=0.0)
    before = drawn(frame_of(made, 5.0, width), width)
    made.add(metrics(1, virtual={"time": 610.0}))
    made.add(metrics(2, virtual={"time": 1010.0}))
    after = drawn(frame_of(made, 5.0, width), width)
    assert len(before) == len(after) == 6
    assert after[-1].split() == ["fleet", "16", "min", "50", "s"]
    assert not any("fleet" in line for line in drawn(frame_of(board(), 5.0, width), width))


def test_the_dashboard_of_a_plan_with_a_fleet_shows_its_time_from_the_committed_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    plan = parse_plan("", ["fleet.jitter=0.0", "federation.rounds=2"])
    shown = Dashboard(plan, [metrics(1, virtual={"time": 610.0})])
    shown.round(metrics(2, virtual={"time": 1010.0}))
    shown.clear()
    assert "16 min 50 s" in out.getvalue()


def test_what_is_not_known_is_said_to_be_so() -> None:
    words = " ".join(drawn(frame_of(board(0), 0.0, 80), 80))
    assert "not tested yet" in words and "not known" in words
    assert "privacy is off" in " ".join(drawn(frame_of(board(1, None, False), 0.0, 80), 80))
    assert "no target" in " ".join(drawn(frame_of(board(1, None), 0.0, 80), 80))


def test_epsilon_is_that_of_the_last_round_also_between_tests() -> None:
    made = Board(10, 8.0, True)
    made.add(metrics(1, accuracy=None))
    words = " ".join(drawn(frame_of(made, 0.0, 80), 80))
    assert "1.00" in words and "not tested yet" in words and "not known" not in words
    made.add(metrics(2))
    made.add(metrics(3, accuracy=None))
    assert "3.00" in " ".join(drawn(frame_of(made, 0.0, 80), 80))


def test_the_live_line_says_epsilon_of_the_last_round_also_between_tests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = on_a_terminal(monkeypatch, 120)
    progress = Progress(10, False)
    for number, accuracy in ((1, None), (2, 0.2), (3, None)):
        progress.round(metrics(number, accuracy=accuracy))
    first, second, third = shown()
    assert "ε 1.00" in first and "accuracy" not in first
    assert "accuracy 20.0%   ε 2.00" in second and "accuracy 20.0%   ε 3.00" in third
    off = Progress(10, False)
    off.round(metrics(1, epsilon=None))
    assert "ε = ∞" in shown()[-1]


def test_a_sparkline_is_the_shape_of_its_values() -> None:
    assert sparkline([1.0, 2.0, 3.0], 10) == "▁▅█"
    assert sparkline([3.0, 2.0, 1.0], 10) == "█▅▁"
    assert sparkline([0.5] * 5, 10) == "▁" * 5
    assert len(sparkline([k / 100 for k in range(100)], 12)) == 12


def test_an_accuracy_that_is_no_number_does_not_end_the_live_view() -> None:
    assert sparkline([math.nan], 8) == "" and sparkline([0.0, math.nan, 1.0], 8) == "▁█"
    made = Board(10, 8.0, True)
    made.add(metrics(1, accuracy=math.nan))
    assert "nan" in " ".join(drawn(frame_of(made, 0.0, 80), 80))


def test_without_a_terminal_there_are_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = parse_plan("")
    assert isinstance(progress_for(plan, False), Progress)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(progress_for(plan, False), Progress)
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(progress_for(plan, True), Progress)
    assert not isinstance(progress_for(plan, False), Progress)


@pytest.mark.parametrize("term", ["dumb", None])
def test_a_terminal_that_cannot_redraw_gets_plain_lines_of_the_tested_rounds(
    monkeypatch: pytest.MonkeyPatch, term: str | None
) -> None:
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout", out)
    if term is None:
        monkeypatch.delenv("TERM", raising=False)
    else:
        monkeypatch.setenv("TERM", term)
    progress = progress_for(parse_plan("", ["federation.rounds=3"]), False)
    for number, accuracy in ((1, 0.1), (2, None), (3, 0.3)):
        progress.round(metrics(number, accuracy=accuracy))
    progress.clear()
    assert "\x1b" not in out.getvalue() and "\r" not in out.getvalue()
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["1/3", "3/3"]


@pytest.mark.parametrize("width", [20, 80, 200])
def test_a_live_line_is_never_as_wide_as_the_terminal(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    shown = on_a_terminal(monkeypatch, width)
    progress = Progress(10_000, False)
    for number in (1, 2, 3):
        progress.round(metrics(number, virtual={"time": 610.0}))
    last = shown()[-1]
    assert all(len(line) < width for line in shown())
    assert last.endswith("s left") if width == 200 else len(last) == width - 1


def test_bytes_are_of_the_whole_run_also_on_plain_lines_of_one_that_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    plan = parse_plan("", ["federation.rounds=3"])
    progress_for(plan, False, [metrics(1), metrics(2)]).round(metrics(3))
    assert "10.5 kB sent" in out.getvalue()


@pytest.mark.parametrize(
    "changed",
    [
        {"bytes_up": None},
        {"bytes_down": "1"},
        {"replies": []},
        {"dropped": 1},
        {"dropped": {"late": "1"}},
        {"accuracy": "0.5"},
        {"epsilon": {}},
        {"virtual": 1.0},
        {"virtual": {}},
    ],
)
def test_a_damaged_round_that_a_run_has_does_not_end_the_view(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    plan, run = parse_plan("", ["federation.rounds=3"]), Run(tmp_path)
    whole, damaged = metrics(1), metrics(2, **changed)
    run.metrics.write_text(f"{json.dumps(whole)}\n{json.dumps(metrics(2))}\n")
    assert committed_rounds(run) == [whole, metrics(2)]
    for line in (json.dumps(damaged), "[]", "1", "{}", "{"):
        run.metrics.write_text(f"{json.dumps(whole)}\n{line}\n")
        assert committed_rounds(run) == []
    Dashboard(plan, committed_rounds(run))


class Terminal:
    """``reticent simulate`` under a pseudo-terminal of a given size."""

    def __init__(self, folder: Path, width: int, *settings: str, **variables: str) -> None:
        self.control, theirs = pty.openpty()
        ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
        self.before = termios.tcgetattr(theirs)
        self._theirs = theirs
        entry = str(Path(sys.executable).parent / "reticent")
        given = [part for s in (*SETTINGS, *settings) for part in ("--set", s)]
        environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
        self.process = subprocess.Popen(
            [entry, "simulate", *given, "--run", str(folder)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**environment, "TERM": "xterm-256color", **variables},
            start_new_session=True,
            preexec_fn=heeds_ctrl_c,
        )
        self.seen = b""

    def read_until(self, part: bytes, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while part not in self.seen and time.monotonic() < deadline:
            self._read(0.1)
        assert part in self.seen, self.seen

    def _read(self, wait: float) -> None:
        if select.select([self.control], [], [], wait)[0]:
            self.seen += os.read(self.control, 65536)

    def end(self) -> int:
        while self.process.poll() is None:
            self._read(0.1)
        while select.select([self.control], [], [], 0)[0]:
            self._read(0)
        assert termios.tcgetattr(self._theirs) == self.before
        os.close(self._theirs)
        os.close(self.control)
        return self.process.returncode


def test_a_terminal_shows_the_block_in_place_and_is_left_as_it_was(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path / "run", 100)
    terminal.read_until(b"finished in")
    assert terminal.end() == 0
    text = terminal.seen.decode()
    assert "3/3" in text and "clients" in text and "left" in text
    assert "\x1b[1A" in text  # drawn over, not below
    assert "\x1b[?25l" not in text  # the cursor is never hidden, so nothing has to show it
    assert "\x1b[?1049h" not in text and "\x1b[2J" not in text  # no other screen, no clearing
    assert text.count("federated student, int8") == 1


def test_colours_are_left_out_where_they_are_not_wanted(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path / "run", 30, NO_COLOR="1")
    terminal.read_until(b"finished in")
    assert terminal.end() == 0
    colours = re.findall(r"\x1b\[[0-9;]*m", terminal.seen.decode())
    numbers = {n for code in colours for n in code[2:-1].split(";")}
    assert numbers <= {"", "0", "1", "2"}  # bold and dim are no colours


@pytest.mark.parametrize(("how", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_terminal_is_usable_after_ctrl_c_and_sigterm(
    how: signal.Signals, status: int, tmp_path: Path
) -> None:
    terminal = Terminal(tmp_path / "run", 80, "federation.rounds=500")
    terminal.read_until(b"replies")
    os.kill(terminal.process.pid, how)
    terminal.read_until(b"--resume")
    assert terminal.end() == status
    assert b"\x1b[?25l" not in terminal.seen
