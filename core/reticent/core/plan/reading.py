"""Reading a plan from TOML or JSON, and saying what is wrong with one."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from datetime import date, time
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import BaseModel, ValidationError

from ..decoding import parse_json
from ..errors import PlanError
from .plan import Plan
from .privacy import DEFAULT_EPSILON


def load_plan(path: Path, overrides: Iterable[str] = ()) -> Plan:
    """Read a plan from a TOML file and apply ``a.b=value`` overrides.

    Raises:
        PlanError: If the file is missing or not TOML, or the plan is not valid.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: cannot be read: {_reason(error)}") from error
    return parse_plan(text, overrides, where=str(path))


def parse_plan(text: str, overrides: Iterable[str] = (), where: str = "plan") -> Plan:
    """Parse a plan from TOML text and apply ``a.b=value`` overrides.

    >>> parse_plan("", ["federation.rounds=3"]).federation.rounds
    3

    Raises:
        PlanError: Naming the key path, what was given and what is allowed.
    """
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a ValueError also where an integer is too long
        raise PlanError(f"{where}: not TOML: {error}") from error
    overrides = list(overrides)
    if "privacy" not in data and any(o.startswith("privacy.") for o in overrides):
        # Overrides of the default promise start from it; a noise multiplier replaces its epsilon.
        replaced = any(o.startswith("privacy.noise_multiplier=") for o in overrides)
        data["privacy"] = {} if replaced else {"epsilon": DEFAULT_EPSILON}
    for override in overrides:
        _apply(data, override)
    return plan_from(data, where)


def plan_from(data: Mapping[str, Any], where: str = "plan") -> Plan:
    """Build a plan from nested dictionaries, as TOML or JSON gives them."""
    try:
        _refuse_times(data)
        # JSON mode, so that arrays are accepted where tuples are declared, and nothing else is.
        return Plan.model_validate_json(json.dumps(data))
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from error
    except ValidationError as error:
        problems = [e for e in error.errors() if not _other_branch(cast(dict[str, Any], e))]
        lines = [_explain(cast(dict[str, Any], e)) for e in problems]
        raise PlanError(f"{where}: " + "; ".join(dict.fromkeys(lines))) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise PlanError(f"{where}: {error}") from error


def _refuse_times(data: Mapping[str, Any], path: str = "") -> None:
    """Refuse TOML's dates and times, which no key of a plan takes and JSON cannot hold."""
    for key, value in data.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                _refuse_times(cast(dict[str, Any], item), f"{path}{key}.")
            elif isinstance(item, date | time):
                raise PlanError(f"{path}{key}={item}: must not be a date or a time")


def plan_from_json(text: str) -> Plan:
    """Parse a plan from the JSON that :meth:`Plan.canonical` writes.

    Raises:
        PlanError: If it is not JSON, or not a valid plan.
    """
    try:
        data = parse_json(text)
    except ValueError as error:
        raise PlanError(f"plan: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise PlanError("plan: must be a JSON object")
    return plan_from(cast(dict[str, Any], data))


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "not UTF-8 text"


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise PlanError(f"--set {override}: must look like section.key=value")
    for part in path[:-1]:
        inner = data.setdefault(part, {})
        if not isinstance(inner, dict):
            raise PlanError(f"--set {override}: {part} is a value, not a section")
        data = cast(dict[str, Any], inner)
    data[path[-1]] = _value(value.strip())


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except (ValueError, RecursionError):
        return text


def _other_branch(error: dict[str, Any]) -> bool:
    """Return whether an error is about the branch of ``section | "off"`` that was not meant."""
    last = str(error["loc"][-1]) if error["loc"] else ""
    if last.startswith("literal["):
        return isinstance(error["input"], dict)
    return last.startswith("function-after[") and not isinstance(error["input"], dict)


def _explain(error: dict[str, Any]) -> str:
    # A union of a section and "off" inserts the name of the branch into the location.
    branches = ("function-after[", "literal[")
    loc = [str(p) for p in error["loc"] if not str(p).startswith(branches)]
    path = ".".join(loc) or "plan"
    given = error["input"]
    if error["type"] == "extra_forbidden":
        return f"unknown key {path}{_suggestion(loc)}"
    if error["type"] == "value_error":
        return f"{path}: {error['ctx']['error']}" if loc else str(error["ctx"]["error"])
    if path == "privacy":
        return f'privacy={json.dumps(given, default=str)}: must be a section or "off"'
    shown = "a section" if isinstance(given, dict) else json.dumps(given, default=str)
    return f"{path}={shown}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _suggestion(loc: list[str]) -> str:
    known = _keys_at(loc[:-1])
    close = difflib.get_close_matches(loc[-1], known, n=1)
    here = f" (did you mean {'.'.join([*loc[:-1], close[0]])}?)" if close else ""
    return here or f" (known keys here: {', '.join(known)})"


def _keys_at(path: list[str]) -> list[str]:
    section: type[BaseModel] = Plan
    for part in (p for p in path if not p.isdecimal()):  # positions in a list of sections
        section = _section_in(section.model_fields[part].annotation)
    return sorted(section.model_fields)


def _section_in(kind: Any) -> type[BaseModel]:
    """Return the section that an annotation holds, alone, in a union or in a tuple."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind
    return next(_section_in(k) for k in get_args(kind) if k not in (type(None), Ellipsis))
