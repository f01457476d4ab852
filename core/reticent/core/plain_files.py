"""Reading files that somebody else names, without waiting for them and never more than expected."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from .errors import ReticentError


def read_plain(path: Path, limit: int, error: type[ReticentError], *, links: bool) -> bytes:
    """Return a regular file's bytes; devices, pipes and larger files are refused unread.

    Args:
        path: The file.
        limit: How many bytes it may have.
        error: What is raised.
        links: Whether the name itself may be a symbolic link.

    Raises:
        ReticentError: An ``error``, if the file cannot be read, is not regular, or is too large.
    """
    try:
        return _read(path, limit, error, 0 if links else getattr(os, "O_NOFOLLOW", 0))
    except OSError as problem:
        reason = problem.strerror or problem
        if not links and path.is_symlink():
            reason = "must be a plain file"
        raise error(f"{path}: cannot be read: {reason}") from problem


def _read(path: Path, limit: int, error: type[ReticentError], flags: int) -> bytes:
    # Opening a pipe waits for who writes to it, unless told not to.
    flags |= os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{path}: must be a plain file")
        if status.st_size > limit:
            raise error(f"{path}: has {status.st_size} bytes: at most {limit} allowed")
        # As many as are asked for are allocated at once; one more shows a file that grows.
        data = file.read(status.st_size + 1)
    if len(data) != status.st_size:
        raise error(f"{path}: changed while it was read")
    return data
