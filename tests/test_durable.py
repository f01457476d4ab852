"""Files that must outlive a power cut: their content is on disk, and then their name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from test_bundle import BUNDLE

from reticent.core.bundle import write_bundle
from reticent.core.run import write_atomic
from reticent.server.home import write_private
from reticent.server.registry import Registry, write_registry

Write = Callable[[Path], None]


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_atomic(path, b"new"),
        lambda path: write_private(path, b"new"),
        lambda path: write_registry(path, Registry()),
        lambda path: write_bundle(path, BUNDLE),
    ],
)
def test_a_name_is_synced_after_it_was_given_and_its_content_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    path, synced = tmp_path / "file", list[tuple[Path, list[str]]]()
    real = os.fsync

    def recorded(descriptor: int) -> None:
        what = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((what, sorted(p.name for p in tmp_path.iterdir())))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    write(path)
    (content, before), (folder, names) = synced
    assert content.parent == tmp_path and before == [content.name] != [path.name]
    assert folder == tmp_path and names == [path.name]
