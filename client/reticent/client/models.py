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
from math import isfinite
from pathlib import Path
from time import time
from typing import Any

from reticent.core.decoding import parse_json
from reticent.core.errors import ArtifactError
from reticent.core.offer import MOST_MODEL, Offer, joined
from reticent.core.run import write_atomic
from reticent.core.signing import write_new

from .incoming import Incoming, sync
from .trial import CutShort

MOST_TRIES = 3
"""Self-tests of one version that may fail or die before the device takes it no more."""

MOST_TRIED = 8
"""Versions whose self-tests are remembered, those tried last."""

_FIRST_PAUSE, _GROWTH, _LONGEST_PAUSE = 600.0, 4.0, 86400.0
_MOST_STATE = 4096
_SLOT = {"version": int, "plan": str, "sha256": str}
_TRIED = {"version": int, "failed": int, "cut_short": int, "at": float}


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
class Tried:
    """The self-tests of one version, none of which passed.

    Attributes:
        version: Its number.
        failed: Tests that failed, or took the whole device down with them.
        cut_short: Tests in a row that the device let come to no end.
        at: When the last of these was, in seconds since 1970.
    """

    version: int
    failed: int = 0
    cut_short: int = 0
    at: float = 0.0

    @property
    def pause(self) -> float:
        """Seconds after the last test that was cut short in which no other is begun.

        Ten minutes, then four times the one before, and a day at most.
        """
        # The exponent is bounded: a device may be busy for years.
        longer = _GROWTH ** min(self.cut_short - 1, 30)
        return min(_LONGEST_PAUSE, _FIRST_PAUSE * longer) if self.cut_short else 0.0


@dataclass(frozen=True)
class State:
    """What is installed, and what was tried.

    Attributes:
        slots: The current model first, then the last good one, if there is one.
        highest: The highest version that was ever installed.
        tried: At most :data:`MOST_TRIED` versions whose self-tests did not pass, the last one last.
    """

    slots: tuple[Slot, ...] = ()
    highest: int = 0
    tried: tuple[Tried, ...] = ()

    @property
    def version(self) -> int:
        """Of the current model; 0 for none."""
        return self.slots[0].version if self.slots else 0

    def tests_of(self, version: int) -> Tried:
        """Return what is remembered of a version's self-tests."""
        return next((one for one in self.tried if one.version == version), Tried(version))

    def having(self, tried: Tried) -> State:
        """Return the state that remembers ``tried`` of its version, as the last one."""
        others = [one for one in self.tried if one.version != tried.version]
        return replace(self, tried=(*others, tried)[-MOST_TRIED:])


class SelfTestFailed(ArtifactError):
    """A model that arrived whole does not work on this device; the one before stays."""


class Models:
    """The models in a device's folder; change them inside :meth:`alone` only."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time) -> None:
        """Use ``folder``, which is made when the first offer comes.

        Args:
            folder: The models'.
            clock: Returns seconds since 1970.
        """
        self.folder, self._clock = folder, clock
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

    def waits(self, version: int) -> bool:
        """Return whether a version's self-test was cut short, and is not to be begun yet."""
        tried = self.state().tests_of(version)
        # A clock that was far ahead and then set right must not put the test off for years.
        return abs(self._clock() - tried.at) < tried.pause

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
            CutShort: If the test came to no end; likewise, and nothing is held against the model.
            OSError: If it cannot be stored; likewise.
        """
        before, path = self.state(), self._unpack(offer.version, files)
        tried = before.tests_of(offer.version)
        # Written first: a test that takes the whole device down must not be tried for ever.
        self._write(before.having(Tried(offer.version, tried.failed + 1)))
        try:
            why = trial(path)
        except CutShort:
            cut = replace(tried, cut_short=tried.cut_short + 1, at=self._clock())
            self._write(before.having(cut))
            shutil.rmtree(path)
            raise
        if why:
            shutil.rmtree(path)
            raise SelfTestFailed(f"model {offer.version}: {why}")
        good = [s for s in before.slots if s.version != offer.version and self._intact(s)]
        slot = Slot(offer.version, offer.plan, offer.sha256)
        highest = max(before.highest, offer.version)
        higher = tuple(one for one in before.tried if one.version > highest)
        self._write(State((slot, *good[:1]), highest, higher))
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
        found = _of_today(parse_json(data))
        if not isinstance(found, dict) or set(found) != {"slots", "highest", "tried"}:
            raise ValueError("must hold slots, highest, tried, and nothing else")
        if not _is_count(found["highest"]):
            raise ValueError("highest must be a whole number from 0")
        slots = _entries("slots", found["slots"], 2, _SLOT)
        tried = _entries("tried", found["tried"], MOST_TRIED, _TRIED)
        if not all(_is_sound(entry) for entry in tried):
            raise ValueError("tried must hold whole numbers from 0, and times")
        return State(
            tuple(Slot(**entry) for entry in slots),
            found["highest"],
            tuple(Tried(**entry) for entry in tried),
        )
    except ValueError as error:
        raise ArtifactError(f"damaged: {error}") from error


def _of_today(found: Any) -> Any:
    """Return a record as it is written now; before, it held the tries of one version only."""
    if not isinstance(found, dict) or set(found) != {"slots", "highest", "tried", "tries"}:
        return found
    if not _is_count(found["tried"]) or not _is_count(found["tries"]):
        raise ValueError("tried and tries must be whole numbers from 0")
    one = asdict(Tried(found["tried"], found["tries"]))
    kept = {"slots": found["slots"], "highest": found["highest"]}
    return {**kept, "tried": [one] if found["tried"] else []}


def _entries(what: str, found: Any, most: int, kinds: Mapping[str, type]) -> list[Any]:
    if not isinstance(found, list) or len(found) > most:
        raise ValueError(f"{what} must be a list of at most {most}")
    for entry in found:
        if not isinstance(entry, dict) or {k: type(v) for k, v in entry.items()} != kinds:
            raise ValueError(f"each of {what} must hold {', '.join(kinds)}")
        if entry["version"] < 1:
            raise ValueError("a version is at least 1")
    return found


def _is_sound(tried: Any) -> bool:
    return _is_count(tried["failed"]) and _is_count(tried["cut_short"]) and isfinite(tried["at"])


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
