"""What it costs to publish one of many runs on the same private data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from reticent.core.errors import PrivacyError

from .accounting import require_delta, spent
from .events import Event, NonPrivate, PoissonGaussian, merge
from .renyi import ORDERS, renyi


def in_terms_of(events: Sequence[Event], unit: str, relation: str) -> list[Event]:
    """Return ``events`` as they bound what one ``unit`` under ``relation`` may change.

    Guarantee: the epsilon of what is returned is one of the mechanisms that were run, for
    neighbours of that unit and relation. A noise multiplier is the noise over what *one* unit adds,
    so the same number stands under either relation. An example is part of a client, who is there
    with it and without it, in the same sample, and contributes within the bound C both times: of
    client-level noise an added or removed example is a client who is *exchanged*. So an event of
    unit ``client`` keeps ``replace-one`` where examples are asked for under either relation. Its
    pair of distributions dominates (:mod:`.mixtures`, k = 1), and domination survives composition
    with the pairs of other events; accountants take them with ``alike=False``. Nothing bounds how
    many examples a client has, so example-level noise says nothing about one.
    """
    return [_in_terms_of(event, unit, relation) for event in merge(events)]


def _in_terms_of(event: PoissonGaussian | NonPrivate, unit: str, relation: str) -> Event:
    if isinstance(event, NonPrivate) or (event.unit == "example" and unit == "client"):
        return NonPrivate()
    exchanged = event.unit == "client" and unit == "example"
    return replace(event, unit=unit, relation="replace-one" if exchanged else relation)


def selection_epsilon(
    histories: Sequence[Sequence[Event]], delta: float, mean_runs: float
) -> float:
    """Return the epsilon of publishing only the best of a *random* number of random runs.

    Papernot and Steinke 2022 ("Hyperparameter tuning with Renyi differential privacy", theorem 2
    with eta = 1): the number of runs is geometric with mean ``mean_runs``, each run draws one of
    the settings whose events are ``histories`` at random, and nothing but the best run, by a score
    that is no function of private data except through the runs, is ever seen. It does not hold for
    a fixed list of runs: those compose.

    Args:
        histories: Events of one run of each setting, as :func:`in_terms_of` gives them; the worst
            of them counts.
        delta: In (0, 1).
        mean_runs: At least 1.

    Raises:
        PrivacyError: If ``delta`` or ``mean_runs`` is out of range, nothing is given, or events of
            different units are mixed.
    """
    require_delta(delta)
    if not histories or not mean_runs >= 1:
        raise PrivacyError(f"mean_runs={mean_runs!r} of {len(histories)} settings: both >= 1")
    merged = [spent(events, alike=False) for events in histories]
    if any(events is None for events in merged):
        return math.inf
    curve = np.max([_renyi(events) for events in merged if events is not None], axis=0)
    # (1 + eta)((1 - 1/λ') ε(λ') + log(1/γ) / λ') at the best λ'; γ = 1 / mean for eta = 1.
    tried = (1 - 1 / ORDERS) * curve + math.log(mean_runs) / ORDERS
    total = curve + 2 * float(tried.min()) + math.log(mean_runs) / (ORDERS - 1)
    # Canonne, Kamath and Steinke 2020, proposition 12; every order gives a valid bound.
    bounds = total + np.log1p(-1 / ORDERS) - (math.log(delta) + np.log(ORDERS)) / (ORDERS - 1)
    return max(0.0, float(bounds.min()))


def _renyi(events: Sequence[PoissonGaussian]) -> np.ndarray:
    curves = [e.steps * renyi(e.sampling_rate, e.noise_multiplier, e.relation) for e in events]
    return np.sum([np.zeros_like(ORDERS), *curves], axis=0)
