"""Numbers as a reader without background should meet them; bounds are only ever rounded up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

INFINITY = "infinity"

Number = float | int | str | None

# Ponomareva et al. 2023 (How to DP-fy ML), section 5.2: tiers 1 to 3 end at 1, 10 and nowhere.
_TIERS = (
    (1.0, "strong protection"),
    (10.0, "reasonable protection"),
    (100.0, "weak to no protection"),
)
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_SCALES = ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"))


def portable(value: float) -> float | str | None:
    """Return ``value`` as strict JSON can hold it: ``"infinity"`` for inf and None for NaN."""
    if math.isnan(value):
        return None
    return INFINITY if math.isinf(value) else value


def as_float(value: Number) -> float:
    """Return the number that :func:`portable` was given; NaN for None."""
    if value is None:
        return math.nan
    return math.inf if value == INFINITY else float(value)


def epsilon_text(value: Number) -> str:
    """Return an epsilon for reading, rounded up and never down.

    >>> [epsilon_text(value) for value in (7.991, 163.2, 4_991_234.0, "infinity")]
    ['8.00', '164', '5.0 million', '∞']
    """
    number = as_float(value)
    if math.isnan(number):
        return "not known"
    if math.isinf(number):
        return "∞"
    for size, name in _SCALES:
        if number >= size:
            return f"{_up(number / size, 1):,.1f} {name}"
    if number >= 100:
        return f"{math.ceil(number):,}"
    return f"{_up(number, 2):.2f}"


def bound_text(value: Number) -> str:
    """Return a lower bound on an epsilon with two digits, rounded down and never up.

    >>> bound_text(2.999), bound_text(0.3)
    ('2.99', '0.30')
    """
    return f"{math.floor(as_float(value) * 100 + 1e-9) / 100:.2f}"


def tier(value: Number) -> str:
    """Return what an epsilon is worth, after the tiers of Ponomareva et al. 2023.

    >>> tier(8), tier(5e6), tier("infinity")
    ('reasonable protection', 'no meaningful protection', 'nothing is promised')
    """
    number = as_float(value)
    if math.isinf(number):
        return "nothing is promised"
    return next((name for most, name in _TIERS if number <= most), "no meaningful protection")


def certainty(value: Number, prior: float = 0.5) -> float:
    """Return the most that a suspicion of strength ``prior`` can become, delta aside.

    Bayes' rule with a likelihood ratio of at most exp(epsilon): 1/2 becomes e^eps / (1 + e^eps).

    >>> certainty(0.0), certainty("infinity")
    (0.5, 1.0)
    """
    number = as_float(value)
    return 1 / (1 + (1 - prior) / prior * math.exp(-number))


def certainty_text(value: Number) -> str:
    """Return a probability as a percentage, rounded up, and in words where that gives 100.

    >>> certainty_text(0.7311), certainty_text(0.99967), certainty_text(1.0)
    ('73.2 %', '99.97 %', '100 %')
    """
    number = as_float(value)
    for digits in (1, 2, 3, 4):
        shown = _up(100 * number, digits)
        if shown < 100:
            return f"{shown:.{digits}f} %"
    return "100 %"


def delta_text(value: Number) -> str:
    """Return a delta as a multiple of a power of ten.

    >>> delta_text(1e-5), delta_text(2.5e-7), delta_text(0.01)
    ('10⁻⁵', '2.5 × 10⁻⁷', '0.01')
    """
    number = as_float(value)
    if math.isnan(number) or number >= 0.001:
        return number_text(value)
    digits, _, power = f"{number:.3e}".partition("e-")
    shown = f"10⁻{str(int(power)).translate(_RAISED)}"
    factor = f"{float(digits):g}"
    return shown if factor == "1" else f"{factor} × {shown}"


def odds_text(value: Number) -> str:
    """Return exp(epsilon), the most that the odds grow by, for reading; rounded up.

    It is that of the epsilon that is shown, so that a reader finds the same with a calculator.

    >>> odds_text(1.0), odds_text(7.994), odds_text(70.0)
    ('2.72', '2,981', '10³¹')
    """
    number = as_float(value)
    if math.isnan(number):
        return "not known"
    if math.isinf(number):
        return "any number of"
    number = _up(number, 2)
    if number > math.log(1e15):
        return f"10{str(math.ceil(number / math.log(10))).translate(_RAISED)}"
    return epsilon_text(math.exp(number))


def chance_text(delta: Number) -> str:
    """Return a small probability as one in so many, rounded towards the larger probability.

    >>> chance_text(1e-5), chance_text(0.3)
    ('1 in 100,000', '1 in 3')
    """
    return f"1 in {math.floor(1 / as_float(delta) * (1 + 1e-12)):,}"


def relation_text(promise: Mapping[str, Any]) -> str:
    """Return a promise's neighbouring relation in words."""
    if promise["relation"] == "replace-one":
        return f"replace one {promise['unit']} by another"
    if promise["unit"] == "client":
        return "add or remove one client: its contribution is zero instead"
    return "add or remove one example"


def percent_text(value: Number) -> str:
    """Return a share as a percentage with one digit.

    >>> percent_text(0.7751), percent_text(None)
    ('77.5 %', 'not known')
    """
    number = as_float(value)
    return "not known" if math.isnan(number) else f"{100 * number:.1f} %"


def bytes_text(value: Number) -> str:
    """Return a number of bytes with a decimal unit.

    >>> bytes_text(512), bytes_text(14_612), bytes_text(None)
    ('512 B', '14.6 kB', 'not known')
    """
    number = as_float(value)
    if math.isnan(number):
        return "not known"
    for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:.1f} {name}"
    return f"{number:.0f} B"


def count_text(count: int, noun: str) -> str:
    """Return a count with its noun.

    >>> count_text(1, "round"), count_text(1200, "refusal")
    ('1 round', '1,200 refusals')
    """
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def number_text(value: Number, digits: int = 4) -> str:
    """Return a number with up to ``digits`` significant digits and grouped thousands.

    >>> number_text(12345), number_text(0.70710678), number_text(1e-05)
    ('12,345', '0.7071', '1e-05')
    """
    number = as_float(value)
    if math.isnan(number):
        return "not known"
    if math.isinf(number):
        return "∞"
    whole = number == int(number) and abs(number) < 1e15
    return f"{int(number):,}" if whole else f"{number:.{digits}g}"


def _up(number: float, digits: int) -> float:
    # The margin keeps 0.1 + 0.2 from being shown as 0.31.
    scale = 10.0**digits
    return math.ceil(number * scale - 1e-9 * max(1.0, number * scale)) / scale
