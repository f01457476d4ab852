"""Two reports side by side: what is equal, what differs, and what cannot be compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from .adversaries import FELLOWS, NETWORK, READERS, SERVER
from .words import bound_text, bytes_text, delta_text, epsilon_text, number_text, percent_text

ABSENT = "–"


@dataclass(frozen=True)
class Row:
    """One figure of two runs.

    Attributes:
        what: Its name.
        a: Of the first run, for reading; a dash where the run has none.
        b: Of the second run.
        differs: Whether the figures, unrounded, are not the same.
        comparable: Whether being smaller in one of them says anything.
    """

    what: str
    a: str
    b: str
    differs: bool
    comparable: bool = True

    @property
    def mark(self) -> str:
        """What stands beside the row: empty when the figures are the same."""
        if not self.comparable:
            return "not comparable"
        return "differs" if self.differs else ""


def compare(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Return ``{"notes", "rows"}`` for two reports as :func:`collect` returns them."""
    notes = _notes(a, b)
    rows = [
        *(_row(name, text, key, a, b) for name, text, key in _PROMISE),
        *(_row(name, epsilon_text, key, a, b, not notes) for name, key in _EPSILON),
        *_common(a, b),
        *(_row(name, text, key, a, b) for name, text, key in _REST),
    ]
    return {"notes": notes, "rows": [asdict(row) | {"mark": row.mark} for row in rows]}


_Of = Callable[[dict[str, Any]], Any]


def _row(
    name: str,
    text: Callable[[Any], str],
    of: _Of,
    a: dict[str, Any],
    b: dict[str, Any],
    comparable: bool = True,
) -> Row:
    first, second = of(a), of(b)
    shown = [ABSENT if value is None else text(value) for value in (first, second)]
    both = first is not None and second is not None
    return Row(name, shown[0], shown[1], first != second, comparable or not both)


def _notes(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    first, second = a["promise"], b["promise"]
    if "off" in (first["trust"], second["trust"]):
        return []
    notes: list[str] = []
    if first["unit"] != second["unit"]:
        notes.append(
            "ε of different units are not comparable: one is about an example, the other about all "
            "that a client contributes"
        )
    if first["relation"] != second["relation"]:
        notes.append(
            "ε under different neighbouring relations are not comparable: compare the rows that "
            "name a relation"
        )
    if first["delta"] != second["delta"]:
        notes.append("ε at different δ are not comparable: compare the rows that name a δ")
    return notes


def _common(a: dict[str, Any], b: dict[str, Any]) -> list[Row]:
    """Return epsilon at the deltas and under the relations that both reports state."""
    if a["promise"].get("unit") != b["promise"].get("unit"):
        return []
    rows: list[Row] = []
    if a["promise"].get("relation") == b["promise"].get("relation"):
        rows += _matched(a, b, "by_delta", "delta", lambda v: f"at δ = {delta_text(v)}")
    if a["promise"]["delta"] == b["promise"]["delta"]:
        rows += _matched(a, b, "by_relation", "relation", lambda v: f"under {v}")
    return rows


def _matched(
    a: dict[str, Any], b: dict[str, Any], table: str, key: str, name: Callable[[Any], str]
) -> list[Row]:
    first, second = (
        {row[key]: row["epsilon"] for row in data["accounting"][table]} for data in (a, b)
    )
    return [
        Row(
            f"ε of the client that spent most, {name(value)}",
            epsilon_text(first[value]),
            epsilon_text(second[value]),
            first[value] != second[value],
        )
        for value in first
        if value in second
    ]


def _path(*keys: str) -> _Of:
    def of(data: dict[str, Any]) -> Any:
        value: Any = data
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    return of


def _adversary(name: str) -> _Of:
    return lambda data: next(
        (row["epsilon"] for row in data["adversaries"] if row["name"] == name), None
    )


def _model(key: str, field: str) -> _Of:
    return lambda data: next((row[field] for row in data["models"] if row["key"] == key), None)


def _bytes(data: dict[str, Any]) -> int | None:
    """Return the bytes of a whole run; None where they follow from a secret draw."""
    totals = [data["traffic"][f"total_{which}"] for which in ("up", "down", "constants")]
    return None if None in totals else sum(totals)


def _quantile(value: Any) -> str:
    return f"follows the {number_text(value)} quantile"


_PROMISE: tuple[tuple[str, Callable[[Any], str], _Of], ...] = (
    ("Plan", lambda v: str(v)[:16], _path("run", "plan")),
    ("Task", str, _path("run", "task")),
    ("Student", str, _path("run", "student")),
    ("Trust", str, _path("promise", "trust")),
    ("Unit", str, _path("promise", "unit")),
    ("Neighbouring relation", str, _path("promise", "relation")),
    ("δ", delta_text, _path("promise", "delta")),
)
_EPSILON: tuple[tuple[str, _Of], ...] = (
    ("Target ε", _path("promise", "target")),
    ("ε promised by the plan", _path("promise", "epsilon")),
    ("ε spent at most by a client", _path("spent", "maximum")),
    *(
        (f"ε against {name[0].lower()}{name[1:]}", _adversary(name))
        for name in (READERS, FELLOWS, SERVER, NETWORK)
    ),
    ("ε without amplification", _path("accounting", "unamplified")),
)
_REST: tuple[tuple[str, Callable[[Any], str], _Of], ...] = (
    ("Noise multiplier σ", number_text, _path("promise", "noise_multiplier")),
    ("σ of one client's update", number_text, _path("promise", "share_multiplier")),
    ("Clip", number_text, _path("promise", "clip")),
    ("Clipping", str, _path("promise", "clipping")),
    ("Adaptive bound", _quantile, _path("promise", "clip_quantile")),
    ("Sampling rate q", number_text, _path("run", "sampling_rate")),
    ("Steps a round", number_text, _path("run", "steps_per_round")),
    ("Rounds", number_text, _path("run", "rounds")),
    ("Clients", number_text, _path("run", "clients")),
    ("Clients a round", number_text, _path("run", "clients_per_round")),
    ("Rounds of one client, at most", number_text, _path("promise", "participations")),
    ("Refusals at the budget", number_text, _path("spent", "refusals")),
    ("Codec", " + ".join, _path("run", "codec")),
    ("Bytes up, one client and round", bytes_text, _path("traffic", "up")),
    ("Bytes down, one client and round", bytes_text, _path("traffic", "down")),
    ("Bytes, whole run", bytes_text, _bytes),
    ("Size of the int8 model", bytes_text, _model("int8", "bytes")),
    ("Accuracy of the int8 model", percent_text, _model("int8", "accuracy")),
    ("Accuracy of the fp32 student", percent_text, _model("fp32", "accuracy")),
    ("Accuracy with public data only", percent_text, _model("public_only", "accuracy")),
    ("Audit: lower bound on ε", bound_text, _path("audit", "lower_bound")),
    ("Audit: verdict", str, _path("audit", "verdict")),
    ("Randomness of the devices", lambda v: v.partition(" (")[0], _path("run", "randomness")),
)
