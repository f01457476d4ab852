"""``reticent compress``: search for the student and the update that a target allows.

Everything is measured on public data, so a search costs no privacy budget: students are trained on
one part of the public examples and judged on the other, which nothing else sees.
"""

from __future__ import annotations

from .search import Outcome as Outcome
from .search import search as search
from .targets import Target as Target
from .targets import parse_targets as parse_targets
from .trials import Trial as Trial

__all__ = ["Outcome", "Target", "Trial", "parse_targets", "search"]
