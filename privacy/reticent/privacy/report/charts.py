"""Which charts a report shows, each with what it says in words for those who do not see it."""

from __future__ import annotations

from typing import Any

from . import words
from .bars import BarChart, Claim, bar_chart, claim_chart, spread
from .svg import Chart, Rule, line_chart


def charts(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Return ``{"identity", "caption", "svg", "headers", "rows"}`` for every chart with data.

    ``rows`` is the same as a table, except for lines over rounds, which share one table.
    """
    made = [_epsilon(data), _accuracy(data), _spent(data), _left(data), _claim(data)]
    return [chart for chart in made if chart is not None]


def _shown(
    identity: str, caption: str, svg: str, headers: list[str] | None = None, rows: Any = ()
) -> dict[str, Any]:
    return {
        "identity": identity,
        "caption": caption,
        "svg": svg,
        "headers": headers or [],
        "rows": [list(row) for row in rows],
    }


def capped(value: Any, data: dict[str, Any]) -> Any:
    """Return the most that one client had spent, given what the schedule allowed until then.

    Nobody had spent more than the client that had spent most in the end: where devices stopped at
    their budget, that is less than the schedule allowed.
    """
    if value is None:
        return None
    return words.portable(min(words.as_float(value), words.as_float(data["spent"]["maximum"])))


def _epsilon(data: dict[str, Any]) -> dict[str, Any] | None:
    stop = words.as_float(data["spent"]["hard_stop"])
    rules = (Rule(f"hard stop {words.epsilon_text(stop)}", stop),) if stop < float("inf") else ()
    points = _points(
        [row | {"epsilon": capped(row["epsilon"], data)} for row in data["rounds"]], "epsilon"
    )
    planned = _points(data["planned"], "epsilon")
    if not points:
        return None
    stopped = planned != () and planned[-1][1] > points[-1][1]
    last = words.epsilon_text(points[-1][1])
    dashed = " The dashed line is what the schedule allowed, had no device stopped."
    chart = Chart(
        identity="epsilon",
        title="Privacy spent over the rounds",
        description=(
            f"Epsilon against readers of the models, of the client that spent most; it ends at "
            f"{last}.{dashed if stopped else ''}"
        ),
        x_label="round",
        y_label="ε (readers of the models)",
        points=points,
        planned=planned if stopped else (),
        rules=rules,
        from_zero=True,
        y_text=words.number_text,
        labels_left=True,
    )
    end = " (dashed: the schedule)" if stopped else ""
    return _shown("epsilon", f"ε over the rounds{end}", line_chart(chart))


def _accuracy(data: dict[str, Any]) -> dict[str, Any] | None:
    known = {row["key"]: row["accuracy"] for row in data["models"]}
    names = {"teacher": "teacher", "public_only": "public data only"}
    rules = tuple(
        Rule(f"{name} {words.percent_text(known[key])}", known[key])
        for key, name in names.items()
        if key in known
    )
    points = _points(data["rounds"], "accuracy")
    if not points:
        return None
    chart = Chart(
        identity="accuracy",
        title="Accuracy on the test set over the rounds",
        description=(
            f"Accuracy of the federated student; it ends at {words.percent_text(points[-1][1])}."
        ),
        x_label="round",
        y_label="test accuracy",
        points=points,
        rules=rules,
        y_text=lambda y: f"{round(100 * y, 6):g} %",
    )
    return _shown("accuracy", "Accuracy over the rounds", line_chart(chart))


def _spent(data: dict[str, Any]) -> dict[str, Any] | None:
    return _distribution(
        data,
        key="epsilon",
        identity="spent-chart",
        title="Clients by what they spent",
        x_label="ε spent (readers of the models)",
    )


def _left(data: dict[str, Any]) -> dict[str, Any] | None:
    return _distribution(
        data,
        key="left",
        identity="left-chart",
        title="Clients by what is left of their budget",
        x_label="ε left before the hard stop",
    )


def _distribution(
    data: dict[str, Any], key: str, identity: str, title: str, x_label: str
) -> dict[str, Any] | None:
    """Return a chart of clients, where the ledger tells what each of them spent."""
    if data["spent"]["source"] != "ledger":
        return None
    values = [(words.as_float(g[key]), g["clients"]) for g in data["spent"]["groups"]]
    if not values or not all(value < float("inf") for value, _ in values):
        return None
    bars = spread(values, rounded_up=key == "epsilon")
    total = sum(bar.count for bar in bars)
    described = ", ".join(f"{bar.count} at {bar.name}" for bar in bars)
    chart = BarChart(identity, title, f"{total} clients; by epsilon: {described}.", x_label, bars)
    rows = [(bar.name, f"{bar.count:,}") for bar in bars]
    return _shown(identity, title, bar_chart(chart), [x_label, "Clients"], rows)


def _claim(data: dict[str, Any]) -> dict[str, Any] | None:
    audit = data["audit"]
    if audit is None or audit["claimed"]["epsilon"] == "infinity":
        return None
    claimed, found, sure = audit["claimed"]["epsilon"], audit["lower_bound"], audit["confidence"]
    svg = claim_chart(Claim(claimed, found, sure, found > claimed))
    rows = [
        ("Claimed, at most", words.epsilon_text(claimed)),
        (f"Shown by the audit, at least ({100 * sure:g} % confidence)", words.bound_text(found)),
    ]
    if audit["estimate"] is not None:
        rows.append(("Estimated, without a guarantee", words.number_text(audit["estimate"], 3)))
    return _shown("claim", "Claim against audit", svg, ["", "ε"], rows)


def _points(rows: list[dict[str, Any]], key: str) -> tuple[tuple[float, float], ...]:
    known = ((float(row["round"]), words.as_float(row[key])) for row in rows)
    return tuple((x, y) for x, y in known if abs(y) < float("inf"))
