"""Kills at every step of an installation: the old model or the new one, whole, and never less.

A kill loses nothing that was written, so this shows the order of changes, and not that every one
was synchronised; that is for reading :mod:`reticent.client.models`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deliveries import (
    PIECE,
    PLAN,
    Fleet,
    bring,
    make_artifact,
    make_fleet,
    offered,
    parts,
    receipt,
)

from reticent.client.delivery import Part
from reticent.client.models import MOST_TRIES, Slot
from reticent.core.errors import ArtifactError
from reticent.core.offer import Receipt

CALLS = ("open", "pwrite", "write", "fsync", "ftruncate", "mkdir", "rename", "replace")
CALLS += ("unlink", "rmdir", "close", "scandir")


def watched(at: int) -> None:
    """Let this process be killed, without warning, before or after one of its file-system calls."""
    left = [at]

    def step() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            step()
            result = call(*args, **kwargs)
            step()
            return result

        return called

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


def life(fleet: Fleet, signed: bytes, data: bytes, files: dict[str, bytes], at: int) -> int:
    """Take a model in a process that is killed at a step; return how that ended."""
    said = fleet.device.folder / "said"
    said.write_text("0")

    def trial(folder: Path, *_: Any) -> str:
        """No torch, so that a fork is safe; what is tried must be there whole."""
        return "" if {p.name: p.read_bytes() for p in folder.iterdir()} == files else "not whole"

    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        recipient = fleet.recipient(trial=trial)
        out = os.open(said, os.O_WRONLY)
        watched(at)
        begin = receipt(recipient, Part(signed))
        for part in parts(signed, data, begin.offset):
            told = receipt(recipient, part)
            if told.version == 1:
                os.pwrite(out, f"{told.offset:8}".encode(), 0)  # what the server was told
        os._exit(0)
    except BaseException:
        os._exit(1)


class Case:
    """A device with model 1 that is offered model 2."""

    def __init__(self, folder: Path) -> None:
        self.fleet = make_fleet(folder)
        self.contents = {
            version: make_artifact(self.fleet, folder / str(version), seed=version)
            for version in (1, 2)
        }
        _, signed, data = offered(self.fleet, self.contents[1])
        bring(self.fleet.recipient(), signed, data)
        self.offer, self.signed, self.data = offered(self.fleet, self.contents[2], 2)
        shutil.copytree(self.fleet.device.models, folder / "before")
        self.before = folder / "before"

    def begin_anew(self) -> None:
        shutil.rmtree(self.fleet.device.models)
        shutil.copytree(self.before, self.fleet.device.models)

    def live(self, at: int) -> int:
        return life(self.fleet, self.signed, self.data, self.contents[2], at)

    def check(self) -> str:
        """Check what a dead device left behind, and say where it died."""
        models, known = self.fleet.models, self.contents
        state = models.state()
        assert state.highest == state.version in (1, 2)
        versions = [slot.version for slot in state.slots]
        assert versions == ([1] if state.version == 1 else [2, 1])
        for slot in state.slots:
            path = models.path(slot.version)
            assert {p.name: p.read_bytes() for p in path.iterdir()} == known[slot.version]
        if state.version == 2:
            return "installed"
        held = models.incoming.offset(self.offer)
        told = int((self.fleet.device.folder / "said").read_text())
        assert held >= told  # what the server was told is there
        if held:
            assert models.incoming.read(self.offer)[:told] == self.data[:told]
        return "arrived" if held == len(self.data) else "arriving"

    def goes_on(self) -> None:
        """A device that starts again gets what is left, and has the new model."""
        assert self.live(0) == 0
        assert self.check() == "installed"
        folder = {p.name for p in self.fleet.device.models.iterdir()}
        assert folder == {".lock", "incoming", "state.json", "1", "2"}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("kills"))


def kills(case: Case, stride: int) -> Counter[str]:
    found = Counter[str]()
    for at in range(1, 5000, stride):
        case.begin_anew()
        status = case.live(at)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        found[case.check()] += 1
        case.goes_on()
    else:
        pytest.fail("an installation has more steps than were tried")
    print(f"\n{sum(found.values())} kills, every {stride} steps: {dict(found)}")
    return found


def test_a_kill_leaves_the_old_model_or_the_new_one(case: Case) -> None:
    found = kills(case, 11)
    assert set(found) == {"arriving", "arrived", "installed"}


@pytest.mark.chaos
def test_a_kill_at_each_single_step_leaves_the_old_model_or_the_new_one(case: Case) -> None:
    found = kills(case, 1)
    assert set(found) == {"arriving", "arrived", "installed"} and sum(found.values()) > 150


def test_kills_one_after_another_do_not_keep_a_model_away(case: Case) -> None:
    """A device that is killed again and again, at seeded points, still gets on.

    As long as fewer self-tests were begun than make it give up the version.
    """
    generator, found = random.Random(2026), Counter[str]()
    case.begin_anew()
    while found.total() < 12 and case.fleet.models.state().tests_of(2).failed < MOST_TRIES - 1:
        if case.live(generator.randrange(1, 40)) == 0:
            break
        found[case.check()] += 1
    assert found.total() >= 4
    print(f"\nin a row: {dict(found)}")
    case.goes_on()


def test_the_check_finds_a_model_that_is_not_whole(case: Case) -> None:
    """The control: half a model under a state that names it is found."""
    case.begin_anew()
    slot = Slot(2, PLAN.digest, case.offer.sha256)
    text = json.dumps({"slots": [vars(slot)], "highest": 2, "tried": []})
    (case.fleet.device.models / "state.json").write_text(text)
    with pytest.raises((AssertionError, OSError, ArtifactError)):
        case.check()
    case.begin_anew()
    assert receipt(case.fleet.recipient(), parts(case.signed, case.data)[0]) == Receipt(1, PIECE)
