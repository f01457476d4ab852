"""The signature of a report, and what ``reticent report --verify`` finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_runs import build

from reticent.core.errors import ArtifactError, LedgerError, RunError
from reticent.core.run import Run
from reticent.core.signing import make_signing_key, read_private_key, read_public_key
from reticent.privacy.events import PoissonGaussian
from reticent.privacy.ledger import Budget, Ledger
from reticent.privacy.report import collect, render_json, verify_report, write_reports
from reticent.privacy.report.render import KINDS
from reticent.privacy.report.signing import Signature, read_signature, sign


@pytest.fixture
def written(tmp_path: Path) -> Run:
    run = build(tmp_path / "run")
    write_reports(run)
    return run


def verified(run: Run, key: Path | None = None) -> list[str]:
    return verify_report(run, read_public_key(key or run.keys / "signing_key.pub.pem"))


def resign(run: Run, data: dict[str, Any]) -> None:
    """Put ``data`` in place of the report's JSON and sign it again, as the run's owner could."""
    (run.folder / "report.json").write_text(render_json(data))
    contents = {f"report.{k}": (run.folder / f"report.{k}").read_bytes() for k in KINDS}
    key = read_private_key(run.keys / "signing_key.pem")
    signature = sign(key, data["run"]["plan"], data["run"]["model"], contents)
    (run.folder / "report.sig").write_bytes(signature.encode())


def test_a_written_report_verifies_and_says_what_was_checked(written: Run) -> None:
    lines = verified(written)
    assert [line.split(":")[0] for line in lines] == [
        "signature",
        "files",
        "schema",
        "run",
        "words",
    ]
    assert "byte for byte" in lines[-1]


def test_the_artifacts_key_verifies_the_report_too(written: Run) -> None:
    public = read_public_key(written.keys / "signing_key.pub.pem")
    content = (written.folder / "report.sig").read_bytes()
    signature = read_signature(content, public, "report.sig")
    assert signature.plan == written.plan().digest
    assert sorted(signature.digests) == ["report.html", "report.json", "report.md"]


def test_one_flipped_bit_anywhere_in_the_signature_is_found(written: Run) -> None:
    key = read_public_key(written.keys / "signing_key.pub.pem")
    content = (written.folder / "report.sig").read_bytes()
    for place in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            with pytest.raises(ArtifactError):
                read_signature(bytes(damaged), key, "report.sig")


def test_nothing_can_be_added_to_the_signature_file_or_cut_off(written: Run) -> None:
    key = read_public_key(written.keys / "signing_key.pub.pem")
    content = (written.folder / "report.sig").read_bytes()
    line = content.splitlines(keepends=True)[1]
    for damaged in (
        b"",
        content[:-1],
        content[1:],
        content + b"\n",
        content + line,
        line + content,
    ):
        with pytest.raises(ArtifactError):
            read_signature(damaged, key, "report.sig")


@pytest.mark.parametrize("kind", KINDS)
def test_one_flipped_byte_of_a_file_is_found(written: Run, kind: str) -> None:
    path = written.folder / f"report.{kind}"
    content = path.read_bytes()
    for place in (0, len(content) // 3, len(content) // 2, len(content) - 1):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=f"report.{kind}: was altered"):
            verified(written)
    path.write_bytes(content)
    assert verified(written)


@pytest.mark.parametrize("name", ["report.html", "report.json", "report.md", "report.sig"])
def test_a_missing_file_is_named(written: Run, name: str) -> None:
    (written.folder / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name}: cannot be read"):
        verified(written)


def test_a_report_of_another_key_is_refused(written: Run, tmp_path: Path) -> None:
    make_signing_key(tmp_path / "other")
    with pytest.raises(ArtifactError, match="the signature does not hold"):
        verified(written, tmp_path / "other" / "signing_key.pub.pem")


def test_a_report_of_another_run_is_refused(written: Run, tmp_path: Path) -> None:
    other = build(tmp_path / "other", "seed=1", signed=False)
    for name in ("report.html", "report.json", "report.md", "report.sig"):
        (other.folder / name).write_bytes((written.folder / name).read_bytes())
    with pytest.raises(ArtifactError, match="is about plan"):
        verified(other, written.keys / "signing_key.pub.pem")


def test_a_smaller_epsilon_is_found_even_if_its_owner_signed_it(written: Run) -> None:
    data = collect(written)
    data["adversaries"][0]["epsilon"] -= 0.1
    resign(written, data)
    with pytest.raises(ArtifactError, match=r"adversaries\[0\]\.epsilon is"):
        verified(written)


def test_a_page_that_says_otherwise_than_the_numbers_is_found(written: Run) -> None:
    page = written.folder / "report.html"
    page.write_text(page.read_text().replace("reasonable protection", "perfect protection"))
    resign(written, collect(written))
    with pytest.raises(ArtifactError, match=r"report\.html: is not what these sources write"):
        verified(written)


def test_a_field_that_the_schema_does_not_know_is_found(written: Run) -> None:
    resign(written, {**collect(written), "remark": "all is well"})
    with pytest.raises(ArtifactError, match="remark is not known"):
        verified(written)


def test_a_charge_after_the_report_makes_it_outdated(written: Run) -> None:
    event = PoissonGaussian(0.2, 1.5, 1)
    with Ledger.open(written.ledger) as ledger:
        ledger.charge_many(["client-0"], "other", 1, event, Budget(9.0, 1e-5))
    with pytest.raises(ArtifactError, match="does not fit the run"):
        verified(written)


def test_altered_metrics_are_found(written: Run) -> None:
    text = written.metrics.read_text()
    written.metrics.write_text(text.replace('"replies": 3', '"replies": 4', 1))
    with pytest.raises(ArtifactError, match=r"rounds\[0\]\.replies is 3 in the report and 4"):
        verified(written)


@pytest.mark.parametrize("settings", [(), ('privacy.trust="local"',), ('privacy="off"',)])
def test_another_epsilon_in_the_summary_is_found(tmp_path: Path, settings: tuple[str, ...]) -> None:
    """What ``reticent runs``, a sweep and the last lines of a simulation show."""
    run = build(tmp_path / "run", *settings)
    data, summary = collect(run), run.read_summary()
    rows = {row["name"]: row["epsilon"] for row in data["adversaries"]}
    figures = {"epsilon": rows["Readers of the models"], "server_epsilon": rows["The server"]}
    if data["promise"]["delta"] is not None:
        figures["delta"] = data["promise"]["delta"]
    true = summary["privacy"] | figures
    run.summary.write_text(json.dumps(summary | {"privacy": true}))
    write_reports(run)
    assert verified(run)
    for key, value in figures.items():
        for wrong in (0.5, "infinity" if value != "infinity" else 8.0, None, f"{value}"):
            if wrong == value:
                continue
            run.summary.write_text(json.dumps(summary | {"privacy": true | {key: wrong}}))
            with pytest.raises(RunError, match=rf"summary\.json: privacy\.{key} is .* altered"):
                verified(run)


def test_a_damaged_ledger_is_a_ledger_error(written: Run) -> None:
    (written.ledger / "ledger.key").write_bytes(bytes(32))
    with pytest.raises(LedgerError):
        verified(written)


def test_a_run_without_a_key_gets_no_signature_and_loses_an_old_one(written: Run) -> None:
    (written.keys / "signing_key.pem").unlink()
    assert "report.sig" not in [path.name for path in write_reports(written)]
    assert not (written.folder / "report.sig").exists()
    with pytest.raises(ArtifactError, match=r"report\.sig: cannot be read"):
        verified(written)


def test_words_of_other_sources_are_not_compared_but_numbers_are(written: Run) -> None:
    data = collect(written)
    data["writer"]["sources"] = "0" * 64
    data["checklist"][0]["answer"] = "said otherwise"
    resign(written, data)
    assert "were not compared" in verified(written)[-1]
    data["traffic"]["replies"] += 1
    resign(written, data)
    with pytest.raises(ArtifactError, match=r"traffic\.replies"):
        verified(written)


def test_the_signed_text_is_one_line_a_fact_in_a_fixed_order() -> None:
    digests = {"report.md": "22", "report.html": "11"}
    text = Signature("aa", "bb", digests, b"\x01").encode().decode()
    assert text.splitlines() == [
        "reticent privacy report, signature 1",
        "plan aa",
        "model bb",
        "report.html 11",
        "report.md 22",
        "signature 01",
    ]
