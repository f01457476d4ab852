"""Which code wrote a report."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import reticent


def writer() -> dict[str, str]:
    """Return the package's ``version`` and the SHA-256 of its ``sources``."""
    return {"version": _version(), "sources": code_digest()}


def _version() -> str:
    try:
        return version("reticent")
    except PackageNotFoundError:
        return "(not installed)"


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Return the SHA-256, as hex, of the installed Python sources, in order of their paths."""
    digest = hashlib.sha256()
    sources = [
        (path.relative_to(root).as_posix(), path)
        for root in map(Path, reticent.__path__)
        for path in root.rglob("*.py")
    ]
    for name, path in sorted(sources):
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
