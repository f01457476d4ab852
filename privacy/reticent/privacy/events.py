"""What happened to private data: frozen records that outlive the accountants that read them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from reticent.core.errors import PrivacyError

RELATIONS = ("add-or-remove-one",)
UNITS = ("example", "client")


@dataclass(frozen=True)
class PoissonGaussian:
    """Sums over Poisson samples, each released with Gaussian noise.

    Attributes:
        sampling_rate: Probability q in (0, 1] at which each unit joins a step, independently; 1 is
            the plain Gaussian mechanism.
        noise_multiplier: Standard deviation of the noise over the L2 sensitivity of the sum, > 0.
        steps: Number of sums taken, >= 1.
        relation: How neighbouring data sets differ.
        unit: What they differ in.

    Raises:
        PrivacyError: If a value is out of its range.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int
    relation: str = "add-or-remove-one"
    unit: str = "example"

    def __post_init__(self) -> None:
        """Check every field, and make the numbers plain ``float`` and ``int``."""
        _require_number("sampling_rate", self.sampling_rate, 1.0, "in (0, 1]")
        _require_number("noise_multiplier", self.noise_multiplier, math.inf, "> 0 and finite")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise PrivacyError(f"event.steps={self.steps!r}: must be a whole number >= 1")
        _require_member("relation", self.relation, RELATIONS)
        _require_member("unit", self.unit, UNITS)
        # 1 and 1.0 are one event: it must have one JSON text, because ledgers compare texts.
        object.__setattr__(self, "sampling_rate", float(self.sampling_rate))
        object.__setattr__(self, "noise_multiplier", float(self.noise_multiplier))

    def to_json(self) -> str:
        """Return canonical JSON: sorted keys, no spaces, exact numbers.

        >>> PoissonGaussian(0.5, 1, 2).to_json()[:46]
        '{"kind":"poisson-gaussian","noise_multiplier":'
        """
        return _dump({"kind": "poisson-gaussian", **asdict(self)})

    def times(self, count: int) -> PoissonGaussian:
        """Return the event repeated ``count`` times."""
        return replace(self, steps=self.steps * count)

    def describe(self) -> str:
        """Return the event in a few words."""
        return (
            f"{self.steps} steps (sampling_rate={self.sampling_rate:g}, "
            f"noise_multiplier={self.noise_multiplier:g})"
        )


@dataclass(frozen=True)
class NonPrivate:
    """A release without any protection: epsilon is infinite from here on."""

    def to_json(self) -> str:
        """Return canonical JSON."""
        return _dump({"kind": "non-private"})

    def times(self, count: int) -> NonPrivate:
        """Return the event itself: infinity repeated is infinity."""
        return self

    def describe(self) -> str:
        """Return the event in a few words."""
        return "training without privacy"


Event = PoissonGaussian | NonPrivate


def event_from_json(text: str) -> Event:
    """Read an event written by ``to_json``.

    Raises:
        PrivacyError: If the text is not an event, or of a kind that is not known; an unknown
            mechanism is refused rather than counted as free.
    """
    try:
        data: Any = json.loads(text)
        kind = data.pop("kind")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise PrivacyError(f"event {text[:200]!r}: must be a JSON object with a kind") from error
    kinds = {"poisson-gaussian": PoissonGaussian, "non-private": NonPrivate}
    if not isinstance(kind, str) or kind not in kinds:
        raise PrivacyError(f"event kind {kind!r} is not known: must be one of {', '.join(kinds)}")
    try:
        return kinds[kind](**data)
    except TypeError as error:
        raise PrivacyError(f"event of kind {kind}: {error}") from error


def merge(events: Iterable[Event]) -> list[Event]:
    """Return ``events`` with the steps of equal parameters summed, in order of first appearance.

    Composition does not depend on order, so the result has the same epsilon.
    """
    merged: dict[Event, int] = {}
    for event in events:
        key = replace(event, steps=1) if isinstance(event, PoissonGaussian) else event
        steps = event.steps if isinstance(event, PoissonGaussian) else 1
        merged[key] = merged.get(key, 0) + steps
    return [
        replace(key, steps=steps) if isinstance(key, PoissonGaussian) else key
        for key, steps in merged.items()
    ]


def _dump(data: dict[str, Any]) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _require_number(name: str, value: object, most: float, allowed: str) -> None:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= most
    if not fits or not math.isfinite(value):  # pyright: ignore[reportArgumentType]
        raise PrivacyError(f"event.{name}={value!r}: must be {allowed}")


def _require_member(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise PrivacyError(f"event.{name}={value!r}: must be one of {', '.join(allowed)}")
