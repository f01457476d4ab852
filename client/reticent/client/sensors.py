"""What a Linux device knows about its own state; what cannot be read is None, never a guess."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_CALL_SECONDS = 5.0
_EXTERNAL = {"Mains", "USB", "Wireless", "UPS"}
_RESTING = {"Full", "Not charging"}


@dataclass(frozen=True)
class Readings:
    """One look at the device.

    Attributes:
        charging: Whether an external supply is online, or a battery fills from one that is not
            listed; a device without batteries and without any listed supply says None.
        battery: Share of charge of the emptiest battery, 0 to 1.
        metered: Whether the connection is metered, or NetworkManager guesses that it is.
        celsius: Temperature of the hottest thermal zone.
        pressure: Share of the last minute in which some task waited for the processor.
    """

    charging: bool | None = None
    battery: float | None = None
    metered: bool | None = None
    celsius: float | None = None
    pressure: float | None = None


def ask_network_manager() -> str:
    """Return what NetworkManager says of each device's connection; empty where there is none."""
    command = shutil.which("nmcli")
    if command is None:
        return ""
    words = [command, "-t", "-f", "GENERAL.STATE,GENERAL.METERED", "device", "show"]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=_CALL_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


@dataclass(frozen=True)
class Sensors:
    """Where the state is read from.

    Attributes:
        root: Root of the file system; another one only in tests.
        network: Returns NetworkManager's answer.
    """

    root: Path = Path("/")
    network: Callable[[], str] = ask_network_manager

    def read(self) -> Readings:
        """Look at everything once."""
        return Readings(
            charging=self._charging(),
            battery=self._battery(),
            metered=metered(self.network()),
            celsius=self._celsius(),
            pressure=self._pressure(),
        )

    def _supplies(self) -> Iterator[tuple[str, Path]]:
        for folder in sorted(self.root.glob("sys/class/power_supply/*")):
            if _word(folder / "scope") != "Device":  # a mouse's battery is not ours
                yield _word(folder / "type") or "", folder

    def _charging(self) -> bool | None:
        states = [_number(f / "online") for kind, f in self._supplies() if kind in _EXTERNAL]
        known = [state for state in states if state is not None]
        # Some boards list not every supply; a battery that fills does so from one of them.
        fills = [_word(f / "status") for kind, f in self._supplies() if kind == "Battery"]
        if any(known) or "Charging" in fills:
            return True
        if known or "Discharging" in fills:
            return False
        # A battery is full for a while after it was unplugged, too: that is taken for an answer
        # only where nothing else could give one.
        return True if not states and any(word in _RESTING for word in fills) else None

    def _battery(self) -> float | None:
        found = [_number(f / "capacity") for kind, f in self._supplies() if kind == "Battery"]
        levels = [level for level in found if level is not None and 0 <= level <= 100]
        return min(levels) / 100 if levels else None

    def _celsius(self) -> float | None:
        zones = self.root.glob("sys/class/thermal/thermal_zone*/temp")
        degrees = [value / 1000 for zone in zones if (value := _number(zone)) is not None]
        # Zones that are switched off report 0, or far below: they are no temperature of a device.
        real = [value for value in degrees if -40 < value < 200 and value != 0]
        return max(real) if real else None

    def _pressure(self) -> float | None:
        for line in (_text(self.root / "proc/pressure/cpu") or "").splitlines():
            words = line.split()
            if words[:1] == ["some"]:
                values = [word[6:] for word in words if word.startswith("avg60=")]
                return _share(values[0]) if values else None
        return None


def metered(answer: str) -> bool | None:
    """Return whether a connection of ``nmcli device show`` is metered; None if nobody knows.

    One metered connection is enough: which one carries the traffic is the kernel's choice.
    """
    said: list[str] = []
    connected = False
    for line in answer.splitlines():
        key, _, value = line.partition(":")
        if key == "GENERAL.STATE":
            connected = value.startswith("100")
        elif key == "GENERAL.METERED" and connected:
            said.append(value.strip().lower())
    if any(word.startswith("yes") for word in said):
        return True
    return False if any(word.startswith("no") for word in said) else None


def _share(text: str) -> float | None:
    try:
        value = float(text) / 100
    except ValueError:
        return None
    return value if 0 <= value <= 1 else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None


def _word(path: Path) -> str | None:
    text = _text(path)
    return text.strip() if text else None


def _number(path: Path) -> float | None:
    try:
        return float(_word(path) or "")
    except ValueError:
        return None
