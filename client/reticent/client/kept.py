"""Vectors that a device keeps for the next round: what a codec left out, its own layers.

A vector is stored under its round, and the one before it stays until the next round: training a
round again, after a crash or a lost message, then starts from the same vector as the first time.

Vectors of the :data:`MOST_RUNS` runs that were trained last are kept, so that what a device keeps
does not grow with the runs that it was ever in. Runs that take turns lose nothing, as long as they
are no more than that. A run that goes on after as many others is for the device as one whose files
were lost: it begins again from the public values, and nothing is charged anew.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from reticent.core.errors import DataError
from reticent.core.signing import write_new
from reticent.core.update import Vector

MOST_RUNS = 4
"""Runs whose vectors are kept, of each kind; each has at most two, of the size of the model."""

_NAME = re.compile(r"([0-9a-f]{16})(?:-(\d{1,10})\.safetensors|\.new)")


@dataclass(frozen=True)
class Kept:
    """Vectors of one kind of one device in one run, as files in ``folder``, which no other has."""

    folder: Path
    device: str
    run: str

    def before(self, round: int, first: Vector) -> Vector:
        """Return what the latest round before ``round`` left, float32 of the shape of ``first``.

        ``first`` when there is none: the first round, or a device that lost its files.

        Raises:
            DataError: If the file is not one that :meth:`keep` wrote for vectors of this size.
        """
        rounds = [number for number in self._rounds() if number < round]
        if not rounds:
            return first
        path = self._path(max(rounds))
        try:
            vector = load(path.read_bytes())["vector"]
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise DataError(
                f"{path}: not a vector that was kept here; delete it to go on without"
            ) from error
        if (
            vector.dtype != np.float32
            or vector.shape != first.shape
            or not np.isfinite(vector).all()
        ):
            raise DataError(
                f"{path}: holds {vector.dtype} {vector.shape}: must be finite float32 "
                f"{first.shape}; delete it to go on without"
            )
        return vector

    def keep(self, round: int, vector: Vector) -> None:
        """Store what ``round`` left; durable and whole on return, or not there at all.

        The file is readable to its owner alone, from its first byte on.

        Raises:
            DataError: If it cannot be written.
        """
        path = self._path(round)
        fresh = path.with_name(f"{_short(self.run)}.new")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fresh.unlink(missing_ok=True)  # of a process that died
            try:
                write_new(fresh, save({"vector": vector.astype(np.float32)}), 0o600)
                fresh.replace(path)
            finally:
                fresh.unlink(missing_ok=True)
            self._forget(path, round)
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error.strerror}") from error

    def _forget(self, fresh: Path, round: int) -> None:
        """Remove what no round after ``round`` needs, and the runs that were trained long ago."""
        for old in sorted(r for r in self._rounds() if r < round)[:-1]:
            self._path(old).unlink(missing_ok=True)
        others = _trained_last(self._own, _short(self.run))
        if others and _written(fresh) <= (newest := others[0][0]):
            # The clock was set back: this is the last one that was written all the same.
            os.utime(fresh, ns=(newest + 1, newest + 1))
        for _, paths in others[MOST_RUNS - 1 :]:
            for path in paths:
                path.unlink(missing_ok=True)

    @property
    def _own(self) -> Path:
        return self.folder / _short(self.device)

    def _path(self, round: int) -> Path:
        return self._own / f"{_short(self.run)}-{round}.safetensors"

    def _rounds(self) -> list[int]:
        names = os.listdir(self._own) if self._own.is_dir() else []
        matches = [m for m in map(_NAME.fullmatch, names) if m and m[1] == _short(self.run)]
        return [int(match[2]) for match in matches if match[2]]


def _trained_last(folder: Path, but: str) -> list[tuple[int, list[Path]]]:
    """Return the files of each run in ``folder`` with the time of the latest, the last run first.

    Of every run except ``but``. What a process that died left half written goes with its run.
    """
    runs: dict[str, list[Path]] = {}
    for path in folder.iterdir():
        if (found := _NAME.fullmatch(path.name)) and found[1] != but:
            runs.setdefault(found[1], []).append(path)
    return sorted(((max(map(_written, paths)), paths) for paths in runs.values()), reverse=True)


def _written(path: Path) -> int:
    """Return when a file was written, in nanoseconds; 0 if another process has removed it."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _short(name: str) -> str:
    """Return 16 hexadecimal digits for a name, which may hold anything."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]
