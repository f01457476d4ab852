"""What a biased codec left out of a device's updates, kept on the device for the next one.

Error feedback (Seide et al. 2014; Karimireddy et al. 2019, algorithm 2): a device encodes its
update plus what the codec left out of the ones before, and keeps what is left out this time.
Updates are noised before they come here, so under ``local`` trust a residual is made of private
values only; without privacy it is made of raw ones, and stays on the device.

A residual is stored under its round, and the one before it stays until the next round: training a
round again, after a crash or a lost message, then starts from the same residual as the first time.
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
class Residuals:
    """The residuals of one device in one run, as files in ``folder``."""

    folder: Path
    device: str
    run: str

    def before(self, round: int, size: int) -> Vector:
        """Return what is left from the latest round before ``round``, float32 ``(size,)``.

        Zeros when there is none: the first round, or a device that lost its files.

        Raises:
            DataError: If the file is not one that :meth:`keep` wrote for updates of this size.
        """
        rounds = [number for number in self._rounds() if number < round]
        if not rounds:
            return np.zeros(size, dtype=np.float32)
        path = self._path(max(rounds))
        try:
            vector = load(path.read_bytes())["residual"]
        except (OSError, SafetensorError, KeyError) as error:
            raise DataError(f"{path}: not a residual; delete it to go on without one") from error
        if vector.dtype != np.float32 or vector.shape != (size,) or not np.isfinite(vector).all():
            raise DataError(
                f"{path}: holds {vector.dtype} {vector.shape}: must be finite float32 ({size},); "
                "delete it to go on without one"
            )
        return vector

    def keep(self, round: int, residual: Vector) -> None:
        """Store what ``round`` left; durable and whole on return, or not there at all.

        Raises:
            DataError: If it cannot be written.
        """
        path = self._path(round)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_suffix(".new")
            with fresh.open("wb") as file:
                file.write(save({"residual": residual.astype(np.float32)}))
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
