"""The policy of a device's owner: what the device takes part in, whatever a server sends.

A policy is one TOML file of at most :data:`MOST_BYTES`. The operator's is a proposal; what counts
is the one that the owner accepted. It is read for every order, so an edit holds from the next one.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import tomllib
from collections.abc import Mapping
from datetime import date, time
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from reticent.core.errors import PolicyError
from reticent.core.offer import MOST_MODEL

MOST_BYTES = 64 * 1024
_DAY = 86400
_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")

Count = Annotated[int, Field(ge=1)]
Megabytes = Annotated[int, Field(ge=0)]
Key = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Section(BaseModel):
    """A frozen, strict part of a policy."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class BudgetSection(Section):
    """The hard stop of the ledger. Nothing here but the optional keys has a default.

    Attributes:
        epsilon: The budget: for life, or in any window.
        delta: Its delta.
        window_days: The budget then renews; absent: it is for life. At least a second.
        lifetime_epsilon: With a window, what is never exceeded however often it renews.
    """

    epsilon: Annotated[float, Field(gt=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    window_days: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    lifetime_epsilon: Annotated[float, Field(gt=0)] | None = None

    @property
    def window(self) -> float | None:
        """The window in seconds; None for life."""
        return None if self.window_days is None else self.window_days * _DAY

    @field_validator("epsilon", "lifetime_epsilon", mode="before")
    @classmethod
    def _endless(cls, value: object) -> object:
        return float("inf") if value == "infinity" else value

    @field_serializer("epsilon", "lifetime_epsilon")
    def _written(self, value: float | None) -> float | str | None:
        return "infinity" if value == float("inf") else value

    @model_validator(mode="after")
    def _window_is_one_of_a_ledgers(self) -> Self:
        # What a ledger's Budget takes, without its import: an agent would hold SciPy in memory.
        if self.window is not None and not 1 <= self.window < math.inf:
            raise ValueError(
                f"window_days={self.window_days:g}: must be at least 1/{_DAY} (a second), and "
                "finite in seconds"
            )
        return self

    @model_validator(mode="after")
    def _lifetime_needs_a_window(self) -> Self:
        if self.lifetime_epsilon is not None and self.window_days is None:
            raise ValueError(
                f"lifetime_epsilon={self.lifetime_epsilon:g}: must be absent without window_days, "
                "because budget.epsilon is for life then"
            )
        return self


class Limits(Section):
    """Bounds on the numbers of a plan and its orders; an absent bound allows everything.

    Attributes:
        least_noise_multiplier: Smallest noise multiplier of an order.
        largest_sampling_rate: Largest Poisson rate q.
        largest_steps_per_round: Most local steps in a round.
        largest_rounds: Most rounds of a plan.
        largest_participations: Most rounds that the device is ever charged for, over all runs.
        largest_orders_per_hour: Most rounds that are begun within an hour, over all runs.
    """

    least_noise_multiplier: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    largest_sampling_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    largest_steps_per_round: Count | None = None
    largest_rounds: Count | None = None
    largest_participations: Count | None = None
    largest_orders_per_hour: Count | None = None


class Allow(Section):
    """What the device takes part in; an absent list of tasks, models or trusts allows any.

    Attributes:
        tasks: Names of tasks. A task of somebody's own, ``module:attribute``, runs a module that is
            installed here, and is refused unless it is named.
        models: Names of students.
        trust: ``local`` (protected from the server too), ``aggregator``, ``off`` (no privacy).
        signers: Ed25519 keys, in hexadecimal, whose signature a plan must have; absent: the key
            that came in the device's bundle.
    """

    tasks: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None
    trust: tuple[Literal["local", "aggregator", "off"], ...] = ("local", "aggregator")
    signers: tuple[Key, ...] | None = None


class When(Section):
    """When the device takes part. Only what is asked for is looked at.

    Attributes:
        hours: Local times ``"HH:MM-HH:MM"``; one may span midnight. Empty: always.
        charging: Only while an external supply is online.
        least_battery: Only with at least this share of charge (0 to 1).
        unmetered: Only on a connection that is not metered.
        largest_celsius: Only while no thermal zone is hotter.
        largest_pressure: Only while less than this share of time (0 to 1) some task waited for the
            processor, over the last minute.
        unknown: What to do where one of these cannot be read.
    """

    hours: tuple[str, ...] = ()
    charging: bool = False
    least_battery: Annotated[float, Field(ge=0, le=1)] | None = None
    unmetered: bool = False
    largest_celsius: Annotated[float, Field(gt=0, le=150)] | None = None
    largest_pressure: Annotated[float, Field(ge=0, le=1)] | None = None
    unknown: Literal["refuse", "allow"] = "refuse"

    @field_validator("hours")
    @classmethod
    def _are_hours(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        for text in given:
            if not _HOURS.fullmatch(text):
                raise ValueError(f'{json.dumps(text)}: must look like "22:00-06:00"')
        return given

    def includes(self, now: time) -> bool:
        """Return whether ``now`` is in the hours; the end of a span is not in it."""
        return not self.hours or any(_spans(text, now) for text in self.hours)


class Resources(Section):
    """What must stay free on the device.

    Attributes:
        spare_memory_mb: Memory to leave free beside what a round is estimated to need.
        spare_disk_mb: Disk space to leave free.
        warm: Whether torch stays loaded between rounds, from the agent's next start on.
    """

    spare_memory_mb: Megabytes = 32
    spare_disk_mb: Megabytes = 64
    warm: bool = False


class Delivery(Section):
    """Which models the device takes from its server.

    Attributes:
        accept: Whether it takes any; those of plans that ``allow`` names, and at times that
            ``when`` allows.
        largest_mb: The size of one.
    """

    accept: bool = True
    largest_mb: Annotated[int, Field(ge=1, le=MOST_MODEL // 2**20)] = 64


class Policy(Section):
    """A whole policy; only ``[budget]`` is required: a budget that nobody chose is no budget."""

    budget: BudgetSection
    limits: Limits = Limits()
    allow: Allow = Allow()
    when: When = When()
    resources: Resources = Resources()
    delivery: Delivery = Delivery()


def parse_policy(text: str, where: str = "policy") -> Policy:
    r"""Parse a policy.

    >>> parse_policy("[budget]\nepsilon = 2.0\ndelta = 1e-5").budget.epsilon
    2.0

    Raises:
        PolicyError: Naming the key path, what was given and what is allowed.
    """
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is no TOML error
        raise PolicyError(f"{where}: not TOML: {error}") from error
    return policy_from(data, where)


def policy_from(data: Mapping[str, Any], where: str = "policy") -> Policy:
    """Build a policy from nested dictionaries, as TOML gives them.

    Raises:
        PolicyError: As :func:`parse_policy`.
    """
    try:
        return Policy.model_validate_json(json.dumps(_portable(data)))
    except ValidationError as error:
        lines = [_explain(cast(dict[str, Any], e)) for e in error.errors()]
        raise PolicyError(f"{where}: " + "; ".join(dict.fromkeys(lines))) from error
    except RecursionError as error:
        raise PolicyError(f"{where}: is nested too deeply") from error
    except (TypeError, ValueError) as error:
        raise PolicyError(f"{where}: {error}") from error


def load_policy(path: Path) -> Policy:
    """Read a policy.

    Raises:
        PolicyError: If the file cannot be read, or is not a policy.
    """
    return parse_policy(read_text(path), str(path))


def read_text(path: Path) -> str:
    """Return a policy's text, not parsed.

    Raises:
        PolicyError: If the file cannot be read, is too long or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise PolicyError(f"{path}: must have at most {MOST_BYTES} bytes")
        return data.decode("utf-8")
    except OSError as error:
        raise PolicyError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PolicyError(f"{path}: is not UTF-8 text") from error


def changed(data: dict[str, Any], change: str) -> dict[str, Any]:
    """Return a policy's dictionary with one ``section.key=value`` changed; ``value`` is TOML.

    An empty value takes the key out.

    Raises:
        PolicyError: If the change does not look like one.
    """
    key, equals, value = change.partition("=")
    path = key.strip().split(".")
    if not equals or len(path) != 2 or not all(path):
        raise PolicyError(f"{change}: must look like section.key=value")
    section = dict(data.get(path[0], {}))
    if value.strip():
        section[path[1]] = _value(key.strip(), value.strip())
    else:
        section.pop(path[1], None)
    return {**data, path[0]: section}


def _value(key: str, text: str) -> Any:
    try:
        found = tomllib.loads(f"x = {text}")
        return found["x"] if set(found) == {"x"} else text
    except RecursionError as error:
        raise PolicyError(f"{key}: is nested too deeply") from error
    except ValueError:
        return text


def _spans(text: str, now: time) -> bool:
    begin, end = (time.fromisoformat(part) for part in text.split("-"))
    clock = now.replace(second=0, microsecond=0, tzinfo=None)
    if begin == end:
        return True
    return begin <= clock < end if begin < end else clock >= begin or clock < end


def _portable(value: Any, path: str = "") -> Any:
    """Write infinity as JSON can: TOML has ``inf``, strict JSON has not; nor has it times.

    Raises:
        ValueError: Naming the key of a time.
    """
    if isinstance(value, Mapping):
        items = cast(Mapping[str, Any], value).items()
        return {str(k): _portable(v, f"{path}.{k}".removeprefix(".")) for k, v in items}
    if isinstance(value, list):
        return [_portable(v, f"{path}.{n}") for n, v in enumerate(cast(list[Any], value))]
    if isinstance(value, date | time):  # a datetime is a date too
        raise ValueError(f"{path}={value.isoformat()}: must not be a date or a time")
    return "infinity" if value == float("inf") else value


def _explain(error: dict[str, Any]) -> str:
    loc = [str(part) for part in error["loc"]]
    path = ".".join(loc) or "policy"
    if error["type"] == "extra_forbidden":
        return f"unknown key {path}{_suggestion(loc)}"
    if error["type"] == "missing":
        return f"{path} is absent: the device's owner must set it"
    if error["type"] == "json_invalid":
        return f"cannot be read: {error['ctx']['error']}"
    if error["type"] == "value_error":
        return f"{path}: {error['ctx']['error']}"
    given = error["input"]
    shown = "a section" if isinstance(given, dict) else json.dumps(given, default=str)
    return f"{path}={shown}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _suggestion(loc: list[str]) -> str:
    section: Any = Policy
    for part in loc[:-1]:
        section = section.model_fields[part].annotation
    known = sorted(section.model_fields)
    close = difflib.get_close_matches(loc[-1], known, n=1)
    here = f" (did you mean {'.'.join([*loc[:-1], close[0]])}?)" if close else ""
    return here or f" (known keys here: {', '.join(known)})"
