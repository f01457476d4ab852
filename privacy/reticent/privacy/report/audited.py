"""The empirical audit of a run, as ``reticent audit RUN`` leaves it in ``audit.json``."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from reticent.core.errors import RunError
from reticent.core.plan import Plan
from reticent.core.run import Run

AUDIT = "audit.json"
NOT_DONE = "not done: run `reticent audit RUN`"
LARGEST = 1 << 20
VERSION = 1


def read_audit(run: Run, plan: Plan) -> dict[str, Any] | None:
    """Return the audit of ``run``; None when none was made.

    A lower bound above the claim cannot stand as ``consistent``: a file that says so is refused.

    Raises:
        RunError: If the file is damaged, contradicts itself or belongs to another plan.
    """
    path = run.folder / AUDIT
    if not path.exists():
        return None
    data = _parse(path.name, _text(run))
    if data.get("schema") != VERSION:
        raise RunError(f"{path}: schema={data.get('schema')!r}: must be {VERSION}")
    if data.get("plan") != plan.digest:
        raise RunError(
            f"{path}: belongs to plan {str(data.get('plan'))[:12]}, the run's plan is "
            f"{plan.digest[:12]}: repeat `reticent audit {run.folder}`"
        )
    kept = _checked(data, _FIELDS, str(path))
    if plan.private is None or kept["unit"] != plan.private.unit:
        raise RunError(f"{path}: unit={kept['unit']!r}: is not that of the run's plan")
    _require_honest(kept, str(path))
    return kept


def _text(run: Run) -> str:
    path = run.folder / AUDIT
    try:
        content = path.read_bytes()
        if len(content) > LARGEST:
            raise RunError(f"{path}: has {len(content)} bytes: at most {LARGEST} are read")
        return content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from error


def _parse(name: str, text: str) -> dict[str, Any]:
    try:
        data = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{name}: damaged: {error}") from error
    if not isinstance(data, dict):
        raise RunError(f"{name}: damaged: must be a JSON object")
    return data


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _number(value: Any) -> bool:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return known and abs(value) <= sys.float_info.max  # an integer may be one that no float holds


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _text_given(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_number, value))


_Check = Callable[[Any], bool]
_CLAIMED: dict[str, _Check] = {
    "epsilon": lambda v: v == "infinity" or (_number(v) and v >= 0),
    "delta": lambda v: _number(v) and 0 < v < 1,
}
_RANDOMNESS: dict[str, _Check] = {
    "pairs": _count,
    "largest_correlation": lambda v: v is None or _number(v),
    "limit": lambda v: v is None or _number(v),
    "variance_ratio": lambda v: v is None or _number(v),
    "variance_interval": lambda v: v is None or _pair(v),
    "passed": lambda v: isinstance(v, bool),
}
_WEAKER: dict[str, _Check] = {
    "any_dependence": lambda v: _number(v) and v >= 0,
    "any_mechanism": lambda v: _number(v) and v >= 0,
}
_FIELDS: dict[str, _Check | dict[str, _Check]] = {
    "unit": _text_given,
    "relation": _text_given,
    "claimed": _CLAIMED,
    "lower_bound": lambda v: _number(v) and v >= 0,
    "weaker_bounds": _WEAKER,
    "confidence": lambda v: _number(v) and 0 < v < 1,
    "estimate": lambda v: v is None or _number(v),
    "method": _text_given,
    "canaries": _count,
    "rounds": _count,
    "interval": _pair,
    "interval_of": _text_given,
    "randomness": _RANDOMNESS,
    "verdict": lambda v: v in ("consistent", "violated"),
    "seconds": lambda v: _number(v) and v >= 0,
    "command": _text_given,
}


def _checked(
    data: Mapping[str, Any], fields: Mapping[str, _Check | dict[str, _Check]], where: str
) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, check in fields.items():
        value = data.get(name)
        if isinstance(check, dict):
            if not isinstance(value, dict):
                raise RunError(f"{where}: {name}={value!r}: must be an object: the file is damaged")
            kept[name] = _checked(value, check, f"{where}: {name}")
            continue
        if name not in data or not check(value):
            raise RunError(f"{where}: {name}={value!r}: is not what an audit writes: it is damaged")
        kept[name] = value
    return kept


def _require_honest(audit: dict[str, Any], where: str) -> None:
    claimed = audit["claimed"]["epsilon"]
    claimed = math.inf if claimed == "infinity" else claimed
    broken = audit["lower_bound"] > claimed or not audit["randomness"]["passed"]
    if broken != (audit["verdict"] == "violated"):
        raise RunError(
            f"{where}: verdict={audit['verdict']!r} contradicts its numbers (lower bound "
            f"{audit['lower_bound']:g}, claim {claimed:g}, randomness "
            f"{'passed' if audit['randomness']['passed'] else 'failed'})"
        )
