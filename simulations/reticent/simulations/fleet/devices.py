"""The devices of a fleet, each derived from the seed and its index: a million cost nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from reticent.core.fleet import Figures, Fleet
from reticent.core.seeds import derive_key
from reticent.core.uniforms import uniforms

Clients = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Traits:
    """Figures of some devices, one value a device.

    Attributes:
        kind: Position of the device's class among the fleet's.
        slowdown: Time of start-up over that on the reference machine.
        step_slowdown: Time of a step over that on the reference machine.
        down: Bytes a second down.
        up: Bytes a second up.
        latency: Seconds before the first byte of a transfer.
        dropout: Probability of being lost before the answer.
        fits: Whether its memory holds the training.
        compute_watts: Power while training.
        radio_watts: Power while transferring.
    """

    kind: NDArray[np.int64]
    slowdown: Floats
    step_slowdown: Floats
    down: Floats
    up: Floats
    latency: Floats
    dropout: Floats
    fits: NDArray[np.bool_]
    compute_watts: Floats
    radio_watts: Floats


@dataclass(frozen=True)
class Description:
    """A population, as a plan describes it.

    A device's class is drawn by the classes' shares; its speed and its network differ from their
    class's by log-normal factors of median 1 (``spread``). All of it is a function of the seed and
    the device's index (:mod:`reticent.core.uniforms`); nothing is stored.

    Attributes:
        fleet: The plan's section.
        seed: The plan's seed.
        memory: Bytes that training takes on a device.
    """

    fleet: Fleet
    seed: int
    memory: float

    def traits(self, clients: Clients) -> Traits:
        """Return the figures of ``clients``, int64 ``(n,)``."""
        kind = self.kinds(clients)
        of = {name: values[kind] for name, values in self._figures.items()}
        speed = self.factors(clients, self.fleet.spread, "speed")
        rate = self.factors(clients, self.fleet.spread, "network") * 1e6 / 8
        return Traits(
            kind=kind,
            slowdown=of["slowdown"] * speed,
            step_slowdown=of["step_slowdown"] * speed,
            down=of["down"] * rate,
            up=of["up"] * rate,
            latency=of["latency"],
            dropout=of["dropout"],
            fits=of["memory"] >= self.memory,
            compute_watts=of["compute_watts"],
            radio_watts=of["radio_watts"],
        )

    def kinds(self, clients: Clients) -> NDArray[np.int64]:
        """Return the class of each client, as its position among the fleet's classes."""
        shares = np.array([group.share for group in self.fleet.groups])
        borders = np.cumsum(shares / shares.sum())[:-1]
        return np.searchsorted(borders, self.coins(clients, "class"), side="right")

    def factors(self, clients: Clients, deviation: float, *path: str | int) -> Floats:
        """Return a log-normal factor of median 1 for each client, drawn for ``path``."""
        return np.exp(deviation * ndtri(self.coins(clients, *path)))

    def coins(self, clients: Clients, *path: str | int) -> Floats:
        """Return a draw from U(0, 1) for each client, drawn for ``path``."""
        return uniforms(derive_key(self.seed, "fleet", *path), clients)

    @cached_property
    def _figures(self) -> dict[str, Floats]:
        groups, step = self.fleet.groups, self.fleet.step_seconds
        return {
            name: np.array([getattr(group.figures, name) for group in groups])
            for name in Figures.__dataclass_fields__
        } | {"step_slowdown": np.array([group.step_slowdown(step) for group in groups])}
