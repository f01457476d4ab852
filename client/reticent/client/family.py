"""Child processes that are certain to end, with everything that they started."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

_SUBREAPER, _DEATH_SIGNAL, _NAME = 36, 1, 15  # PR_SET_CHILD_SUBREAPER, … of prctl(2)
_LONGEST_LINE = 4096


def adopt_orphans() -> None:
    """Let processes whose parent died become children of this one, so that none is forgotten."""
    _prctl(_SUBREAPER, 1)


class Child:
    """A command in a session of its own; its output goes line by line to ``line``.

    It is told to end if this process is killed. Call from the main thread.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], line: Callable[[str], None]
    ) -> None:
        self.began = time.monotonic()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
            preexec_fn=end_with_parent,
            umask=0o077,
        )
        arguments = (self._process.stdout, line)
        threading.Thread(target=_read, args=arguments, daemon=True).start()

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def wait(self, seconds: float) -> int | None:
        """Return the exit status, or None if it still runs after so many seconds."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(seconds)
        return None

    def lived(self) -> float:
        """Return the seconds since it was started."""
        return time.monotonic() - self.began

    def stop(self, seconds: float) -> None:
        """Ask it to end, and after so many seconds end it and all its descendants."""
        with suppress(ProcessLookupError):
            self._process.terminate()
        if self.wait(seconds) is None:
            self._process.kill()
            self._process.wait()
        end_children()


def end_children() -> None:
    """Kill every descendant of this process and collect it."""
    # What is killed may leave children behind, which are adopted: look until nobody is left.
    deadline = time.monotonic() + 10
    while (found := _descendants(os.getpid())) and time.monotonic() < deadline:
        for pid in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, children.read_text().split()):
                found += [child, *_descendants(child)]
    return found


def end_with_parent(how: signal.Signals = signal.SIGTERM) -> None:
    """Let this process be sent a signal when the thread ends that started it."""
    _prctl(_DEATH_SIGNAL, how)


def name_process(name: str) -> None:
    """Give this process the name that ``ps`` and ``top`` show; they show 15 characters."""
    _prctl(_NAME, name.encode())


def _prctl(option: int, value: int | bytes) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _read(stream: IO[bytes], line: Callable[[str], None]) -> None:
    with stream:
        while data := stream.readline(_LONGEST_LINE):
            line(data.decode("utf-8", "replace").rstrip("\r\n"))
