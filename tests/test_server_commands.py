"""Many commands of a program of Flower's come from one process, and none sees another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from reticent.server import commands as module
from reticent.server.attempt import _began
from reticent.server.commands import Commands

SETTINGS = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


def test_commands_are_answered_in_order_each_with_its_own_status() -> None:
    commands = Commands("flwr", SETTINGS)
    try:
        first = commands.call(["--version"], 120)
        process = commands._process
        wrong = commands.call(["no-such-command"], 60)
        again = commands.call(["--version"], 60)
        assert first == again and first.status == 0 and "1." in first.out
        assert wrong.status == 2 and "no-such-command" in wrong.err
        assert process is not None and process is commands._process
        process.kill()
        process.wait()
        assert commands.call(["--version"], 120) == first  # another process
    finally:
        commands.close()


def test_a_command_that_hangs_is_given_up() -> None:
    commands = Commands("flwr", SETTINGS)
    with pytest.raises(TimeoutError):
        commands.call(["--version"], 0.001)
    assert commands._process is None


def test_the_keys_of_a_terminal_do_not_reach_a_command() -> None:
    """Ctrl-C goes to all processes of a session's foreground: it would cut a registration short."""
    commands = Commands("flwr", SETTINGS)
    try:
        commands.call(["--version"], 120)
        assert commands._process is not None
        assert os.getsid(commands._process.pid) != os.getsid(0)
    finally:
        commands.close()


def test_an_answer_that_was_not_waited_for_is_not_taken_for_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands = Commands("flwr", SETTINGS)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        commands.call(["--version"], 120)
        with monkeypatch.context() as patch:
            patch.setattr(module.select, "select", interrupted)
            with pytest.raises(KeyboardInterrupt):
                commands.call(["--version"], 60)
        assert commands.call(["no-such-command"], 120).status == 2
    finally:
        commands.close()


PARENT = """
import os, sys, time
from reticent.server.commands import Commands
commands = Commands("flwr", os.environ)
commands.call(["--version"], 120)
print(commands._process.pid, flush=True)
time.sleep(600)
"""


def test_its_process_ends_with_ours_however_that_ends() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, env=SETTINGS, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert _began(child) is not None
        parent.kill()
    deadline = time.monotonic() + 60
    while _began(child) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


KILLED = """
import os, signal
from reticent.server.commands import Commands
commands = Commands("flwr", os.environ)
commands.call(["--version"], 120)
commands._process.stdin.write('["--version"]\\n')
commands._process.stdin.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_command_whose_answer_nobody_waits_for_ends_without_a_word() -> None:
    command = [sys.executable, "-c", KILLED]
    # Returns once nobody holds the pipes any more, the process of the commands neither.
    done = subprocess.run(
        command, capture_output=True, check=False, env=SETTINGS, text=True, timeout=240
    )
    assert done.returncode == -9 and done.stderr == ""


def test_a_program_that_is_not_there_is_said_to_be() -> None:
    done = Commands("no-such-program", SETTINGS).call([], 60)
    assert done.status == 1 and "no-such-program" in done.err
    assert json.dumps(done.out) == '""'
