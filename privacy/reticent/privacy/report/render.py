"""A report as HTML, Markdown and JSON, from the data that :func:`collect` returns."""

from __future__ import annotations

import json
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from reticent.core.errors import DependencyError, RunError
from reticent.core.run import Run, write_atomic
from reticent.core.signing import private_key_file, read_private_key

from . import words
from .charts import capped, charts
from .checklist import audit_text, gdp_text, randomness_text
from .collect import collect
from .drawn import LEFT_OUT, drawn_in_secret
from .plain import delta_note
from .signing import SIGNATURE, sign
from .tuning import tuning_note

KINDS = ("html", "json", "md")
MOST_ROWS = 25
_NO_TEMPLATES = "Jinja2 is not installed: pip install 'reticent[server]'"


def write_reports(run: Run) -> list[Path]:
    """Write ``report.html``, ``.json``, ``.md`` and ``.sig`` and return their paths.

    All are made before the first is written, and each is replaced whole. Without the run's signing
    key there is no ``report.sig``; an old one is removed, because it is not about these files.

    Raises:
        RunError: If the run has not finished, is damaged, or its folder cannot be written.
        LedgerError: If the run's ledger is damaged.
        ArtifactError: If the run's signing key is damaged.
        DependencyError: If Jinja2 is not installed.
    """
    data = collect(run)
    contents = {f"report.{kind}": render_data(data, kind).encode() for kind in KINDS}
    key_file = private_key_file(run.keys)
    if key_file.exists():
        key = read_private_key(key_file)
        signature = sign(key, data["run"]["plan"], data["run"]["model"], contents)
        contents[SIGNATURE] = signature.encode()
    else:
        (run.folder / SIGNATURE).unlink(missing_ok=True)
    return [_write(run.folder / name, content) for name, content in contents.items()]


def _write(path: Path, content: bytes) -> Path:
    try:
        write_atomic(path, content)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def render(run: Run, kind: str) -> str:
    """Return the report of ``run`` as ``html``, ``json`` or ``md``.

    Raises:
        RunError: If ``kind`` is another word, or as :func:`write_reports`.
    """
    if kind not in KINDS:
        raise RunError(f"report kind {kind!r}: must be one of {', '.join(KINDS)}")
    return render_data(collect(run), kind)


def render_data(data: dict[str, Any], kind: str) -> str:
    """Return collected data as one of :data:`KINDS`."""
    return {"html": render_html, "json": render_json, "md": render_md}[kind](data)


def render_json(data: Any) -> str:
    """Return the data as strict, indented JSON."""
    return json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def render_html(data: dict[str, Any]) -> str:
    """Return one self-contained page: no scripts, no fonts, no requests.

    Raises:
        DependencyError: If Jinja2 is not installed.
    """
    return _report("template.html.j2", data, escaped=True)


def render_md(data: dict[str, Any]) -> str:
    """Return the report as Markdown.

    Raises:
        DependencyError: If Jinja2 is not installed.
    """
    return _report("report.md.j2", data, escaped=False)


def render_comparison(comparison: dict[str, Any], names: tuple[str, str], kind: str) -> str:
    """Return what :func:`compare` found, for runs of these names, as ``html``, ``json`` or ``md``.

    Raises:
        RunError: If ``kind`` is another word.
        DependencyError: If Jinja2 is not installed.
    """
    if kind not in KINDS:
        raise RunError(f"report kind {kind!r}: must be one of {', '.join(KINDS)}")
    if kind == "json":
        return render_json({"a": names[0], "b": names[1], **comparison})
    values = {**comparison, "names": names}
    if kind == "md":
        return filled("compare.md.j2", values, escaped=False)
    return filled("compare.html.j2", values, escaped=True)


def _report(template: str, data: dict[str, Any], escaped: bool) -> str:
    tested = [row for row in data["rounds"] if row["accuracy"] is not None]
    measured = [row | {"epsilon": capped(row["epsilon"], data)} for row in tested]
    groups = data["spent"]["groups"]
    private = data["promise"]["trust"] != "off"
    extra = {
        "delta_note": delta_note(data["promise"]) if private else "",
        "groups": groups[:MOST_ROWS],
        "groups_cut": len(groups) > MOST_ROWS,
        "audit_text": audit_text(data["audit"]),
        "tuning_note": tuning_note(data.get("tuning")),
        "charts": charts(data) if escaped else [],
        "measured": thinned(measured),
        "thinned": len(measured) > MOST_ROWS,
        "private": private,
        "left_out": LEFT_OUT if drawn_in_secret(data["promise"]) else "",
    }
    return filled(template, {**data, **extra}, escaped)


def thinned(rows: list[Any], most: int = MOST_ROWS) -> list[Any]:
    """Return at most ``most`` rows, evenly spread, the first and the last among them."""
    if len(rows) <= most:
        return rows
    return [rows[round(k * (len(rows) - 1) / (most - 1))] for k in range(most)]


def require_templates() -> None:
    """Check that pages can be written, before what they are to report is run.

    Raises:
        DependencyError: If Jinja2 is not installed.
    """
    if find_spec("jinja2") is None:
        raise DependencyError(_NO_TEMPLATES)


def filled(
    template: str, values: dict[str, Any], escaped: bool, package: str = __package__ or __name__
) -> str:
    """Return a template of ``package``, or else of this one, with values and the report's filters.

    Raises:
        DependencyError: If Jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, FunctionLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise DependencyError(_NO_TEMPLATES) from error
    environment = Environment(
        loader=FunctionLoader(lambda name: _source(package, name)),
        autoescape=escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        eps=words.epsilon_text,
        sure=words.certainty_text,
        percent=words.percent_text,
        delta=words.delta_text,
        size=words.bytes_text,
        number=words.number_text,
        counted=words.count_text,
        gdp=gdp_text,
        randomness=randomness_text,
        bound=words.bound_text,
        drawn=Markup,
        cell=lambda text: str(text).replace("|", "\\|").replace("\n", " "),
    )
    return environment.get_template(template).render(**values)


def _source(package: str, name: str) -> str:
    own = files(package).joinpath(name)
    found = own if own.is_file() else files(__package__ or __name__).joinpath(name)
    return found.read_text(encoding="utf-8")
