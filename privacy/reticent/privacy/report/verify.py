"""Checks a written report: who signed it, that no byte changed, and that it fits the run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from reticent.core.errors import ArtifactError, RunError
from reticent.core.run import Run
from reticent.core.signing import PUBLIC_KEY

from .adversaries import READERS, SERVER
from .collect import collect, worded
from .render import KINDS, render_data
from .schema import problems
from .signing import SIGNATURE, Signature, digest, read_signature
from .writer import code_digest

TOLERANCE = 1e-6
"""Relative difference of recomputed numbers that another machine's arithmetic may make."""

LARGEST = 64 << 20
_WORDS = {"writer", "plain", "not_covered", "checklist"}
_WORDED = {"how", "accountant", "sees", "assumes", "verdict", "mechanism", "depends", "value"}


def verify_report(run: Run, key: Ed25519PublicKey) -> list[str]:
    """Check the report of ``run`` and return, a line each, what was checked.

    Guarantee: on return every byte of ``report.html``, ``report.json``, ``report.md`` and
    ``report.sig`` is what the holder of the key signed, and every number of ``report.json`` is what
    the run's ledger, metrics and summary give now (within one part in a million); the summary's own
    ε and δ, which other commands show, are the same. When the same sources wrote the report, all
    three files are made again and must be equal byte for byte; otherwise words that only describe
    are not compared.

    Raises:
        ArtifactError: If a file is missing, altered, signed by another key or does not fit the run.
        RunError: If the run itself is damaged or has not finished, or its summary was altered.
        LedgerError: If the run's ledger is damaged.
    """
    signature = read_signature(_read(run, SIGNATURE), key, str(run.folder / SIGNATURE))
    contents = _signed_contents(run, signature)
    written = _parsed(run, contents["report.json"])
    found = collect(run)
    _require_same_run(run, signature, found)
    differences = [*_differences(written, found)]
    if differences:
        raise ArtifactError(
            f"{run.folder}: the report does not fit the run: {'; '.join(differences[:3])}"
            f"{' and more' if len(differences) > 3 else ''}; if the run was audited since, write "
            "the report again"
        )
    _require_same_promise(run, found)
    return [
        "signature: holds, over the plan, the model and the digest of each file",
        f"files: {', '.join(sorted(contents))} are, byte for byte, what was signed",
        "schema: report.json is as its JSON Schema says",
        "run: every number was computed again from ledger, metrics and summary, and agrees",
        _remade(run, contents, found, written),
    ]


def _read(run: Run, name: str) -> bytes:
    path = run.folder / name
    try:
        if path.stat().st_size > LARGEST:
            raise ArtifactError(f"{path}: is larger than any report: at most {LARGEST} bytes")
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"{path}: cannot be read: {error.strerror}: `reticent report {run.folder}` writes it"
        ) from error


def _signed_contents(run: Run, signature: Signature) -> dict[str, bytes]:
    names = {f"report.{kind}" for kind in KINDS}
    if set(signature.digests) != names:
        raise ArtifactError(f"{run.folder / SIGNATURE}: must name {', '.join(sorted(names))}")
    contents = {name: _read(run, name) for name in sorted(names)}
    for name, content in contents.items():
        if digest(content) != signature.digests[name]:
            raise ArtifactError(f"{run.folder / name}: was altered: its SHA-256 is not the signed")
    return contents


def _parsed(run: Run, content: bytes) -> dict[str, Any]:
    path = run.folder / "report.json"
    try:
        data = json.loads(content)
        wrong = problems(data)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: is not JSON: {error}") from error
    if wrong:
        raise ArtifactError(f"{path}: is not as its schema says: {'; '.join(wrong[:3])}")
    return data


def _require_same_run(run: Run, signature: Signature, found: dict[str, Any]) -> None:
    for name, signed in (("plan", signature.plan), ("model", signature.model)):
        if signed != found["run"][name]:
            raise ArtifactError(
                f"{run.folder / SIGNATURE}: is about {name} {signed[:16]}, the run's is "
                f"{found['run'][name][:16]}"
            )


def _require_same_promise(run: Run, found: dict[str, Any]) -> None:
    """Refuse a summary that states another ε or δ than the report: other commands show it."""
    said = run.read_summary()["privacy"]
    against = {row["name"]: row["epsilon"] for row in found["adversaries"]}
    true = {"epsilon": against[READERS], "server_epsilon": against[SERVER]}
    true["delta"] = found["promise"]["delta"]
    wrong = [
        f"privacy.{key} is {_shown(said[key])}, and {_shown(value)} by all else in the run"
        for key, value in true.items()
        if key in said and not _same(said[key], value)
    ]
    if wrong:
        raise RunError(f"{run.summary}: {'; '.join(wrong)}: it was altered")


def _remade(
    run: Run, contents: dict[str, bytes], found: dict[str, Any], written: dict[str, Any]
) -> str:
    """Make the words and the files again, from the report's own numbers, if the sources agree."""
    if written["writer"]["sources"] != code_digest():
        return (
            f"words: written by reticent {written['writer']['version']} from other sources than "
            "these, so texts that only describe were not compared"
        )
    again = worded({**written, "releases": found["releases"]})
    for kind in KINDS:
        if render_data(again, kind).encode() != contents[f"report.{kind}"]:
            raise ArtifactError(
                f"{run.folder / f'report.{kind}'}: is not what these sources write for this run"
            )
    return "words: the files were made again by the same sources, and are equal byte for byte"


def _differences(written: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    for key in sorted({*written, *found} - _WORDS):
        yield from _differ(written.get(key), found.get(key), key)


def _differ(a: Any, b: Any, path: str) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b} - _WORDED):
            yield from _differ(a.get(key), b.get(key), f"{path}.{key}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _differ(x, y, f"{path}[{index}]")
    elif not _same(a, b):
        yield f"{path} is {_shown(a)} in the report and {_shown(b)} in the run"


def _same(a: Any, b: Any) -> bool:
    numbers = [isinstance(x, int | float) and not isinstance(x, bool) for x in (a, b)]
    if all(numbers):
        return a == b or math.isclose(a, b, rel_tol=TOLERANCE)
    return type(a) is type(b) and a == b


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"{type(value).__name__} of {len(value)}"
    return json.dumps(value)


def public_key_path(run: Run, given: Path | None) -> Path:
    """Return the key to verify with: the one given, else the run's own.

    Raises:
        ArtifactError: If there is neither.
    """
    own = run.keys / PUBLIC_KEY
    if given is None and not own.is_file():
        raise ArtifactError(f"{run.folder}: no key to verify with: give --key")
    return given or own
