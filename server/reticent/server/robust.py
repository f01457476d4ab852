"""Making one update of a round's, where some clients may send anything; no data are looked at.

Let n updates arrive, at most f of them from clients that collude, know all other updates and send
what they like. A mean is moved anywhere by one of them: its breakdown point is 0. Guarantees of the
other rules, for every choice of the f updates and without an assumption on the honest ones:

``trimmed-mean`` (Yin, Chen, Ramchandran and Bartlett 2018), n > 2f
    Every coordinate lies between the least and the largest value that honest clients sent.
``median``, n > 2f
    The same, for any f below n / 2, which no rule can pass (breakdown point 1/2).
``multi-krum`` (Blanchard, El Mhamdi, Guerraoui and Stainer 2017), n >= 2f + 3
    The mean of the n - f - 2 updates with the least sum of squared distances to their n - f - 2
    nearest (as many as El Mhamdi, Guerraoui and Rouault 2018 show to be safe). It lies within
    (1 + sqrt((n - f - 2) / (n - 2f - 1))) times the honest updates' diameter D of every honest
    update. Proof: an honest update has n - f - 1 >= n - f - 2 honest others within D, so its score
    is at most (n - f - 2) D^2; as n - f updates are honest, so is every chosen score. Of the
    n - f - 2 nearest of a chosen attacker at least n - 2f - 1 are honest, so one of them is within
    sqrt((n - f - 2) / (n - 2f - 1)) D, and that one is within D of every honest update.

Bounded is not unharmed: within these bounds attackers still pull, every round, and updates of
honest clients that differ much (label skew) leave them much room. With more than f attackers
nothing is promised. None of the rules is a function of the sum of the updates, so a plan allows
them only where single updates may be looked at (``local`` trust, where this is post-processing, or
no privacy).

Shapes: updates are ``(size,)`` and finite; results float64 ``(size,)``. Memory: all updates of a
round, 4 bytes a value, at most :data:`LARGEST` bytes. Updates are taken in the order of their
nodes and ties go to the lower node, so a result does not depend on what arrived first or where.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from reticent.core.errors import PlanError
from reticent.core.plan import Federation, Robust
from reticent.core.update import Vector

from .optimizer import Floats

LARGEST = 2**30
"""Most bytes of updates that are kept in one round."""

_CHUNK = 2**16
"""Coordinates that are sorted or compared at a time, in float64."""


def needs_all(rule: Robust) -> bool:
    """Return whether a rule needs all updates of a round at once."""
    return rule.kind != "mean"


def require_room(federation: Federation, size: int) -> None:
    """Check that a round's updates of ``size`` values fit into memory.

    Raises:
        PlanError: If they have more than :data:`LARGEST` bytes and are needed all at once.
    """
    held = 4 * size * federation.clients_per_round
    if needs_all(federation.robust) and held > LARGEST:
        raise PlanError(
            f'federation.robust.kind="{federation.robust.kind}": {federation.clients_per_round} '
            f"updates of {size} values have {held} bytes and are needed at once: at most {LARGEST};"
            ' use fewer federation.clients_per_round, a smaller student, or "mean"'
        )


def combined(rule: Robust, updates: Mapping[int, Vector | Floats]) -> Floats:
    """Return one update of those of a round, by node.

    Raises:
        PlanError: If there are fewer than the rule needs against ``rule.attackers``.
    """
    if len(updates) < rule.fewest:
        raise PlanError(
            f'federation.robust.attackers={rule.attackers}: "{rule.kind}" needs {rule.fewest} '
            f"updates, and {len(updates)} arrived"
        )
    rows = [updates[node] for node in sorted(updates)]
    if rule.kind == "multi-krum":
        rows = [rows[i] for i in chosen(rows, rule.attackers)]
    trims = {"trimmed-mean": rule.attackers, "median": (len(rows) - 1) // 2}
    return _trimmed(rows, trims.get(rule.kind, 0))


def chosen(rows: list[Vector | Floats], attackers: int) -> list[int]:
    """Return which updates multi-Krum averages, in ascending order."""
    near = len(rows) - attackers - 2
    distances = _squared_distances(rows)
    # Every row holds one zero, the distance to itself: it comes first and adds nothing.
    scores = np.sort(distances, axis=1)[:, : near + 1].sum(axis=1)
    return sorted(int(i) for i in np.argsort(scores, kind="stable")[:near])


def _squared_distances(rows: list[Vector | Floats]) -> Floats:
    """Return all squared distances ``(n, n)``; sums of squares of differences, not of products."""
    total = np.zeros((len(rows), len(rows)))
    for part in _chunks(rows):
        for i, one in enumerate(part):
            total[i] += ((part - one) ** 2).sum(axis=1)
    return total


def _trimmed(rows: list[Vector | Floats], trim: int) -> Floats:
    """Return each coordinate's mean without its ``trim`` largest and smallest values."""
    means = [
        np.sort(part, axis=0)[trim : len(rows) - trim].mean(axis=0) if trim else part.mean(axis=0)
        for part in _chunks(rows)
    ]
    return np.concatenate(means)


def _chunks(rows: list[Vector | Floats]) -> Iterator[Floats]:
    """Yield the updates as float64 ``(n, up to _CHUNK)``, some coordinates at a time."""
    for first in range(0, len(rows[0]), _CHUNK):
        yield np.array([row[first : first + _CHUNK] for row in rows], dtype=np.float64)
