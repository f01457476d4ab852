"""Against whom the promise holds: one row for each adversary, with its own number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..accounting import epsilon
from ..events import Event, PoissonGaussian
from ..schedule import Schedule
from .spending import apart, with_noise
from .words import certainty, portable, tier

READERS = "Readers of the models"
FELLOWS = "Another client"
SERVER = "The server"
NETWORK = "Someone on the network"
_MODELS = "the released models of every round"


_LENGTHS = "the models, who took part, and the length of every encrypted update"


@dataclass(frozen=True)
class _View:
    """One adversary: what it sees, what is assumed, and its share of the noise's deviation.

    A ``factor`` of 0 means that it faces no noise at all: its epsilon is infinite.
    """

    name: str
    sees: str
    assumes: str
    factor: float


def adversary_rows(
    schedule: Schedule | None, events: Sequence[Event], delta: float, padded: bool
) -> list[dict[str, Any]]:
    """Return a row for each adversary, for the client whose history is ``events``.

    Under aggregator trust the server sees single shares, each with the noise multiplier divided by
    sqrt(shares); a client knows its own share, so for it the sum carries one share less. With
    client-level privacy the server adds the noise itself: a client knows nothing of it, and the
    server faces none. ``padded`` says whether updates have a public length: whether one is longer
    than that still depends on it, so it changes the words and no number.
    """
    if schedule is None:
        return [_row(view, events, delta, None) for view in _unprotected()]
    if schedule.unit == "client":
        views = _client_level(padded, schedule.secret)
    else:
        local = schedule.trust == "local"
        views = _local(padded) if local else _aggregator(schedule.shares, padded)
    return [_row(view, events, delta, schedule.earlier) for view in views]


def _row(
    view: _View, events: Sequence[Event], delta: float, earlier: PoissonGaussian | None
) -> dict[str, Any]:
    # Weights that were trained before show the same to everybody: their noise is no share.
    rounds, before = apart(events, earlier)
    faced = [*before, *with_noise(rounds, view.factor)] if view.factor else None
    value = portable(math.inf if faced is None else epsilon(faced, delta))
    return {
        "name": view.name,
        "sees": view.sees,
        "assumes": view.assumes,
        "epsilon": value,
        "delta": None if faced is None else delta,
        "verdict": tier(value),
        "certainty_from_half": certainty(value),
        "certainty_from_thousandth": certainty(value, 0.001),
        "events": [asdict(event) for event in faced or () if isinstance(event, PoissonGaussian)],
    }


def _unprotected() -> list[_View]:
    return [
        _View(READERS, _MODELS, "nothing is promised", 0.0),
        _View(SERVER, "every client's own update", "nothing is promised", 0.0),
    ]


def _local(padded: bool) -> list[_View]:
    own = "each client adds the full noise itself, so nobody else has to be trusted"
    return [
        _View(READERS, _MODELS, own, 1.0),
        _View(SERVER, "every client's own update, and who took part", own, 1.0),
        _network(_lengths(padded, "the noised values alone"), 1.0),
    ]


def _network(why: str, factor: float) -> _View:
    """Return the view of one who reads lengths: at most what the server sees."""
    return _View(
        NETWORK, _LENGTHS, f"connections are encrypted{why}; times are not covered", factor
    )


def _lengths(padded: bool, source: str) -> str:
    if not padded:
        return f"; a length follows from {source}"
    return (
        f"; lengths are padded, and how often one is beyond the common length follows from {source}"
    )


def _client_level(padded: bool, secret: bool) -> list[_View]:
    trusted = (
        "the server bounds every client's update, adds the noise to their sum and shows nobody "
        "more than the models"
    )
    if secret:
        trusted += ", not who took part either, whom it draws by a coin for each client and round"
    return [
        _View(READERS, _MODELS, trusted, 1.0),
        _View(
            FELLOWS,
            "the models, and the update that it sent itself",
            "as above; it knows none of the noise, so its own update helps it against no other "
            "client, and neither do those of clients that it works with",
            1.0,
        ),
        _View(
            SERVER,
            "every client's own bounded update, without noise",
            "the server is trusted to look only at the sum; nothing is promised if it does not",
            0.0,
        ),
        _network(_lengths(padded, "an update without noise, so nothing is promised"), 0.0),
    ]


def _aggregator(shares: int, padded: bool) -> list[_View]:
    return [
        _View(
            READERS,
            _MODELS,
            f"at least {shares} clients of each round add their share of the noise and keep it to "
            "themselves, and the server shows nobody more than the models",
            1.0,
        ),
        _View(
            FELLOWS,
            "the models, and the share of noise that it added itself",
            "as above, and it works with no other client (k clients together take away k shares)",
            # Beside an attacker there is a victim, so at least one share is always left.
            math.sqrt(max(shares - 1, 1) / shares),
        ),
        _View(
            SERVER,
            "every client's own update, with that client's share of the noise only",
            "the server is trusted to look only at the sum, because there is no secure "
            "aggregation; this number is what remains if it does not",
            1 / math.sqrt(shares),
        ),
        _network(
            _lengths(padded, "one share's noised values")
            + ", so this is at most what the server would learn",
            1 / math.sqrt(shares),
        ),
    ]
