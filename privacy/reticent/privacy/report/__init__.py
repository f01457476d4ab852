"""The privacy-budget report of a run: what was promised, to whom, and what was spent."""

from .collect import collect
from .render import KINDS, render, render_html, render_json, render_md, write_reports

__all__ = [
    "KINDS",
    "collect",
    "render",
    "render_html",
    "render_json",
    "render_md",
    "write_reports",
]
