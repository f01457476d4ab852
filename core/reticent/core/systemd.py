"""What the systemd units of server and device have in common."""

from __future__ import annotations

from pathlib import Path

from .errors import ProvisionError


def quoted(path: Path) -> str:
    """Return ``path`` as a unit file takes it.

    Raises:
        ProvisionError: If a unit file cannot hold it.
    """
    text = str(path)
    if not text.isprintable() or set(text) & set("\"'\\%$"):
        raise ProvisionError(f"{path}: a systemd unit cannot hold such a path: choose another")
    return f'"{text}"' if " " in text else text
