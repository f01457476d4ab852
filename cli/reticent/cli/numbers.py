"""Numbers on the command line."""

from __future__ import annotations

import math
from typing import Any

import click


class Within(click.FloatRange):
    """A number of a range, which nan is not: no comparison with it would ever refuse it."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the number; click's own range lets nan through."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r}: must be a number in the range {self._describe_range()}.")
        return number
