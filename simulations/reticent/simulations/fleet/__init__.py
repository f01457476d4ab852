"""A described fleet of devices and its virtual clock: what a plan would cost on it, without it."""

from .fleet import SimulatedFleet, granting
from .making import charging_to, check_fleet, fleet_for, priced, require_filled

__all__ = [
    "SimulatedFleet",
    "charging_to",
    "check_fleet",
    "fleet_for",
    "granting",
    "priced",
    "require_filled",
]
