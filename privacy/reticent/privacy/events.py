"""What happened to private data: frozen records that outlive the accountants that read them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from reticent.core.errors import PrivacyError

RELATIONS = ("add-or-remove-one", "replace-one")
UNITS = ("example", "client")
LEAST_NOISE, MOST_NOISE = 1e-9, 1e9  # beyond, squares and their sums leave floats
MOST_STEPS = 2**63 - 1
DEEPEST = 8  # how many Composed events may lie inside one another


@dataclass(frozen=True)
class PoissonGaussian:
    """Sums over Poisson samples, each released with Gaussian noise.

    ``noise_multiplier`` is the standard deviation of the noise over the bound C on the L2 norm of
    what *one* unit adds to the sum; it means the same under both relations. Under
    ``add-or-remove-one`` neighbouring data sets differ by one unit, present or absent, so two sums
    over the same sample differ by at most C. Under ``replace-one`` one unit is exchanged for any
    other, both are sampled together, and two sums may differ by 2C: accountants know that, and
    nobody has to halve the multiplier by hand.

    Attributes:
        sampling_rate: Probability q in (0, 1] at which each unit joins a step, independently; 1 is
            the plain Gaussian mechanism.
        noise_multiplier: Standard deviation of the noise over C, in [1e-9, 1e9].
        steps: Number of sums taken, in [1, 2**63).
        relation: How neighbouring data sets differ, one of :data:`RELATIONS`.
        unit: What they differ in, one of :data:`UNITS`.

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
        rate, noise = self.sampling_rate, self.noise_multiplier
        if not _is_number(rate) or not 0 < rate <= 1:
            raise PrivacyError(f"event.sampling_rate={rate!r}: must be in (0, 1]")
        if not _is_number(noise) or not LEAST_NOISE <= noise <= MOST_NOISE:
            raise PrivacyError(
                f"event.noise_multiplier={noise!r}: must be in [{LEAST_NOISE:g}, {MOST_NOISE:g}]"
            )
        _require_count("steps", self.steps)
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
        other = "" if self.relation == RELATIONS[0] else f", {self.relation}"
        return (
            f"{self.steps} steps (sampling_rate={self.sampling_rate:g}, "
            f"noise_multiplier={self.noise_multiplier:g}{other})"
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


@dataclass(frozen=True)
class DeclaredPublic:
    """A release of what was declared public: it spends nothing.

    The declaration is a person's, and nothing here can check it; the record keeps its words.

    Attributes:
        what: What was released and why it is public, not empty.

    Raises:
        PrivacyError: If ``what`` says nothing.
    """

    what: str

    def __post_init__(self) -> None:
        """Refuse a declaration without words."""
        if not isinstance(self.what, str) or not self.what.strip():
            raise PrivacyError(
                f"event.what={self.what!r}: must say what was released and why it is public"
            )

    def to_json(self) -> str:
        """Return canonical JSON."""
        return _dump({"kind": "public", "what": self.what})

    def times(self, count: int) -> DeclaredPublic:
        """Return the event itself: nothing repeated is nothing."""
        return self

    def describe(self) -> str:
        """Return the event in a few words."""
        return f"public: {self.what}"


@dataclass(frozen=True)
class Composed:
    """Events that happen together, such as the releases of one round, and how often they do.

    It spends what its parts spend one after the other, and holds nothing that they do not. Each
    part draws its own sample. Sums that were taken over the *same* sample reveal more about who
    was in it and are not this, unless everyone takes part: see :func:`on_one_sample`.

    Attributes:
        events: The parts, at least one; parts may be composed themselves, at most
            :data:`DEEPEST` deep.
        count: How many times all of them happened, in [1, 2**63).

    Raises:
        PrivacyError: If there is no part, a part is not an event, ``count`` is not a whole number
            in its range, or the parts are nested too deeply.
    """

    events: tuple[Event, ...]
    count: int = 1

    def __post_init__(self) -> None:
        """Check the parts and the depth."""
        if not isinstance(self.events, tuple) or not self.events:
            raise PrivacyError(f"event.events={self.events!r}: must be a tuple of at least 1 event")
        for event in self.events:
            require_event(event)
        _require_count("count", self.count)
        if depth_of(self) > DEEPEST:
            raise PrivacyError(f"event.events: must be nested at most {DEEPEST} deep")

    def to_json(self) -> str:
        """Return canonical JSON."""
        parts = [json.loads(event.to_json()) for event in self.events]
        return _dump({"kind": "composed", "count": self.count, "events": parts})

    def times(self, count: int) -> Composed:
        """Return the event repeated ``count`` times."""
        return replace(self, count=self.count * count)

    def describe(self) -> str:
        """Return the event in a few words."""
        parts = " and ".join(event.describe() for event in self.events)
        return f"{self.count} times ({parts})"


Event = PoissonGaussian | NonPrivate | DeclaredPublic | Composed
KINDS: dict[str, type[Event]] = {
    "poisson-gaussian": PoissonGaussian,
    "non-private": NonPrivate,
    "public": DeclaredPublic,
    "composed": Composed,
}


def gaussian(
    noise_multiplier: float,
    steps: int = 1,
    relation: str = "add-or-remove-one",
    unit: str = "example",
) -> PoissonGaussian:
    """Return the plain Gaussian mechanism: everyone takes part in each of ``steps`` sums.

    >>> gaussian(2.0).sampling_rate
    1.0

    Raises:
        PrivacyError: If a value is out of its range.
    """
    return PoissonGaussian(1.0, noise_multiplier, steps, relation, unit)


def on_one_sample(events: Sequence[PoissonGaussian]) -> PoissonGaussian:
    """Return the one event that several sums over the same samples amount to.

    Divided by their noise, the sums are one longer sum with noise 1, to which a unit adds a vector
    of norm at most ``sqrt(sum of noise_multiplier^-2)`` (Andrew et al. 2021, "Differentially
    private learning with adaptive clipping", theorem 1): one event with the inverse of that for
    its multiplier.

    >>> both = on_one_sample([PoissonGaussian(0.1, 3.0, 1), PoissonGaussian(0.1, 4.0, 1)])
    >>> both.sampling_rate, round(both.noise_multiplier, 12)
    (0.1, 2.4)

    Raises:
        PrivacyError: If there is no event, or they differ in anything but the noise.
    """
    alike = {replace(event, noise_multiplier=1.0) for event in events}
    if len(alike) != 1:
        raise PrivacyError(
            f"{len(events)} events on one sample: must be at least 1, and alike in sampling_rate, "
            "steps, relation and unit"
        )
    precision = sum(event.noise_multiplier**-2 for event in events)
    return replace(events[0], noise_multiplier=precision**-0.5)


def event_from_json(text: str) -> Event:
    """Read an event written by ``to_json``.

    Raises:
        PrivacyError: If the text is not an event, or of a kind that is not known; an unknown
            mechanism is refused rather than counted as free.
    """
    try:
        data: Any = json.loads(text)
        return _from_data(data, 0)
    except (ValueError, TypeError, RecursionError) as error:
        raise PrivacyError(f"event {text[:200]!r}: must be a JSON object with a kind") from error


def _from_data(data: Any, depth: int) -> Event:
    if not isinstance(data, dict) or "kind" not in data:
        raise PrivacyError(f"event {str(data)[:200]!r}: must be a JSON object with a kind")
    kind, fields = data["kind"], {name: data[name] for name in data if name != "kind"}
    if not isinstance(kind, str) or kind not in KINDS:
        raise PrivacyError(f"event kind {kind!r} is not known: must be one of {', '.join(KINDS)}")
    if depth > DEEPEST:
        raise PrivacyError(f"event.events: must be nested at most {DEEPEST} deep")
    if kind == "composed" and isinstance(fields.get("events"), list):
        fields["events"] = tuple(_from_data(part, depth + 1) for part in fields["events"])
    try:
        return KINDS[kind](**fields)
    except TypeError as error:
        raise PrivacyError(f"event of kind {kind}: {error}") from error


def merge(events: Iterable[Event]) -> list[PoissonGaussian | NonPrivate]:
    """Return what ``events`` spend: steps of equal parameters summed, in order of appearance.

    :class:`Composed` events are taken apart and :class:`DeclaredPublic` ones left out. Composition
    does not depend on order, so the result has the same epsilon.

    Raises:
        PrivacyError: If something is not an event.
    """
    merged: dict[PoissonGaussian | NonPrivate, int] = {}
    for event in events:
        parts = ((event, 1),) if isinstance(event, PoissonGaussian) else _parts(event, 1)
        for part, count in parts:
            key = replace(part, steps=1) if isinstance(part, PoissonGaussian) else part
            steps = part.steps * count if isinstance(part, PoissonGaussian) else 1
            merged[key] = merged.get(key, 0) + steps
    return [
        replace(key, steps=steps) if isinstance(key, PoissonGaussian) else key
        for key, steps in merged.items()
    ]


def require_event(event: object) -> None:
    """Raise :class:`PrivacyError` unless ``event`` is of a kind that accountants know."""
    if not isinstance(event, PoissonGaussian | NonPrivate | DeclaredPublic | Composed):
        raise PrivacyError(
            f"event {type(event).__name__} is not known: must be one of {', '.join(KINDS)}"
        )


def depth_of(event: Event) -> int:
    """Return how many composed events lie inside one another; 0 for an event without parts."""
    if not isinstance(event, Composed):
        return 0
    return 1 + max(depth_of(part) for part in event.events)


def _parts(event: Event, count: int) -> Iterator[tuple[PoissonGaussian | NonPrivate, int]]:
    require_event(event)
    if isinstance(event, Composed):
        for part in event.events:
            yield from _parts(part, count * event.count)
    elif not isinstance(event, DeclaredPublic):
        yield event, count


def _dump(data: dict[str, Any]) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PrivacyError(f"event.{name}={value!r}: must be a whole number >= 1")
    if value > MOST_STEPS:
        raise PrivacyError(f"event.{name}: must be < 2**63")


def _require_member(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise PrivacyError(f"event.{name}={value!r}: must be one of {', '.join(allowed)}")
