"""What a ServerApp's process tells whoever started it: that it lives, waits, ended, and why.

Flower runs the ServerApp in a process of its own and says ``finished`` whatever became of it. So
the process itself writes ``attempt.json`` into the run directory, whole, at every change.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from reticent.core import errors
from reticent.core.errors import ReticentError, RunError
from reticent.core.run import Run, write_atomic

RUNNING, FINISHED, FAILED = "running", "finished", "failed"
_KINDS: dict[int, type[ReticentError]] = {
    kind.exit_code: kind
    for kind in vars(errors).values()
    # Kinds without a status of their own are covered by the one they share it with.
    if isinstance(kind, type) and issubclass(kind, ReticentError) and "exit_code" in vars(kind)
}


@dataclass(frozen=True)
class Attempt:
    """One process that serves a run.

    Attributes:
        token: Drawn by whoever started it.
        pid: The process.
        began: When the kernel started it, in clock ticks since boot, so that a reused pid is found
            out.
        state: ``running``, ``finished`` or ``failed``.
        online: Connected nodes when it last looked; None before.
        missing: Who is waited for, in words; empty when nobody is.
        code: Exit status of the failure; 0 before.
        reason: Why it failed.
        parent: The process that started it; 0 where that is not known.
    """

    token: str
    pid: int
    began: int
    state: str = RUNNING
    online: int | None = None
    missing: str = ""
    code: int = 0
    reason: str = ""
    parent: int = 0

    def alive(self) -> bool:
        """Return whether the process is still there."""
        return self.state == RUNNING and _began(self.pid) == self.began

    def orphaned(self) -> bool:
        """Return whether it lives although the SuperExec that started it does not.

        Its SuperLink is then gone, and nobody waits for what it does. Flower means it to end by
        itself, but it may wait for that SuperLink without an end (flwr 1.41).
        """
        return self.alive() and self.parent not in (0, _parent(self.pid))


class Teller:
    """Writes the attempt of this process."""

    def __init__(self, run: Run, token: str) -> None:
        """Say that the run is being served."""
        self._path = _path(run)
        self._now = Attempt(token, os.getpid(), _began(os.getpid()) or 0, parent=os.getppid())
        self._write()

    def seen(self, online: int, missing: str) -> None:
        """Say how many nodes are connected, and who is missing."""
        self._change(online=online, missing=missing)

    def finished(self) -> None:
        """Say that the run is finished."""
        self._change(state=FINISHED, missing="")

    def failed(self, error: BaseException) -> None:
        """Say why it failed."""
        code = error.exit_code if isinstance(error, ReticentError) else 1
        reason = str(error) if code != 1 else f"unexpected {type(error).__name__}: {error}"
        self._change(state=FAILED, code=code, reason=reason)

    def _change(self, **changes: Any) -> None:
        changed = replace(self._now, **changes)
        if changed != self._now:
            self._now = changed
            self._write()

    def _write(self) -> None:
        data = json.dumps(asdict(self._now)).encode()
        try:
            write_atomic(self._path, data)
        except OSError:  # a full disk, which may be the very reason that is to be told
            _overwrite(self._path, data)


def _overwrite(path: Path, data: bytes) -> None:
    """Write over a file's own blocks, which need no room; torn, it would read as damaged."""
    with suppress(OSError), path.open("r+b") as file:
        file.write(data)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


def read_attempt(run: Run) -> Attempt | None:
    """Return the last attempt at a run, or None if there was none.

    Raises:
        RunError: If the file is damaged.
    """
    try:
        return _checked(Attempt(**json.loads(_path(run).read_text(encoding="utf-8"))))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise RunError(f"{_path(run)}: damaged: {error}") from error


def _checked(attempt: Attempt) -> Attempt:
    """Return the attempt.

    Raises:
        TypeError: If a value is of another type than its own.
    """
    texts = (attempt.token, attempt.state, attempt.missing, attempt.reason)
    numbers = (attempt.pid, attempt.began, attempt.code, attempt.online or 0, attempt.parent)
    if any(type(t) is not str for t in texts) or any(type(n) is not int for n in numbers):
        raise TypeError("a value is of another type")
    return attempt


def error_of(attempt: Attempt) -> ReticentError:
    """Return the error that the ServerApp failed with."""
    return _KINDS.get(attempt.code, ReticentError)(attempt.reason)


def _path(run: Run) -> Path:
    return run.attempt


def _began(pid: int) -> int | None:
    """Return when a process started, in ticks since boot; None if it is gone or a zombie."""
    with suppress(OSError, ValueError, IndexError):
        fields = _stat(pid)
        return None if fields[0] in "ZX" else int(fields[19])
    return None


def _parent(pid: int) -> int | None:
    with suppress(OSError, ValueError, IndexError):
        return int(_stat(pid)[1])
    return None


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
