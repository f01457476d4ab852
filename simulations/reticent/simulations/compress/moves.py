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


TECHNIQUES: dict[str, tuple[Move, ...]] = {
    "pruning": (
        _move("no pruning", 'student.prune.kind="none"'),
        *(
            _move(
                f"{share:.0%} of the weights pruned",
                'student.prune.kind="magnitude"',
                f"student.prune.sparsity={share}",
            )
            for share in (0.5, 0.7, 0.85)
        ),
    ),
    "distillation": (
        _move("no distillation", 'student.distill.kind="none"'),
        _move("response distillation", 'student.distill.kind="response"'),
    ),
    "update codec": (
        _move("updates as int4", 'updates.codec=["dither4","ans"]'),
        _move("updates as int8", 'updates.codec=["dither8","ans"]'),
    ),
}
"""Tried in this order, each from the best plan so far."""


def changed(plan: Plan, move: Move) -> Plan:
    """Return ``plan`` with a move made.

    Raises:
        PlanError: If the keys do not fit together.
    """
    text = tomli_w.dumps(without_none(plan.model_dump(mode="json")))
    return parse_plan(text, move.overrides, where=move.name)
