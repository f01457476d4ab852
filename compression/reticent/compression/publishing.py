"""A folder of files that appears whole or not at all, for artifacts."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from reticent.core.durable import sync_folder
from reticent.core.errors import ArtifactError
from reticent.core.plain_files import read_plain
from reticent.core.signing import write_new

from .manifest import MANIFEST, MAX_MANIFEST_BYTES, SIGNATURE, parse_manifest


def check_target(folder: Path, replace: bool) -> None:
    """Refuse a folder that is taken, or that is no artifact to be replaced.

    What is replaced is deleted, so it must be an artifact and nothing else: a manifest that says
    so, and no entry that such a manifest does not name. Other programs have a manifest.json too.

    Raises:
        ArtifactError: If it is.
    """
    if not (folder.exists() or folder.is_symlink()):
        return
    if not replace:
        raise ArtifactError(f"{folder}: already exists; ask for it to be replaced, or move it")
    if folder.is_symlink() or not (folder / MANIFEST).is_file():
        raise ArtifactError(f"{folder}: is not an artifact, so it is not replaced")
    _require_nothing_else(folder)


def _require_nothing_else(folder: Path) -> None:
    try:
        text = read_plain(folder / MANIFEST, MAX_MANIFEST_BYTES, ArtifactError, links=False)
        named = {*parse_manifest(text).files, MANIFEST, SIGNATURE}
    except ArtifactError as error:
        raise ArtifactError(
            f"{folder}: is not an artifact, so it is not replaced: {error}"
        ) from error
    for path in sorted(folder.iterdir()):
        if path.name not in named or path.is_symlink() or not path.is_file():
            raise ArtifactError(
                f"{folder}: holds {path.name}, which is not part of an artifact, so it is not "
                "replaced; choose another folder"
            )


def publish(folder: Path, contents: Mapping[str, bytes], replace: bool) -> None:
    """Write ``contents``, by name, to ``folder``, which appears whole or not at all.

    Raises:
        ArtifactError: As :func:`check_target`.
        OSError: If it cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
    try:
        for name, data in contents.items():
            write_new(temporary / name, data, 0o644)
        temporary.chmod(0o755)
        sync_folder(temporary)
        _swap(temporary, folder, replace)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _swap(temporary: Path, folder: Path, replace: bool) -> None:
    # Checked again: the folder may have appeared while the files were written.
    check_target(folder, replace)
    old = folder.parent / f".{folder.name}.old-{secrets.token_hex(4)}"
    replaced = folder.exists()
    if replaced:
        folder.rename(old)
    try:
        temporary.rename(folder)
    except OSError:
        if replaced:
            old.rename(folder)
        raise
    sync_folder(folder.parent)
    if replaced:
        shutil.rmtree(old, ignore_errors=True)
