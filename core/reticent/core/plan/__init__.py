"""The plan: what to train and under which promises, read from one TOML file and overrides."""

from __future__ import annotations

from ..fleet import Buffered, Fleet
from .distill import Distill
from .engine import Engine
from .federation import Federation, Local, Optimizer, Robust
from .plan import Plan
from .privacy import DEFAULT_EPSILON, Privacy
from .reading import load_plan, parse_plan, plan_from, plan_from_json
from .student import (
    Adapt,
    Backend,
    Bits,
    Factorize,
    Granularity,
    Observer,
    Prune,
    Quantize,
    Student,
    Thin,
)
from .task import Partition, TaskSection
from .teacher import Teacher, Trained
from .updates import Updates

__all__ = [
    "DEFAULT_EPSILON",
    "Adapt",
    "Backend",
    "Bits",
    "Buffered",
    "Distill",
    "Engine",
    "Factorize",
    "Federation",
    "Fleet",
    "Granularity",
    "Local",
    "Observer",
    "Optimizer",
    "Partition",
    "Plan",
    "Privacy",
    "Prune",
    "Quantize",
    "Robust",
    "Student",
    "TaskSection",
    "Teacher",
    "Thin",
    "Trained",
    "Updates",
    "load_plan",
    "parse_plan",
    "plan_from",
    "plan_from_json",
]
