"""The documents name what the code has, with the defaults it has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner

from reticent.cli.main import cli
from reticent.core import errors
from reticent.core.fleet import Buffered, Fleet
from reticent.core.plan import Plan, Trained, parse_plan
from reticent.core.protocol import Refusal

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
ROW = re.compile(r"^\| `([a-z_.]+)` \| [^|]+ \| (none|`[^`]+`) \|", re.MULTILINE)


def plan_rows(text: str) -> dict[str, Any]:
    rows = ROW.findall(text)
    assert len({key for key, _ in rows}) == len(rows)
    return {key: None if value == "none" else json.loads(value[1:-1]) for key, value in rows}


def leaves(data: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def commands(group: click.Group, path: str = "") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, f"{path}{name} ")
        else:
            yield f"{path}{name}", command


def section_of(text: str, heading: str) -> str:
    return text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


def test_the_plan_page_has_every_key_with_its_default_and_no_other() -> None:
    documented = plan_rows((DOCS / "plan.md").read_text(encoding="utf-8"))
    plan = parse_plan("").model_dump(mode="json")
    assert plan["fleet"] is None and plan["federation"]["buffered"] is None
    absent = {
        **dict(leaves(Fleet().model_dump(mode="json"), "fleet.")),
        **dict(leaves(Buffered().model_dump(mode="json"), "federation.buffered.")),
        **{f"teacher.trained.{key}": None for key in Trained.model_fields},
    }
    assert documented == dict(leaves(plan)) | absent


def test_a_wrong_default_in_the_plan_page_would_be_found() -> None:
    text = (DOCS / "plan.md").read_text(encoding="utf-8")
    wrong = text.replace("| `seed` | integer | `0` |", "| `seed` | integer | `1` |")
    assert plan_rows(wrong) != plan_rows(text)


def test_the_plan_page_has_every_section_of_the_plan() -> None:
    text = (DOCS / "plan.md").read_text(encoding="utf-8")
    sections = set(re.findall(r"^## \[([a-z]+)\]$", text, re.MULTILINE))
    assert sections == set(Plan.model_fields) - {"seed"}


def test_the_plan_in_the_plan_page_is_a_plan() -> None:
    text = (DOCS / "plan.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert parse_plan(example).federation.rounds == 30


def test_the_command_page_has_every_command_and_exactly_its_options() -> None:
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    found = dict(commands(cli))
    assert set(re.findall(r"^## reticent (.+)$", text, re.MULTILINE)) == set(found)
    for name, command in found.items():
        section = section_of(text, f"reticent {name}")
        documented = set(re.findall(r"^\| `(--[a-z-]+)", section, re.MULTILINE))
        options = {o for p in command.params if isinstance(p, click.Option) for o in p.opts}
        assert documented == options, name


def test_the_command_page_and_the_help_have_every_exit_status_and_no_other() -> None:
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    table = section_of(text, "Exit status")
    documented = {int(n) for n in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    kinds = [k for k in vars(errors).values() if isinstance(k, type)]
    codes = {k.exit_code for k in kinds if issubclass(k, errors.ReticentError)}
    assert documented == codes | {0, 2, 130, 143}
    shown = CliRunner().invoke(cli, ["--help"]).output.split("Exit status:")[1].split("Options:")[0]
    assert {int(n) for n in re.findall(r"\b\d+\b", shown)} == documented


def test_the_error_page_has_every_exit_status_and_says_what_to_do() -> None:
    table = section_of(
        (DOCS / "errors.md").read_text(encoding="utf-8"), "Exit status of `reticent`"
    )
    rows = re.findall(r"^\| (\d+) \| ([^|]*) \|( [^|]*)? \|$", table, re.MULTILINE)
    kinds = [k for k in vars(errors).values() if isinstance(k, type)]
    codes = {k.exit_code for k in kinds if issubclass(k, errors.ReticentError)}
    assert {int(code) for code, _, _ in rows} == codes | {0, 2, 130, 143}
    assert all(means.strip() and (todo.strip() or code == "0") for code, means, todo in rows)


def test_every_refusal_of_a_device_is_explained() -> None:
    """Each code is in one row, with the text that is sent where it is alone in it."""
    page = (DOCS / "deployment.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (1\d{3}(?:, 1\d{3})*) \| ([^|]+) \| ([^|]+) \|$", page, re.MULTILINE)
    explained = [int(code) for codes, _, _ in rows for code in codes.split(", ")]
    assert sorted(explained) == sorted(Refusal)
    for codes, text, _ in rows:
        if "," not in codes:
            assert text.startswith(Refusal(int(codes)).text)


def test_every_reason_for_which_a_server_passes_a_reply_over_is_explained() -> None:
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    reason = re.compile(r'raise PayloadError\(\s*"([^"]+)"\s*\)')
    for name in ("countersign", "folding", "strategy"):
        source = ROOT / "server" / "reticent" / "server" / f"{name}.py"
        found = reason.findall(source.read_text(encoding="utf-8"))
        assert found
        assert all(f"| {text} |" in page for text in found)


def anchors(text: str) -> set[str]:
    """Return what a heading is reached by, as GitHub makes it of the heading's text."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


def test_every_row_of_a_table_is_in_its_table() -> None:
    for page in [*sorted(DOCS.rglob("*.md")), *DOCS.parent.glob("*.md")]:
        lines = re.sub(r"(?ms)^ *```.*?^ *```", "", page.read_text(encoding="utf-8")).split("\n")
        for before, line, after in zip(["", *lines], lines, [*lines[1:], ""], strict=False):
            begins = line.startswith("|") and not before.startswith("|")
            assert not begins or re.fullmatch(r"\|[ :|-]+\|", after), f"{page.name}: {line}"


def test_links_between_pages_lead_somewhere() -> None:
    pages = [*sorted(DOCS.rglob("*.md")), *DOCS.parent.glob("*.md")]
    pages += sorted((DOCS.parent / "examples").rglob("*.md"))
    assert len(pages) >= 12
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
            found = page.parent / target if target else page
            assert found.exists(), f"{page.name}: {target}"
            if anchor:
                assert anchor in anchors(found.read_text(encoding="utf-8")), (
                    f"{page.name}: {anchor}"
                )
