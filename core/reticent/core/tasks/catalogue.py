"""What data sets there are, and which of them are there to be used."""

from __future__ import annotations

from typing import NamedTuple

from ..errors import DataError
from .folder import data_folder
from .har import HINT
from .sources import OFFICIAL, find_official


class Entry(NamedTuple):
    """One data set: whether it is there, and where it is or how to get it."""

    name: str
    ready: bool
    where: str


def entries() -> list[Entry]:
    """Return every built-in data set. Nothing is read, so a damaged file counts as there."""
    embedded = [Entry(name, True, "in the package") for name in ("digits", "fashion", "text")]
    return [*embedded, _fashion_full(), _har()]


def _fashion_full() -> Entry:
    try:
        folder = {find_official(name).parent for name in OFFICIAL}
    except DataError as error:
        return Entry("fashion-full", False, str(error).removeprefix("fashion-full: "))
    return Entry("fashion-full", True, ", ".join(sorted(map(str, folder))))


def _har() -> Entry:
    path = data_folder() / "har.safetensors"
    return Entry("har", path.is_file(), str(path) if path.is_file() else HINT)
