"""How many cores this process may use."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

CGROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Return the number of cores that this process may use, at least 1.

    Those of its affinity, or the whole cores of its CPU quota if these are fewer: a container of
    two cores sees all of the machine's.
    """
    return max(1, min(len(os.sched_getaffinity(0)), int(quota(CGROUPS, OWN))))


def quota(cgroups: Path, own: Path) -> float:
    """Return the cores that the control groups (version 2) above this process allow.

    The smallest ``cpu.max`` from its own group up counts; without one, or where it cannot be read,
    it is 2^20 cores.

    Args:
        cgroups: Where the groups are mounted.
        own: Tells the group of this process.
    """
    least = 2.0**20
    with suppress(OSError, ValueError, StopIteration):
        lines = own.read_text(encoding="utf-8").splitlines()
        name = next(line for line in lines if line.startswith("0::/"))[len("0::/") :]
        group = cgroups / name
        for folder in (group, *group.parents):
            if folder.is_relative_to(cgroups):
                least = min(least, _limit(folder / "cpu.max"))
    return least


def _limit(file: Path) -> float:
    with suppress(OSError, ValueError, ZeroDivisionError):
        allowed, period = file.read_text(encoding="utf-8").split()
        return int(allowed) / int(period)  # "max" is no limit, and no number
    return float("inf")
