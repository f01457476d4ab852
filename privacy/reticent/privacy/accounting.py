"""Accountants: epsilon as a pure function of events and delta.

Three independent accountants read the same events. ``pld`` (privacy loss distributions,
dp-accounting) is the value to report: nearly exact, and rounded up. ``rdp`` (a sum of Renyi
divergences) is looser, but stays valid when parameters are chosen adaptively. ``prv`` (Opacus) is
a second implementation of what ``pld`` computes, to check it against. None of them averages
parameters or composes event by event epsilon, and none returns less than the truth.

``pld`` and ``rdp`` know both neighbouring relations of :class:`.PoissonGaussian`; ``prv`` knows
``add-or-remove-one`` only and refuses the other.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.metadata import version
from operator import attrgetter

import numpy as np

from reticent.core.errors import PrivacyError

from .events import Event, NonPrivate, PoissonGaussian, merge
from .losses import CELLS, COARSEST, USUAL, compose, interval_for, usable_delta
from .renyi import ORDERS, renyi

__all__ = [
    "ACCOUNTANTS",
    "ORDERS",
    "describe",
    "epsilon",
    "epsilon_curve",
    "renyi",
    "require_delta",
    "require_one_unit",
    "spent",
]

ACCOUNTANTS = ("pld", "rdp", "prv")
LARGEST_PRV, MOST_PRV_CELLS = 250.0, 4e6  # beyond, Opacus' PRV accountant is slow or never ends


def epsilon(
    events: Iterable[Event], delta: float, accountant: str = "pld", *, alike: bool = True
) -> float:
    """Return an upper bound on the epsilon of all ``events`` together, at ``delta``.

    No events give 0, as do :class:`.DeclaredPublic` ones, and a :class:`.NonPrivate` event gives
    infinity. The order of the events does not matter; equal calls are answered from memory.

    Args:
        events: What happened, with any mixture of parameters.
        delta: In (0, 1).
        accountant: ``pld``, ``rdp`` or ``prv``.
        alike: Whether events of different relations are refused. Without it, the caller knows that
            each event, under its relation, bounds what the *same* neighbours do.

    Raises:
        PrivacyError: If ``delta`` or ``accountant`` is not allowed, if events of different units,
            or ``alike`` of different relations, are mixed, or if ``prv`` is asked for the relation
            ``replace-one`` or for an epsilon that is out of its reach.
    """
    require_delta(delta)
    if accountant not in ACCOUNTANTS:
        raise PrivacyError(f"accountant={accountant!r}: must be one of {', '.join(ACCOUNTANTS)}")
    gaussians = spent(events, alike=alike)
    if gaussians is None:
        return math.inf
    return _epsilon(gaussians, float(delta), accountant) if gaussians else 0.0


def spent(events: Iterable[Event], *, alike: bool = True) -> tuple[PoissonGaussian, ...] | None:
    """Return what ``events`` spend, merged and in a fixed order; None if something was not private.

    Raises:
        PrivacyError: If events of different units are mixed, or with ``alike`` of relations.
    """
    merged = merge(events)
    gaussians = [event for event in merged if isinstance(event, PoissonGaussian)]
    if any(isinstance(event, NonPrivate) for event in merged):
        return None
    _require_alike(gaussians, alike)
    key = attrgetter("sampling_rate", "noise_multiplier", "relation")
    return tuple(sorted(gaussians, key=key))


def epsilon_curve(event: Event, rounds: Sequence[int], delta: float) -> list[float]:
    """Return the ``pld`` epsilon after each number of rounds of one ``event`` each (0 allowed)."""
    return [epsilon([event.times(count)] if count else [], delta) for count in rounds]


def describe(accountant: str = "pld") -> str:
    """Return a line for the report: method, library and version, discretisation."""
    if accountant == "pld":
        return (
            f"privacy loss distributions, dp-accounting {version('dp-accounting')}, pessimistic "
            f"connect-the-dots, discretisation interval {USUAL:g} or finer (coarser only where "
            f"the composed distribution would need more than {CELLS:g} cells; the bound by Renyi "
            "divergences where that grid gives no less)"
        )
    if accountant == "rdp":
        return (
            f"Renyi divergences of the sampled Gaussian at {len(ORDERS)} orders from "
            f"{ORDERS[0]:g} to {ORDERS[-1]:g}, SciPy {version('scipy')}"
        )
    if accountant == "prv":
        return f"privacy random variables, Opacus {version('opacus')}, upper end of its interval"
    raise PrivacyError(f"accountant={accountant!r}: must be one of {', '.join(ACCOUNTANTS)}")


def require_delta(delta: float) -> None:
    """Raise :class:`PrivacyError` unless ``delta`` lies in (0, 1)."""
    if not 0 < delta < 1:
        raise PrivacyError(f"delta={delta!r}: must be > 0 and < 1")


def require_one_unit(events: Iterable[Event]) -> None:
    """Raise :class:`PrivacyError` if ``events`` are about different units or relations."""
    _require_alike([event for event in merge(events) if isinstance(event, PoissonGaussian)])


def _require_alike(events: Sequence[PoissonGaussian], relation: bool = True) -> None:
    kinds = {(event.unit, event.relation if relation else "any") for event in events}
    if len(kinds) > 1:
        names = sorted(f"{unit}/{which}" for unit, which in kinds)
        raise PrivacyError(
            f"events of {' and '.join(names)}: must agree in unit and relation, because an epsilon "
            "over different ones has no meaning"
        )


@lru_cache(maxsize=4096)
def _epsilon(events: tuple[PoissonGaussian, ...], delta: float, accountant: str) -> float:
    return {"pld": _pld, "rdp": _rdp, "prv": _prv}[accountant](events, delta)


def _pld(events: tuple[PoissonGaussian, ...], delta: float) -> float:
    usable, interval = usable_delta(events, delta), interval_for(events)
    if usable is None or interval > COARSEST:
        return _rdp(events, delta)
    value = float(compose(events).get_epsilon_for_delta(usable))
    return value if interval <= USUAL else min(value, _rdp(events, delta))


def _rdp(events: tuple[PoissonGaussian, ...], delta: float) -> float:
    total = np.sum(
        [e.steps * renyi(e.sampling_rate, e.noise_multiplier, e.relation) for e in events],
        axis=0,
    )
    # Canonne, Kamath and Steinke 2020, proposition 12; every order gives a valid bound.
    bounds = total + np.log1p(-1 / ORDERS) - (math.log(delta) + np.log(ORDERS)) / (ORDERS - 1)
    return max(0.0, float(bounds.min()))


def _prv(events: tuple[PoissonGaussian, ...], delta: float) -> float:
    """Privacy random variables (Gopi, Lee and Wutschitz 2021)."""
    if others := {event.relation for event in events} - {"add-or-remove-one"}:
        raise PrivacyError(
            f"accountant='prv' with relation={others.pop()!r}: must be "
            "'add-or-remove-one', the only relation it knows; use 'pld'"
        )
    bound = _rdp(events, delta)
    error = min(max(bound / 1000, 1e-3), 1e-2)
    mesh = error / math.sqrt(sum(e.steps for e in events) * math.log(12e3 / delta) / 2)
    if bound > LARGEST_PRV or 2 * (bound + 3) / mesh > MOST_PRV_CELLS:
        raise PrivacyError(
            f"accountant='prv' with an epsilon of up to {bound:.4g} after "
            f"{sum(e.steps for e in events)} steps: must be at most {LARGEST_PRV:g} and fit a mesh "
            f"of {MOST_PRV_CELLS:g} cells; use 'pld'"
        )
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(e.noise_multiplier, e.sampling_rate, e.steps) for e in events]
    # Its own choice of Renyi orders and log(0) at q = 1 warn without consequence for the bound.
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta, eps_error=error))
