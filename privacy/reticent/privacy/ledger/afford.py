"""Whether a round still fits a budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..accounting import ORDERS, epsilon, renyi, require_one_unit
from ..calibrate import max_rounds
from ..events import Event, NonPrivate, PoissonGaussian, event_from_json, merge
from .records import Budget

History = tuple[tuple[str, int], ...]
"""Distinct events as JSON, each with its number of charges."""


class Afford:
    """Whether one event fits a budget after a history; equal histories are priced once.

    While every round charged had the same event, or all of them merge into one kind of step, the
    exact (``pld``) epsilon decides: that event was fixed before anything was released, and a server
    that then chooses when to stop learns no more than from the longest run that fits.

    From the first differing event on, a Renyi filter decides: the divergences of all rounds at one
    order must sum to no more than what that order allows (Feldman and Zrnic 2021, theorem 4.3;
    Lecuyer 2021), which stays valid when a server chooses parameters after seeing releases. The
    order is fixed by the budget and the device's first charge with noise, before any release that
    the budget bounds; the best order for each history, which is what the ``rdp`` accountant takes,
    would let a server steer towards the order that suits what it saw, and no theorem covers that.

    A server that moves from the first rule to the second in the light of releases gets at most
    (epsilon, 2 delta), because each rule alone keeps the paths it decides within delta. One that
    follows a plan fixed in advance gets (epsilon, delta).
    """

    def __init__(self, event: Event, budget: Budget) -> None:
        """Price ``event`` against ``budget``."""
        self._event, self._budget = event, budget
        self._text, self._private = text_of(event), bool(merge([event]))
        self._known: dict[tuple[History, History], float | None] = {}

    def refusal(self, lifetime: History, counted: History) -> float | None:
        """Return None if the event fits, else the epsilon that already counts.

        Args:
            lifetime: Everything ever charged to the device, in order of first charge.
            counted: What of it counts against the budget now.

        Raises:
            PrivacyError: If the event is about another unit or relation than an earlier one.
        """
        known = lifetime, counted
        if known not in self._known:
            require_one_unit([*merged(lifetime), self._event])
            fits = self.fits(lifetime, counted)
            self._known[known] = None if fits else epsilon(merged(counted), self._budget.delta)
        return self._known[known]

    def fits(self, lifetime: History, counted: History) -> bool:
        """Tell whether the event fits after ``counted``."""
        limit, delta = self._budget.epsilon, self._budget.delta
        if math.isinf(limit) or not self._private:
            return True
        past = [(text, charges) for text, charges in counted if _private(text)]
        total = merge([*merged(tuple(past)), self._event])
        if any(isinstance(event, NonPrivate) for event in total):
            return False
        if len(total) == 1:
            return _exact(total, replace(_gaussians(total)[0], steps=1), limit, delta)
        if all(text == self._text for text, _ in past):
            return _exact(total, self._event, limit, delta)
        first = next((text for text, _ in lifetime if _noised(text)), self._text)
        return _filter_fits(total, first, limit, delta)


def merged(history: History) -> tuple[Event, ...]:
    """Return what happened, with equal steps summed."""
    return _merged(tuple(sorted(history)))


@lru_cache(maxsize=256)
def text_of(event: Event) -> str:
    """Return an event's canonical JSON; the ledger asks once a client and round."""
    return event.to_json()


@lru_cache(maxsize=4096)
def _merged(history: History) -> tuple[Event, ...]:
    return tuple(merge(_parsed(text).times(charges) for text, charges in history))


@lru_cache(maxsize=4096)
def _parsed(text: str) -> Event:
    return event_from_json(text)


@lru_cache(maxsize=4096)
def _private(text: str) -> bool:
    return bool(merge([_parsed(text)]))


@lru_cache(maxsize=4096)
def _noised(text: str) -> bool:
    # Of a charge without privacy, which has left the window, no order can be told.
    return bool(_gaussians([_parsed(text)]))


def _gaussians(events: Iterable[Event]) -> list[PoissonGaussian]:
    return [event for event in merge(events) if isinstance(event, PoissonGaussian)]


def _exact(total: Sequence[Event], unit: Event, limit: float, delta: float) -> bool:
    """Tell whether ``total``, a whole number of ``unit``, fits by ``pld``."""
    one, all_ = (sum(e.steps for e in _gaussians(events)) for events in ([unit], total))
    # The second test settles what the search's last digits might not; it is rarely reached.
    return all_ // one <= max_rounds(limit, delta, unit) or epsilon(total, delta) <= limit


def _filter_fits(events: Sequence[Event], first: str, limit: float, delta: float) -> bool:
    order = _order(first, limit, delta)
    spent = sum(float(_divergence(event)[order]) for event in _gaussians(events))
    return spent <= _allowed(limit, delta)[order]


@lru_cache(maxsize=256)
def _order(text: str, limit: float, delta: float) -> int:
    """Return the index of the order at which most rounds like the first one fit."""
    one = sum((_divergence(event) for event in _gaussians([_parsed(text)])), np.zeros(len(ORDERS)))
    return int(np.argmax(_allowed(limit, delta) / np.maximum(one, 1e-300)))


@lru_cache(maxsize=64)
def _allowed(limit: float, delta: float) -> NDArray[np.float64]:
    """Return the divergence that each order may reach: Canonne, Kamath and Steinke 2020, prop. 12.

    The ``rdp`` accountant is that proposition in the other direction.
    """
    spare = np.log1p(-1 / ORDERS) - (math.log(delta) + np.log(ORDERS)) / (ORDERS - 1)
    return limit - spare


def _divergence(event: PoissonGaussian) -> NDArray[np.float64]:
    return event.steps * renyi(event.sampling_rate, event.noise_multiplier, event.relation)
