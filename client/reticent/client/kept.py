"""Vectors that a device keeps for the next round: what a codec left out, its own layers.

A vector is stored under its round, and the one before it stays until the next round: training a
round again, after a crash or a lost message, then starts from the same vector as the first time.
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
from reticent.core.update import Vector

_NAME = re.compile(r"([0-9a-f]{16})-(\d{1,10})\.safetensors")


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

        Raises:
            DataError: If it cannot be written.
        """
        path = self._path(round)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_suffix(".new")
            with fresh.open("wb") as file:
                file.write(save({"vector": vector.astype(np.float32)}))
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
            for old in sorted(r for r in self._rounds() if r < round)[:-1]:
                self._path(old).unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error.strerror}") from error

    @property
    def _own(self) -> Path:
        return self.folder / _short(self.device)

    def _path(self, round: int) -> Path:
        return self._own / f"{_short(self.run)}-{round}.safetensors"

    def _rounds(self) -> list[int]:
        names = os.listdir(self._own) if self._own.is_dir() else []
        matches = [m for m in map(_NAME.fullmatch, names) if m and m[1] == _short(self.run)]
        return [int(match[2]) for match in matches]


def _short(name: str) -> str:
    """Return 16 hexadecimal digits for a name, which may hold anything."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]
