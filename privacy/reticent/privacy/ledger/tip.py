"""``ledger.tip``: the end of the chain once more, outside the database.

SQLite drops the end of a write-ahead log whose checksums fail, as it must after a crash, and so
cannot tell a torn log from a shorter one. The tip can: it is written and synchronised after each
commit and before the commit's caller goes on, so nothing ever left the device that the tip did not
know. A database that lacks what the tip names has lost charges, and is refused.

The file holds two slots of 512 bytes, written in turn, so that a crash while one is written leaves
the other. Each slot is one line of JSON: ``sequence``, ``mac``, and ``seal``, the HMAC over both.
A tip that is behind the database is what a crash between commit and tip leaves; it is brought up to
date when the ledger is opened again, and before stored bytes are sent again.
"""

from __future__ import annotations

import fcntl
import hmac
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reticent.core.durable import sync_folder
from reticent.core.errors import LedgerError

from .records import Head

SLOT = 512


def read_tip(path: Path, key: bytes) -> Head:
    """Return the newest head that the file names.

    Raises:
        LedgerError: If no slot is whole.
        OSError: If the file cannot be read.
    """
    newest = _newest(_slots(path.read_bytes(), key))
    if newest is None:
        raise LedgerError(
            f"{path}: is damaged: neither of its two records is whole, so nothing shows that the "
            "ledger beside it is complete; put back the file, or the whole folder"
        )
    return newest


def create_tip(path: Path, key: bytes, head: Head) -> None:
    """Write a new file whose two slots name ``head``, durable on return."""
    part = path.with_suffix(".newtip")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(descriptor, _slot(key, head) * 2)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(part, path)
    sync_folder(path.parent)


def advance_tip(path: Path, key: bytes, head: Head) -> None:
    """Let the file name ``head`` unless it already names a later one; durable on return."""
    with _locked(path) as descriptor:
        slots = _slots(os.pread(descriptor, 2 * SLOT, 0), key)
        newest = _newest(slots)
        if newest is not None and newest.sequence >= head.sequence:
            return
        older = 0 if slots[0] is None or slots[0] != newest else 1
        os.pwrite(descriptor, _slot(key, head), older * SLOT)
        os.fdatasync(descriptor)  # the file's size and place never change


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # given back when the descriptor is closed
        yield descriptor
    finally:
        os.close(descriptor)


def _slot(key: bytes, head: Head) -> bytes:
    data = {"sequence": head.sequence, "mac": head.mac, "seal": _seal(key, head)}
    return (json.dumps(data) + "\n").encode().ljust(SLOT, b"\0")


def _slots(content: bytes, key: bytes) -> list[Head | None]:
    return [_head(content[i * SLOT : (i + 1) * SLOT], key) for i in range(2)]


def _head(slot: bytes, key: bytes) -> Head | None:
    try:
        data: Any = json.loads(slot.rstrip(b"\0"))
        head = Head(data["sequence"], data["mac"])
        whole = hmac.compare_digest(str(data["seal"]), _seal(key, head))
    except (ValueError, TypeError, KeyError):
        return None
    return head if whole else None


def _seal(key: bytes, head: Head) -> str:
    return hmac.digest(key, f"tip {head.sequence} {head.mac}".encode(), "sha256").hex()


def _newest(slots: list[Head | None]) -> Head | None:
    return max((s for s in slots if s is not None), key=lambda s: s.sequence, default=None)
