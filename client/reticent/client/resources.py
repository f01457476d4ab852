"""Memory and disk: what a round needs, and what the device has to spare."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

MICROBATCH = 64
LIBRARIES = 220 * 2**20
"""What loading torch and this package adds to a ClientApp's process (measured: 190 MB and more)."""

_KERNELS = 16 * 2**20  # what torch sets up at the first pass
_NUMBER = 4
_COPIES = 16  # of the parameters: model, gradient sums, noise and coding, some in float64
_PASSES = 6  # of the activations of one example: kept, their gradients, and what a layer unfolds


@dataclass(frozen=True)
class Memory:
    """Where memory is looked up.

    Attributes:
        root: Root of the file system; another one only in tests.
    """

    root: Path = Path("/")

    def free(self) -> int | None:
        """Return the bytes that this process may still take; None if that cannot be read.

        The least of what the kernel says is available and of what every control group above this
        process leaves below its limit (``MemoryMax`` of the systemd unit). File pages that can be
        dropped count as free.
        """
        known = [value for value in (self._machine(), *self._groups()) if value is not None]
        return min(known) if known else None

    def _machine(self) -> int | None:
        for line in _lines(self.root / "proc/meminfo"):
            if line.startswith("MemAvailable:"):
                return _whole(line.split()[1], 1024)
        return None

    def _groups(self) -> list[int | None]:
        left: list[int | None] = []
        for line in _lines(self.root / "proc/self/cgroup"):
            _, controllers, path = [*line.split(":", 2), "", ""][:3]
            base = self.root / "sys/fs/cgroup"
            if controllers == "memory":
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                left += _along(base / "memory", path, *names)
            elif not controllers:
                left += _along(base, path, "memory.max", "memory.current", "inactive_file")
        return left


def disk_free(folder: Path) -> int:
    """Return the free bytes of the file system of ``folder``, for ordinary users."""
    return shutil.disk_usage(folder).free


def training_bytes(parameters: int, activations: int, batch: float, bounded: bool) -> int:
    """Return an upper estimate of what a round takes beside the libraries and the data.

    Every argument is a public constant: a refusal must not depend on how many examples are held.

    Args:
        parameters: Numbers in the student.
        activations: Numbers that the layers make of one example.
        batch: Expected examples in a batch.
        bounded: Whether at most :data:`MICROBATCH` of them are worked on at once.
    """
    at_once = math.ceil(batch + 4 * math.sqrt(batch) + 1)
    at_once = min(MICROBATCH, at_once) if bounded else at_once
    numbers = _COPIES * parameters + at_once * (_PASSES * activations + parameters)
    return _KERNELS + _NUMBER * numbers


def _along(base: Path, path: str, limit: str, usage: str, droppable: str) -> list[int | None]:
    """Return what each group from ``path`` up to the root leaves."""
    left: list[int | None] = []
    folder = base / path.strip("/")
    # In a container the path may be that of the host: what is there is looked at.
    for group in (folder, *folder.parents):
        if not group.is_relative_to(base):
            break
        most, used = _file(group / limit), _file(group / usage)
        if most is None or used is None or most >= 2**60:
            continue
        stats = dict(_pair(line) for line in _lines(group / "memory.stat"))
        left.append(max(0, most - used + (_whole(stats.get(droppable, "0")) or 0)))
    return left


def _pair(line: str) -> tuple[str, str]:
    key, _, value = line.partition(" ")
    return key, value


def _file(path: Path) -> int | None:
    lines = _lines(path)
    return _whole(lines[0]) if lines else None


def _whole(text: str, unit: int = 1) -> int | None:
    return int(text) * unit if text.strip().isdecimal() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
