"""The privacy-budget report of a run: what was promised, to whom, and what was spent."""

from .collect import collect
from .compare import compare
from .render import (
    KINDS,
    render,
    render_comparison,
    render_html,
    render_json,
    render_md,
    write_reports,
)
from .schema import schema_text
from .signing import SIGNATURE
from .verify import public_key_path, verify_report

__all__ = [
    "KINDS",
    "SIGNATURE",
    "collect",
    "compare",
    "public_key_path",
    "render",
    "render_comparison",
    "render_html",
    "render_json",
    "render_md",
    "schema_text",
    "verify_report",
    "write_reports",
]
