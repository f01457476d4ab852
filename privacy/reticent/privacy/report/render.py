"""A report as HTML, Markdown and JSON, from the data that :func:`collect` returns."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from reticent.core.errors import DependencyError, RunError
from reticent.core.run import Run, write_atomic

from . import words
from .checklist import unprotected
from .collect import collect
from .svg import Chart, Rule, line_chart

KINDS = ("html", "json", "md")


def write_reports(run: Run) -> list[Path]:
    """Write ``report.html``, ``report.json`` and ``report.md`` and return their paths.

    All three are made before the first is written, and each is replaced whole.

    Raises:
        RunError: If the run has not finished, is damaged, or its folder cannot be written.
        LedgerError: If the run's ledger is damaged.
        DependencyError: If Jinja2 is not installed.
    """
    data = collect(run)
    texts = {kind: _render(data, kind) for kind in KINDS}
    paths = [run.folder / f"report.{kind}" for kind in KINDS]
    for path, text in zip(paths, texts.values(), strict=True):
        try:
            write_atomic(path, text.encode())
        except OSError as error:
            raise RunError(f"{path}: cannot be written: {error.strerror}") from error
    return paths


def render(run: Run, kind: str) -> str:
    """Return the report of ``run`` as ``html``, ``json`` or ``md``.

    Raises:
        RunError: If ``kind`` is another word, or as :func:`write_reports`.
    """
    if kind not in KINDS:
        raise RunError(f"report kind {kind!r}: must be one of {', '.join(KINDS)}")
    return _render(collect(run), kind)


def render_json(data: dict[str, Any]) -> str:
    """Return the data as strict, indented JSON."""
    return json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def render_html(data: dict[str, Any]) -> str:
    """Return one self-contained page: no scripts, no fonts, no requests.

    Raises:
        DependencyError: If Jinja2 is not installed.
    """
    return _filled("template.html.j2", data, escaped=True)


def render_md(data: dict[str, Any]) -> str:
    """Return the report as Markdown.

    Raises:
        DependencyError: If Jinja2 is not installed.
    """
    return _filled("report.md.j2", data, escaped=False)


def _render(data: dict[str, Any], kind: str) -> str:
    return {"html": render_html, "json": render_json, "md": render_md}[kind](data)


def _filled(template: str, data: dict[str, Any], escaped: bool) -> str:
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise DependencyError("Jinja2 is not installed: pip install 'reticent[server]'") from error
    environment = Environment(
        autoescape=escaped, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        eps=words.epsilon_text,
        sure=words.certainty_text,
        percent=words.percent_text,
        delta=words.delta_text,
        size=words.bytes_text,
        number=words.number_text,
        cell=lambda text: str(text).replace("|", "\\|").replace("\n", " "),
    )
    text = files(__package__ or __name__).joinpath(template).read_text(encoding="utf-8")
    charts = [Markup(line_chart(chart)) for chart in _charts(data)] if escaped else []
    return environment.from_string(text).render(
        **data,
        charts=charts,
        measured=[row for row in data["rounds"] if row["accuracy"] is not None],
        unprotected=unprotected(data),
        private=data["promise"]["trust"] != "off",
        not_covered=words.NOT_COVERED,
        verdict=words.tier,
    )


def _charts(data: dict[str, Any]) -> list[Chart]:
    charts = [_epsilon_chart(data), _accuracy_chart(data)]
    return [chart for chart in charts if chart.points]


def _epsilon_chart(data: dict[str, Any]) -> Chart:
    stop = words.as_float(data["spent"]["hard_stop"])
    rules = (Rule(f"hard stop {words.epsilon_text(stop)}", stop),) if stop < float("inf") else ()
    points = _points(data, "epsilon")
    last = words.epsilon_text(points[-1][1]) if points else "0"
    return Chart(
        identity="epsilon",
        title="Privacy spent over the rounds",
        description=f"Epsilon against readers of the models; it ends at {last}.",
        x_label="round",
        y_label="ε (readers of the models)",
        points=points,
        rules=rules,
        from_zero=True,
        y_text=words.number_text,
        labels_left=True,
    )


def _accuracy_chart(data: dict[str, Any]) -> Chart:
    known = {row["key"]: row["accuracy"] for row in data["models"]}
    names = {"teacher": "teacher", "public_only": "public data only"}
    rules = tuple(
        Rule(f"{name} {words.percent_text(known[key])}", known[key])
        for key, name in names.items()
        if key in known
    )
    points = _points(data, "accuracy")
    last = words.percent_text(points[-1][1]) if points else "not known"
    return Chart(
        identity="accuracy",
        title="Accuracy on the test set over the rounds",
        description=f"Accuracy of the federated student; it ends at {last}.",
        x_label="round",
        y_label="test accuracy",
        points=points,
        rules=rules,
        y_text=lambda y: f"{round(100 * y, 6):g} %",
    )


def _points(data: dict[str, Any], key: str) -> tuple[tuple[float, float], ...]:
    rows = ((float(row["round"]), words.as_float(row[key])) for row in data["rounds"])
    return tuple((x, y) for x, y in rows if abs(y) < float("inf"))
