"""Background processes that are certain to end, with their logs at hand when something fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "OMP_NUM_THREADS": "1",
}


class ProcessError(Exception):
    """A process ended, or something did not happen in time; the message ends with the logs."""


@dataclass
class Processes:
    """Commands running in the background, each with its log file and a Flower home of its own."""

    folder: Path
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *command: str | Path) -> None:
        """Start a command that runs until :meth:`stop`; its log is ``FOLDER/NAME.log``."""
        with (self.folder / f"{name}.log").open("wb") as log:
            self.running[name] = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(name),
                start_new_session=True,
            )

    def run(self, name: str, *command: str | Path, timeout: float = 60.0) -> str:
        """Run a command to its end and return what it printed.

        Raises:
            ProcessError: If its exit status is not 0, or the time is over.
        """
        words = [str(part) for part in command]
        try:
            done = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=self._environment(name),
                timeout=timeout,
                check=False,
                text=True,
            )
        except subprocess.TimeoutExpired as error:
            raise ProcessError(f"{' '.join(words)}: not within {timeout:g} s") from error
        if done.returncode:
            raise ProcessError(f"{' '.join(words)}: exit status {done.returncode}\n{done.stdout}")
        return done.stdout

    def wait(self, what: str, happened: Callable[[], bool], seconds: float) -> None:
        """Wait until something has happened.

        Raises:
            ProcessError: If a process ends or the time is over, with the end of every log.
        """
        deadline = time.monotonic() + seconds
        while not happened():
            ended = [name for name, process in self.running.items() if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                why = f"{', '.join(ended)} ended" if ended else f"not within {seconds:g} s"
                raise ProcessError(f"waiting for {what}: {why}\n{self.logs()}")
            time.sleep(0.25)

    def logs(self, lines: int = 40) -> str:
        """Return the last lines of every log."""
        parts: list[str] = []
        for name in self.running:
            text = (self.folder / f"{name}.log").read_text(errors="replace")
            parts.append(f"== {name}\n" + "\n".join(text.splitlines()[-lines:]))
        return "\n".join(parts)

    def stop(self) -> None:
        """End every process that was started, and every process those started."""
        # Flower puts some of its children into sessions of their own, so a process group is not
        # enough; and a process is held by descriptor, so that no reused id is ever signalled.
        family = [pid for p in self.running.values() for pid in _descendants(p.pid)]
        held = [fd for pid in family if (fd := _hold(pid)) is not None]
        for process in reversed(list(self.running.values())):
            process.terminate()
        for process in self.running.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
        for descriptor in held:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            os.close(descriptor)
        for process in self.running.values():
            process.wait(10)
        self.running.clear()

    def _environment(self, name: str) -> dict[str, str]:
        home = self.folder / f"{name}-home"
        home.mkdir(exist_ok=True)
        # The commands of this interpreter's environment come first: Flower starts more of them.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        return {**os.environ, **QUIET, "FLWR_HOME": str(home), "PATH": path}


def _descendants(pid: int) -> list[int]:
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in children.read_text().split():
                found += _descendants(int(child))
    return found


def _hold(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None
