"""Device time: seconds that nobody can move forward, for budgets that renew.

The wall clock is of no use for that: whoever sets it a day ahead would renew a daily budget at
once. Device time advances only by what the kernel's boot clock (``CLOCK_BOOTTIME``, which also runs
while the device sleeps and which no one can set) shows to have passed between two observations
within one boot. From one boot to another it does not advance at all, so time while switched off
does not count, and neither does anything when a ledger moves to a machine that has been up for a
year. What device time says to have passed exceeds what did pass by less than a second, and windows
stay open for that second: a budget renews late, never early.

What this trusts: the kernel. A time namespace's offset is taken out again; a kernel that lies is
not noticed.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from reticent.core.errors import LedgerError

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
OFFSETS = Path("/proc/self/timens_offsets")


@dataclass(frozen=True)
class Reading:
    """What a boot clock shows: which boot it is, and the whole seconds since it began."""

    boot: str
    uptime: int


class Clock(Protocol):
    """Anything that can tell how long a boot has lasted."""

    def read(self) -> Reading:
        """Return the present reading.

        Raises:
            LedgerError: If there is no clock that can be trusted.
        """
        ...


@dataclass(frozen=True)
class DeviceTime:
    """Device time ``at`` (whole seconds, never falling) and the reading that it was taken with.

    ``boot`` is empty when time was not observed; then the next observation adds nothing.
    """

    at: int = 0
    boot: str = ""
    uptime: int = 0

    def advanced(self, reading: Reading | None) -> DeviceTime:
        """Return the device time at ``reading``; None means that it was not observed.

        >>> DeviceTime(100, "one", 50).advanced(Reading("one", 80)).at
        130
        >>> DeviceTime(100, "one", 50).advanced(Reading("two", 7)).at  # after a reboot
        100
        >>> DeviceTime(100).advanced(Reading("one", 80)).at  # not observed before: no credit
        100
        """
        if reading is None:
            return DeviceTime(self.at)
        same = reading.boot == self.boot
        passed = max(0, reading.uptime - self.uptime) if same else 0
        return DeviceTime(self.at + passed, reading.boot, reading.uptime)


class BootClock:
    """Linux's boot clock."""

    def read(self) -> Reading:
        """Return the boot's id and its uptime, without any time namespace's offset.

        Raises:
            LedgerError: If the system has no boot clock or does not name its boots.
        """
        try:
            boot = BOOT_ID.read_text().strip()
            seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - _offset()
        except (OSError, AttributeError, ValueError, IndexError) as error:
            raise LedgerError(
                f"a budget with a window needs Linux's boot clock and {BOOT_ID}, and this system "
                f"does not give them ({error}); use a budget for life (without a window)"
            ) from error
        if not boot:
            raise LedgerError(f"{BOOT_ID}: is empty: a budget with a window needs the boot's name")
        return Reading(boot, math.floor(seconds))


def _offset() -> float:
    # In a time namespace CLOCK_BOOTTIME is shifted by what its creator chose.
    if not OFFSETS.exists():
        return 0.0
    rows = (line.split() for line in OFFSETS.read_text().splitlines())
    return sum(int(s) + int(ns) / 1e9 for name, s, ns in rows if name == "boottime")
