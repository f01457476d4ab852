"""What a device's disk does: fill up, turn read-only, fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reticent.core.errors import StorageError


@contextmanager
def mapped(path: Path) -> Iterator[None]:
    """Turn what the file system raises about ``path`` into an error that an owner can act on.

    Raises:
        StorageError: If it raised.
    """
    try:
        yield
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise StorageError(f"{path}: cannot be read or written: {why}") from error
