"""Driving a delivery: a SuperLink, a ServerApp that brings a model to devices, and its progress."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reticent.core.errors import NetworkError
from reticent.core.plan import Plan

from .attempt import FAILED, FINISHED, Attempt, error_of, read_attempt
from .certificates import utc_now
from .enrolment import synchronize
from .flower import START_SECONDS, Flower, SuperLink, answers, superlink
from .home import Home
from .offers import INSTALLED, Parcel, Shipment
from .operate import write_app
from .registry import read_registry

DELIVERY_APP = "reticent.server.delivery:app"
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class How:
    """What an operator may choose about a delivery.

    Attributes:
        version: The model's number; None for the one it has, or the next.
        timeout: Seconds until devices that do not have it by then are given up.
        chunk: Most bytes of the model in a message.
    """

    version: int | None = None
    timeout: float = 600.0
    chunk: int = 256 * 1024


@dataclass(frozen=True)
class Delivery:
    """One call of ``reticent server deliver``.

    Attributes:
        home: The server.
        shipment: What is delivered.
        plan: The plan that its model was trained by.
        devices: Names of the devices.
        say: Takes a line for a person.
        how: What the operator chose.
    """

    home: Home
    shipment: Shipment
    plan: Plan
    devices: tuple[str, ...]
    say: Callable[[str], None]
    how: How = How()

    def deliver(self) -> dict[str, Parcel]:
        """Deliver, and return how far the model came to each device.

        What arrived stays on the devices: delivering again goes on from there.

        Raises:
            ReticentError: What the ServerApp failed with, or why there was none.
        """
        flower = Flower(self.home)
        with superlink(self.home, self.home.log) as link:
            synchronize(self.home, flower, utc_now(), self.say)
            token = secrets.token_hex(8)
            run = flower.submit(self._app(), {"attempt": token})
            try:
                self._watch(token, link)
            finally:
                if answers(self.home):
                    flower.stop(run)
        return self.shipment.progress()

    def _app(self) -> Path:
        folder = self.shipment.folder / "app"
        folder.mkdir(mode=0o700, exist_ok=True)
        settings = {
            "state-dir": str(self.home.folder),
            "version": self.shipment.offer.version,
            "devices": ",".join(self.devices),
            "timeout": float(self.how.timeout),
            "chunk": self.how.chunk,
            "attempt": "",
        }
        write_app(folder, self.plan, self.home, settings, DELIVERY_APP)
        return folder

    def _watch(self, token: str, link: SuperLink | None) -> None:
        """Show what happens until the ServerApp has ended.

        Raises:
            ReticentError: Why it did.
        """
        deadline, shown = time.monotonic() + START_SECONDS, dict[str, str]()
        while True:
            attempt = read_attempt(self.shipment.run)
            mine = attempt if attempt is not None and attempt.token == token else None
            if mine is not None:
                self._show(shown)
            if mine is None and time.monotonic() > deadline:
                raise NetworkError(f"the ServerApp did not begin; see {self.home.log}")
            if link is not None and link.ended():
                raise NetworkError(f"the SuperLink died; see {self.home.log}")
            if mine is not None and _ended(mine):
                return
            time.sleep(_POLL_SECONDS)

    def _show(self, shown: dict[str, str]) -> None:
        for name, parcel in self.shipment.progress().items():
            if shown.get(name) != parcel.words:
                shown[name] = parcel.words
                self.say(f"{name}: {parcel.words}")


def receivers(home: Home, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the devices to deliver to: those named, or all that are welcome.

    Raises:
        ProvisionError: If one of the names is not enrolled, or was revoked.
        NetworkError: If no device is enrolled.
    """
    registry = read_registry(home.devices)
    for name in names:
        registry.named(name)
    welcome = [n for n, device in sorted(registry.devices.items()) if device.revoked is None]
    if not welcome:
        raise NetworkError("no device is enrolled: `reticent server enroll` does that")
    return tuple(dict.fromkeys(names)) or tuple(welcome)


def require_delivered(shipment: Shipment, parcels: dict[str, Parcel]) -> None:
    """Check that a model is installed everywhere.

    Raises:
        NetworkError: Naming the devices on which it is not.
    """
    left = [f"{name} ({p.words})" for name, p in parcels.items() if p.state != INSTALLED]
    if left:
        raise NetworkError(
            f"model {shipment.offer.version} is not installed on {', '.join(left)}; delivering it "
            "again goes on where it stopped"
        )


def _ended(attempt: Attempt) -> bool:
    """Return whether the ServerApp is through.

    Raises:
        ReticentError: If it failed.
    """
    if attempt.state == FAILED:
        raise error_of(attempt)
    if attempt.state != FINISHED and not attempt.alive():
        raise NetworkError("the ServerApp died; delivering again goes on where it stopped")
    return attempt.state == FINISHED
