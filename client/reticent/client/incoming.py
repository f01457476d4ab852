"""The part of an offered model that has arrived."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from reticent.core.offer import Offer


class Incoming:
    """A folder with at most one file, named by the SHA-256 of what it is to become.

    So a part serves whichever offer has the same content. Guarantee: after a crash the file holds
    what :meth:`add` returned from, and at most one chunk more; whether it is the right content is
    known when it is whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def offset(self, offer: Offer) -> int:
        """Return how many of the offered bytes are there."""
        try:
            found = self._path(offer).stat().st_size
        except FileNotFoundError:
            return 0
        return found if found <= offer.size else 0

    def add(self, offer: Offer, offset: int, chunk: bytes) -> None:
        """Append a chunk; it is on disk on return. One for another offset changes nothing.

        Raises:
            OSError: If it cannot be written; what was there before still is.
        """
        if offset != self.offset(offer):
            return  # sent twice, or late
        if not offset:
            self.clear()
            self.folder.mkdir(mode=0o700, exist_ok=True)
        file = os.open(self._path(offer), os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            _write(file, offset, chunk)
            os.fsync(file)
        except OSError:
            with suppress(OSError):
                os.ftruncate(file, offset)
            raise
        finally:
            os.close(file)
        if not offset:
            sync(self.folder)

    def read(self, offer: Offer) -> bytes:
        """Return what is there."""
        with self._path(offer).open("rb") as file:
            return file.read(offer.size)

    def clear(self) -> None:
        """Forget whatever is there."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                path.unlink()

    def _path(self, offer: Offer) -> Path:
        return self.folder / f"{offer.sha256}.part"


def sync(folder: Path) -> None:
    """Synchronise the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(file: int, offset: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
