"""Device profiles: the memory and the cores of a device, to be imposed on a measurement here.

A profile emulates how much memory and how many cores a device has. It does not emulate its
processor: times are those of this machine's cores.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from reticent.core.errors import DataError

_UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
# So many digits that none is above what can be parsed at once.
_AMOUNT = re.compile(rf"([0-9]{{1,18}})({'|'.join(_UNITS)})")
_COUNT = re.compile(r"[0-9]{1,9}")
_MOST_MEMORY = 2**50


@dataclass(frozen=True)
class Profile:
    """What a device has.

    Attributes:
        name: As given.
        memory_bytes: Memory that one process may allocate; None sets no limit.
        cpus: Number of cores; None means all of this machine's.
    """

    name: str
    memory_bytes: int | None
    cpus: int | None


NO_LIMITS = Profile("none", None, None)
PROFILES = {
    p.name: p
    for p in (
        Profile("pi4", 10**9, 4),
        Profile("pizero2", 512 * 10**6, 4),
        Profile("gateway", 256 * 10**6, 1),
    )
}


def parse_profile(text: str) -> Profile:
    """Return the profile of a name, or of limits such as ``memory=256MB,cpus=1``.

    >>> parse_profile("memory=64MB,cpus=1")
    Profile(name='memory=64MB,cpus=1', memory_bytes=64000000, cpus=1)

    Raises:
        DataError: If it is neither.
    """
    if text in PROFILES:
        return PROFILES[text]
    limits: dict[str, int] = {}
    for part in text.split(","):
        key, _, value = part.strip().partition("=")
        if key in limits or key not in ("memory", "cpus"):
            raise _refused(text)
        limits[key] = _bytes(value, text) if key == "memory" else _count(value, text)
    return Profile(text, limits.get("memory"), limits.get("cpus"))


def _bytes(value: str, text: str) -> int:
    match = _AMOUNT.fullmatch(value)
    if match is None:
        raise _refused(text)
    amount = int(match[1]) * _UNITS[match[2]]
    if not 0 < amount <= _MOST_MEMORY:
        raise _refused(text)
    return amount


def _count(value: str, text: str) -> int:
    if _COUNT.fullmatch(value) is None or int(value) == 0:
        raise _refused(text)
    return int(value)


def _refused(text: str) -> DataError:
    return DataError(
        f'device profile "{text}": must be one of {", ".join(PROFILES)}, or limits such as '
        f"memory=256MB,cpus=1 (memory in {', '.join(_UNITS)}, above 0 and at most "
        f"{_MOST_MEMORY // 2**30:,} GiB; cpus a whole number from 1)"
    )
