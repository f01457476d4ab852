"""Flower apps as a device takes them: a name and a configuration, and no code.

A Flower app is a bundle (a zip archive) that the server sends. Ours holds a ``pyproject.toml`` and
its own list of contents; whatever holds more, or would be unpacked anywhere but where Flower keeps
apps, is refused before Flower stores it. So is a list that names another file: Flower (1.41) looks
for all that it names, also outside of the bundle, and whether the app then runs would tell the
server what is in a file of the device.
"""

from __future__ import annotations

import hashlib
import io
import re
import tomllib
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

from reticent.core.errors import PayloadError

FILES = ("pyproject.toml", ".info/CONTENT")
MOST_BYTES = 2**17
MOST_BUNDLE_BYTES = 2 * MOST_BYTES
"""What does not compress, and what a zip archive adds, leave room to spare in it."""

_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others take memory as they like
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")


def require_no_code(bundle: bytes) -> None:
    """Check a bundle that a server sent.

    Raises:
        PayloadError: If it is no bundle, is longer than :data:`MOST_BUNDLE_BYTES`, holds another
            file than those of :data:`FILES`, one of more than ``MOST_BYTES``, a list that is not
            of its one file, or a name from which no safe folder can be made.
    """
    project = _project(bundle)
    for path in (("project", "name"), ("project", "version"), ("tool", "flwr", "app", "publisher")):
        value: Any = project
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, str) or not _WORD.fullmatch(value):
            raise PayloadError(
                f"the app's {'.'.join(path)}={value!r}: must be letters, digits and . _ + -"
            )


def _project(bundle: bytes) -> dict[str, Any]:
    if len(bundle) > MOST_BUNDLE_BYTES:
        raise PayloadError(f"the app has {len(bundle)} bytes: at most {MOST_BUNDLE_BYTES}")
    try:
        with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
            _check_files(archive.infolist())
            text, content = (_read(archive, name) for name in FILES)
            if content != contents(text):
                raise PayloadError(f"the app's list of contents is not of its {FILES[0]} alone")
            return tomllib.loads(text.decode())
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError) as error:
        raise PayloadError(f"the app is no bundle of Flower's: {error}") from error


def _check_files(found: Sequence[zipfile.ZipInfo]) -> None:
    names = sorted(entry.filename for entry in found)
    if names != sorted(FILES):
        shown = f"{names[:5]}" if len(names) <= 5 else f"{names[:5]} and more"
        raise PayloadError(f"the app holds {shown}: only {list(FILES)} are taken")
    if any(entry.compress_type not in _COMPRESSIONS for entry in found):
        raise PayloadError("the app is compressed in another way than Flower's are")


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    with archive.open(name) as file:
        # A size in a zip archive is what its maker wrote there.
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise PayloadError(f"the app holds a file of more than {MOST_BYTES} bytes")
    return data


def contents(project: bytes) -> bytes:
    """Return the list of contents of a bundle that holds a ``pyproject.toml`` alone."""
    return f"{FILES[0]},{hashlib.sha256(project).hexdigest()},{8 * len(project)}".encode()
