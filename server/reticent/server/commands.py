"""Many commands of one of Flower's programs, for the price of one start.

Every start of ``flwr`` takes seconds of imports, and a server that enrolls a hundred devices calls
it a hundred times. Here one process imports it once, and each command is a fork of that process,
called as the console script is: no command sees what another left behind. Words go to the process,
and answers come back, as lines of JSON.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import IO


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it printed."""

    status: int
    out: str
    err: str


class Commands:
    """One program, started at the first call; it ends with this object or this process.

    It is in a session of its own: the keys of a terminal, such as Ctrl-C, do not reach it.
    """

    def __init__(self, program: str, environment: Mapping[str, str]) -> None:
        """Remember the name of a console script, and its environment."""
        self._program, self._environment = program, dict(environment)
        self._process: subprocess.Popen[str] | None = None

    def call(self, words: Sequence[str], seconds: float) -> Done:
        """Run the program with some arguments.

        A command that was begun is never cut short, also where its answer is not waited for.

        Raises:
            TimeoutError: If it takes longer than ``seconds``.
        """
        try:
            line = _answer(self._running(), words, seconds)
        except BaseException:
            self.close()  # the answer that is still to come must not be taken for the next one's
            raise
        if not line:
            self.close()
            return Done(1, "", f"{self._program}: ended without an answer")
        return Done(**json.loads(line))

    def close(self) -> None:
        """End the process; the next call starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __del__(self) -> None:
        """Leave no process behind."""
        self.close()

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __spec__.name, self._program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=self._environment,
                text=True,
                # Ctrl-C is for us: it must not cut short what the SuperLink is being told.
                start_new_session=True,
            )
        return self._process


def _answer(process: subprocess.Popen[str], words: Sequence[str], seconds: float) -> str:
    """Return the line that answers a command; empty if the process ended without one.

    Raises:
        TimeoutError: If it takes longer than ``seconds``.
    """
    given, answers = process.stdin, process.stdout
    if given is None or answers is None:
        return ""
    with suppress(BrokenPipeError):
        given.write(json.dumps(list(words)) + "\n")
        given.flush()
    if not select.select([answers], [], [], seconds)[0]:
        raise TimeoutError
    return answers.readline()


def _done(run: Callable[[], int | None], words: list[str]) -> Done:
    """Run a command in a fork."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        if not (pid := os.fork()):
            nothing = os.open(os.devnull, os.O_RDONLY)  # what comes on ours is for us
            for number, source in enumerate((nothing, out.fileno(), err.fileno())):
                os.dup2(source, number)
            sys.argv = words
            sys.exit(run())
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return Done(status, _text(out), _text(err))


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def main() -> None:
    """Answer the commands that come on standard input, until it ends."""
    (found,) = importlib.metadata.entry_points(group="console_scripts", name=sys.argv[1])
    run: Callable[[], int | None] = found.load()
    while line := sys.stdin.readline():
        done = _done(run, [sys.argv[1], *json.loads(line)])
        try:
            print(json.dumps(asdict(done)), flush=True)
        except BrokenPipeError:
            os._exit(1)  # who asked was killed meanwhile; Python would say so once more at its end


if __name__ == "__main__":
    main()
