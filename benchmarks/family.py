"""The processes that descend from this one, and the memory they hold; read from ``/proc``."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from pathlib import Path
from types import TracebackType

_PROC = Path("/proc")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def descendants(root: int | None = None) -> list[int]:
    """Return the ids of all living processes below ``root`` (this one)."""
    children: dict[int, list[int]] = defaultdict(list)
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and (fields := _stat(entry)):
            children[int(fields[1])].append(int(entry.name))
    found, todo = [], [root or os.getpid()]
    while todo:
        below = children[todo.pop()]
        found += below
        todo += below
    return found


def titled(title: str) -> list[int]:
    """Return the descendants whose command line begins with ``title``."""
    return [pid for pid in descendants() if _command(pid).startswith(title)]


class PeakMemory:
    """Samples the resident memory of this process and its descendants while a block runs.

    ``mb`` is the largest sum seen, in 10^6 bytes. Shared pages count once for each process, as they
    do in every tool that adds up RSS.
    """

    def __init__(self, every: float = 0.2) -> None:
        """Sample every so many seconds."""
        self.mb = 0.0
        self._every, self._done = every, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            pages = sum(_resident(pid) for pid in [os.getpid(), *descendants()])
            self.mb = max(self.mb, pages * _PAGE / 1e6)
            if self._done.wait(self._every):
                return


def _stat(entry: Path) -> list[str]:
    try:
        return (entry / "stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
        return []


def _command(pid: int) -> str:
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""


def _resident(pid: int) -> int:
    try:
        return int((_PROC / str(pid) / "statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
