"""Against whom the promise holds: one row for each adversary, with its own number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..accounting import epsilon
from ..events import Event, PoissonGaussian
from ..schedule import Schedule
from .spending import with_noise
from .words import certainty, portable, tier

_READERS = "Readers of the models"
_FELLOWS = "Another client"
_SERVER = "The server"


@dataclass(frozen=True)
class _View:
    """One adversary: what it sees, what is assumed, and its share of the noise's deviation."""

    name: str
    sees: str
    assumes: str
    factor: float


def adversary_rows(
    schedule: Schedule | None, events: Sequence[Event], delta: float
) -> list[dict[str, Any]]:
    """Return a row for each adversary, for the client whose history is ``events``.

    Under aggregator trust the server sees single shares, each with the noise multiplier divided by
    sqrt(shares); a client knows its own share, so for it the sum carries one share less.
    """
    if schedule is None:
        return [_row(view, None, delta) for view in _unprotected()]
    views = _local() if schedule.trust == "local" else _aggregator(schedule.shares)
    return [_row(view, with_noise(events, view.factor), delta) for view in views]


def _row(view: _View, events: list[Event] | None, delta: float) -> dict[str, Any]:
    value = math.inf if events is None else epsilon(events, delta)
    gaussians = [e for e in events or () if isinstance(e, PoissonGaussian)]
    return {
        "name": view.name,
        "sees": view.sees,
        "assumes": view.assumes,
        "epsilon": portable(value),
        "delta": None if events is None else delta,
        "verdict": tier(portable(value)),
        "certainty_from_half": certainty(portable(value)),
        "certainty_from_thousandth": certainty(portable(value), 0.001),
        "events": [asdict(event) for event in gaussians],
    }


def _unprotected() -> list[_View]:
    return [
        _View(_READERS, "the released models of every round", "nothing is promised", 1.0),
        _View(_SERVER, "every client's own update", "nothing is promised", 1.0),
    ]


def _local() -> list[_View]:
    own = "each client adds the full noise itself, so nobody else has to be trusted"
    return [
        _View(_READERS, "the released models of every round", own, 1.0),
        _View(_SERVER, "every client's own update, and who took part", own, 1.0),
    ]


def _aggregator(shares: int) -> list[_View]:
    return [
        _View(
            _READERS,
            "the released models of every round",
            f"at least {shares} clients of each round add their share of the noise and keep it to "
            "themselves, and the server shows nobody more than the models",
            1.0,
        ),
        _View(
            _FELLOWS,
            "the models, and the share of noise that it added itself",
            "as above, and it works with no other client (k clients together take away k shares)",
            math.sqrt(max(shares - 1, 1) / shares),
        ),
        _View(
            _SERVER,
            "every client's own update, with that client's share of the noise only",
            "the server is trusted to look only at the sum until secure aggregation exists; this "
            "number is what remains if it does not",
            1 / math.sqrt(shares),
        ),
    ]
