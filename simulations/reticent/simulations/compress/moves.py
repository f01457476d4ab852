"""What a search may change in a plan, technique by technique."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import tomli_w

from reticent.core.plan import Plan, parse_plan
from reticent.core.run import without_none


@dataclass(frozen=True)
class Move:
    """One setting of one technique: what it is called, and the keys it sets."""

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """A plan, and the moves that led to it from the plan that was given, by technique."""

    plan: Plan
    moves: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What was done, in words."""
        return name_of(self.moves)


def name_of(moves: Mapping[str, str]) -> str:
    """Return the moves in words."""
    return ", ".join(moves.values()) or "as given"


def _move(name: str, *overrides: str) -> Move:
    return Move(name, overrides)


def _pruned(share: float, schedule: str) -> Move:
    return _move(
        f"{share:.0%} of the weights pruned",
        'student.prune.kind="magnitude"',
        f'student.prune.schedule="{schedule}"',
        f"student.prune.sparsity={share}",
    )


TECHNIQUES: dict[str, tuple[Move, ...]] = {
    "update codec": (
        *(
            _move(
                f"updates in steps of {step:g} σ", 'updates.codec=["auto"]', f"updates.step={step}"
            )
            for step in (0.5, 2.0, 4.0)
        ),
    ),
    "bits": (
        *(
            _move(
                f"{bits}-bit weights",
                'student.quantize.kind="qat"',
                f"student.quantize.bits={bits}",
            )
            for bits in (8, 4, 2)
        ),
    ),
    "thinning": (
        _move("no thinning", 'student.thin.kind="none"'),
        *(
            _move(
                f"{share:.0%} of the filters removed",
                'student.thin.kind="taylor"',
                "student.thin.shares=[]",
                f"student.thin.share={share}",
            )
            for share in (0.25, 0.5)
        ),
    ),
    "factorizing": (
        _move("no factorizing", 'student.factorize.kind="none"'),
        *(
            _move(
                f"factors with {keep:.0%} of the energy",
                'student.factorize.kind="svd"',
                'student.factorize.rule="energy"',
                f"student.factorize.keep={keep}",
            )
            for keep in (0.95, 0.85)
        ),
    ),
    "pruning": (
        _move("no pruning", 'student.prune.kind="none"'),
        _pruned(0.5, "one-shot"),
        _pruned(0.7, "gradual"),
        _pruned(0.85, "gradual"),
    ),
    "distillation": (
        _move("no distillation", 'student.distill.kind="none"', "student.distill.local_weight=0"),
        _move("response distillation", 'student.distill.kind="response"'),
        _move("response and feature distillation", 'student.distill.kind="response+feature"'),
    ),
}
"""Tried in this order, each from the best plan so far: what costs least accuracy comes first.

Targets are reached before accuracy counts, so a later technique would be driven too far by bytes
that a coarser codec saves for nothing.
"""


def changed(plan: Plan, move: Move) -> Plan:
    """Return ``plan`` with a move made.

    Raises:
        PlanError: If the keys do not fit together.
    """
    text = tomli_w.dumps(without_none(plan.model_dump(mode="json")))
    return parse_plan(text, move.overrides, where=move.name)
