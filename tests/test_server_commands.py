"""Many commands of a program of Flower's come from one process, and none sees another."""

from __future__ import annotations

import json
import os

import pytest

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


def test_a_program_that_is_not_there_is_said_to_be() -> None:
    done = Commands("no-such-program", SETTINGS).call([], 60)
    assert done.status == 1 and "no-such-program" in done.err
    assert json.dumps(done.out) == '""'
