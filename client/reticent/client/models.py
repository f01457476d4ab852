"""The models that a device has: the current one, the last good one, and one that is arriving.

``models/`` in the device's folder holds a folder per installed version (an artifact, as it was
signed), ``state.json``, which says which of them is current, and ``incoming/``. Guarantee: whatever
dies at any moment, ``state.json`` is the old one or the new one, and names folders that were whole,
synced and self-tested before it named them. A version below the highest that was ever installed is
not installed again, as long as ``state.json`` is not put back.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from reticent.core.decoding import parse_json
from reticent.core.errors import ArtifactError
from reticent.core.offer import MOST_MODEL, Offer, joined
from reticent.core.run import write_atomic
from reticent.core.signing import write_new

from .incoming import Incoming, sync

MOST_TRIES = 3
"""Self-tests of one version that may fail or die before the device takes it no more."""

_MOST_STATE = 4096
_NUMBERS = ("highest", "tried", "tries")
_SLOT = {"version": int, "plan": str, "sha256": str}


@dataclass(frozen=True)
class Slot:
    """One installed model.

    Attributes:
        version: Its number, and the name of its folder.
        plan: Digest of the plan that it was trained by.
        sha256: Of its files.
    """

    version: int
    plan: str
    sha256: str


@dataclass(frozen=True)
class State:
    """What is installed.

    Attributes:
        slots: The current model first, then the last good one, if there is one.
        highest: The highest version that was ever installed.
        tried: The version whose self-test was begun last and did not pass.
        tries: How often it was begun.
    """

    slots: tuple[Slot, ...] = ()
    highest: int = 0
    tried: int = 0
    tries: int = 0

    @property
    def version(self) -> int:
        """Of the current model; 0 for none."""
        return self.slots[0].version if self.slots else 0

    def tries_of(self, version: int) -> int:
        """Return how often the self-test of a version was begun and did not pass."""
        return self.tries if self.tried == version else 0


class SelfTestFailed(ArtifactError):
    """A model that arrived whole does not work on this device; the one before stays."""


class Models:
    """The models in a device's folder; change them inside :meth:`alone` only."""

    def __init__(self, folder: Path) -> None:
        """Use ``folder``, which is made when the first offer comes."""
        self.folder = folder
        self.incoming = Incoming(folder / "incoming")
        self._file = folder / "state.json"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder for this process, and clear away what a crash left behind."""
        if not self.folder.is_dir():
            self.folder.mkdir(mode=0o700, exist_ok=True)
            sync(self.folder.parent)
        with (self.folder / ".lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._tidy()
            yield

    def state(self) -> State:
        """Return what is installed.

        Raises:
            ArtifactError: If the record is damaged.
        """
        try:
            with self._file.open("rb") as file:
                return parse_state(file.read(_MOST_STATE))
        except FileNotFoundError:
            return State()
        except OSError as error:
            raise ArtifactError(f"{self._file}: cannot be read: {error.strerror}") from error
        except ArtifactError as error:
            raise ArtifactError(
                f"{self._file}: {error}; without it the device forgets its models and takes any "
                f"version again: remove {self.folder} to begin anew"
            ) from error

    def path(self, version: int) -> Path:
        """Return the folder of an installed version."""
        return self.folder / str(version)

    def holds(self, offer: Offer) -> bool:
        """Return whether the current model is the offered one, and its files are as they were."""
        slots = self.state().slots
        wanted = Slot(offer.version, offer.plan, offer.sha256)
        return bool(slots) and slots[0] == wanted and self._intact(wanted)

    def admits(self, offer: Offer) -> bool:
        """Return whether an offer is newer than all before, or mends the current model."""
        state = self.state()
        wanted = Slot(offer.version, offer.plan, offer.sha256)
        return offer.version > state.highest or wanted in state.slots[:1]

    def install(
        self, offer: Offer, files: Mapping[str, bytes], trial: Callable[[Path], str]
    ) -> None:
        """Make the offered model the current one, if it passes its self-test.

        Args:
            offer: It was admitted.
            files: What was offered.
            trial: Returns why the model in a folder does not work; nothing if it does.

        Raises:
            SelfTestFailed: If it does not; the current model is the one before.
            OSError: If it cannot be stored.
        """
        before = self.state()
        # Written first: a test that takes the whole device down must not be tried for ever.
        tries = before.tries_of(offer.version) + 1
        self._write(replace(before, tried=offer.version, tries=tries))
        path = self._unpack(offer.version, files)
        if why := trial(path):
            shutil.rmtree(path)
            raise SelfTestFailed(f"model {offer.version}: {why}")
        good = [s for s in before.slots if s.version != offer.version and self._intact(s)]
        slot = Slot(offer.version, offer.plan, offer.sha256)
        self._write(State((slot, *good[:1]), max(before.highest, offer.version)))
        self.incoming.clear()
        self._tidy()

    def roll_back(self) -> State:
        """Make the last good model the current one again, for the owner; return what is installed.

        Raises:
            ArtifactError: If there is none, or its files are not as they were; nothing is changed.
        """
        before = self.state()
        if len(before.slots) < 2:
            raise ArtifactError(f"{self.folder}: holds no model before the current one")
        # Now, because the current one is gone for good afterwards.
        if not self._intact(before.slots[1]):
            path = self.path(before.slots[1].version)
            raise ArtifactError(f"{path}: is damaged; the device keeps the current model instead")
        self._write(replace(before, slots=before.slots[1:]))
        self._tidy()
        return self.state()

    def _write(self, state: State) -> None:
        write_atomic(self._file, json.dumps(asdict(state)).encode())

    def _unpack(self, version: int, files: Mapping[str, bytes]) -> Path:
        """Write a folder whole, synced, under its own name, and return it."""
        part, path = self.folder / ".new", self.path(version)
        part.mkdir(mode=0o700)
        for name, data in files.items():
            write_new(part / name, data, 0o600)
        sync(part)
        if path.exists():  # damaged, or of an attempt that died
            shutil.rmtree(path)
        part.rename(path)
        sync(self.folder)
        return path

    def _intact(self, slot: Slot) -> bool:
        """Return whether a model's files are what was installed."""
        try:
            paths = list(self.path(slot.version).iterdir())
            if sum(path.lstat().st_size for path in paths) > MOST_MODEL:
                return False
            files = {path.name: path.read_bytes() for path in paths}
        except OSError:
            return False
        return hashlib.sha256(joined(files)).hexdigest() == slot.sha256

    def _tidy(self) -> None:
        known = {".lock", self._file.name, self.incoming.folder.name}
        known |= {str(slot.version) for slot in self.state().slots}
        for path in self.folder.iterdir():
            if path.name not in known:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def parse_state(data: bytes) -> State:
    """Return what a ``state.json`` says.

    Raises:
        ArtifactError: If it is damaged.
    """
    try:
        found = parse_json(data)
        if not isinstance(found, dict) or set(found) != {"slots", *_NUMBERS}:
            raise ValueError(f"must hold slots, {', '.join(_NUMBERS)}, and nothing else")
        if any(type(found[key]) is not int or found[key] < 0 for key in _NUMBERS):
            raise ValueError(f"{', '.join(_NUMBERS)} must be whole numbers from 0")
        return State(_slots(found["slots"]), *(found[key] for key in _NUMBERS))
    except ValueError as error:
        raise ArtifactError(f"damaged: {error}") from error


def _slots(found: Any) -> tuple[Slot, ...]:
    if not isinstance(found, list) or len(found) > 2:
        raise ValueError("slots must be a list of at most two")
    for entry in found:
        if not isinstance(entry, dict) or {k: type(v) for k, v in entry.items()} != _SLOT:
            raise ValueError("each slot must hold version, plan and sha256")
        if entry["version"] < 1:
            raise ValueError("a version is at least 1")
    return tuple(Slot(**entry) for entry in found)
