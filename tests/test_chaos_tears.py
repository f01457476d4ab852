"""Torn, cut, flipped, zeroed, lost and older files: refused, or without any effect at all.

``pytest -m chaos -s`` tears 500 times and prints what was found.
"""

from __future__ import annotations

import math
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from reticent.core.errors import LedgerError
from reticent.privacy.events import PoissonGaussian
from reticent.privacy.ledger import Budget, Head, Ledger

EVENT = PoissonGaussian(0.2, 1.2, 1)
FREE = Budget(math.inf, 1e-5)
DATABASE = ("ledger.db", "ledger.db-wal", "ledger.db-shm")
FILES = (*DATABASE, "ledger.key", "ledger.tip")
PAGE = 4096

# Leaves copies of itself while it runs, the last of them as a kill leaves it: with its log.
DEVICE = """
import math, os, shutil, signal, sys
from pathlib import Path
from reticent.privacy.events import PoissonGaussian
from reticent.privacy.ledger import Budget, Ledger

folder = Path(sys.argv[1])
budget = Budget(math.inf, 1e-5, window=60.0)
for rounds, name in [(range(9), "old"), (range(9, 40), "older log"), (range(40, 70), "now")]:
    ledger = Ledger.open(folder / "ledger")
    for number in rounds:
        ledger.charge("device", "run", number, PoissonGaussian(0.2, 1.2, 1), budget)
        ledger.store_release("device", "run", number, bytes([number]) * 3000)
    shutil.copytree(folder / "ledger", folder / name)
    if name == "old":
        ledger.close()
os.kill(os.getpid(), signal.SIGKILL)
"""


@dataclass(frozen=True)
class Device:
    """A ledger that was killed, older copies of it, and what is true of it."""

    folder: Path
    head: Head

    def copy(self, to: Path) -> Path:
        return Path(shutil.copytree(self.folder / "now", to))


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Device:
    folder = tmp_path_factory.mktemp("device")
    victim = subprocess.run([sys.executable, "-c", DEVICE, str(folder)])
    assert victim.returncode == -signal.SIGKILL
    whole = shutil.copytree(folder / "now", folder / "whole")
    assert (whole / "ledger.db-wal").stat().st_size > 20 * PAGE
    with Ledger.open(whole) as ledger:
        return Device(folder, ledger.verify())


def tear(folder: Path, device: Device, generator: random.Random) -> str:
    """Damage one file in a seeded way and say how."""
    name = generator.choice(FILES)
    path = folder / name
    content = bytearray(path.read_bytes())
    kind = generator.choice(["cut", "flip", "zero", "old", "lose", "grow"])
    if kind == "cut":
        path.write_bytes(content[: generator.randrange(len(content))])
    elif kind == "flip":
        for _ in range(generator.choice([1, 1, 8])):
            content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
    elif kind == "zero":
        start = generator.randrange(len(content)) // PAGE * PAGE
        content[start : start + PAGE] = bytes(len(content[start : start + PAGE]))
        path.write_bytes(content)
    elif kind == "old":
        put_back(folder, device, name, generator.choice(["old", "older log"]))
    elif kind == "lose":
        path.unlink()
    else:
        path.write_bytes(content + generator.randbytes(generator.randrange(1, 9000)))
    return f"{name}: {kind}"


def put_back(folder: Path, device: Device, name: str, when: str) -> None:
    # A log belongs to its database: they grow old together.
    for part in DATABASE if name in DATABASE else (name,):
        (folder / part).unlink(missing_ok=True)
        if (device.folder / when / part).exists():
            shutil.copy(device.folder / when / part, folder / part)


def outcome(folder: Path, device: Device) -> str:
    """Return "refused" or "harmless"; anything in between fails."""
    try:
        ledger = Ledger.open(folder)
    except LedgerError as error:
        assert str(folder) in str(error)
        with pytest.raises(LedgerError):  # and it is not mended by asking again
            Ledger.open(folder)
        return "refused"
    with ledger:
        assert ledger.head() == device.head
        assert ledger.events("device") == [PoissonGaussian(0.2, 1.2, 70)]
        assert ledger.stored_release("device", "run", 69) == bytes([69]) * 3000
        assert ledger.charge("device", "run", 69, EVENT, FREE).repeated
        ledger.charge("device", "run", 70, EVENT, FREE)
    with Ledger.open(folder) as again:
        assert again.verify().sequence == device.head.sequence + 1
    return "harmless"


def tears(device: Device, folder: Path, trials: int) -> Counter[tuple[str, str]]:
    generator, found = random.Random(50), Counter[tuple[str, str]]()
    for trial in range(trials):
        torn = device.copy(folder / str(trial))
        what = tear(torn, device, generator)
        found[what, outcome(torn, device)] += 1
        shutil.rmtree(torn)
    total = Counter[str]()
    for (_, how), count in found.items():
        total[how] += count
    print(f"\n{trials} tears: {dict(total)}, 0 silent losses")
    for (what, how), count in sorted(found.items()):
        print(f"  {what:22} {how:9} {count}")
    return found


def test_fifty_tears_are_refused_or_harmless(device: Device, tmp_path: Path) -> None:
    found = tears(device, tmp_path, 50)
    assert sum(n for (_, how), n in found.items() if how == "refused") >= 15


@pytest.mark.chaos
def test_five_hundred_tears_are_refused_or_harmless(device: Device, tmp_path: Path) -> None:
    found = tears(device, tmp_path, 500)
    assert sum(n for (_, how), n in found.items() if how == "refused") >= 150


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_log_that_lost_its_end_is_refused(device: Device, tmp_path: Path, share: float) -> None:
    torn = device.copy(tmp_path / "torn")
    content = (torn / "ledger.db-wal").read_bytes()
    (torn / "ledger.db-wal").write_bytes(content[: int(share * len(content))])
    with pytest.raises(LedgerError, match=r"ledger\.tip knows of entry 140.*charges are lost"):
        Ledger.open(torn)


def test_without_the_tip_a_log_that_lost_its_end_would_pass(device: Device, tmp_path: Path) -> None:
    """What the tip is for: SQLite itself sees nothing wrong with the torn log."""
    torn = device.copy(tmp_path / "torn")
    content = (torn / "ledger.db-wal").read_bytes()
    (torn / "ledger.db-wal").write_bytes(content[: len(content) // 2])
    shutil.copy(device.folder / "old" / "ledger.tip", torn / "ledger.tip")
    with Ledger.open(torn) as ledger:
        assert ledger.verify().sequence < device.head.sequence
        assert not ledger.contains(device.head)  # only a head kept elsewhere shows it


@pytest.mark.parametrize("when", ["old", "older log"])
def test_a_database_put_back_alone_is_refused(device: Device, tmp_path: Path, when: str) -> None:
    torn = device.copy(tmp_path / "torn")
    put_back(torn, device, "ledger.db", when)
    with pytest.raises(LedgerError, match=r"ledger\.tip knows of entry 140"):
        Ledger.open(torn)


@pytest.mark.parametrize("when", ["old", "older log"])
def test_a_tip_put_back_alone_loses_nothing(device: Device, tmp_path: Path, when: str) -> None:
    torn = device.copy(tmp_path / "torn")
    put_back(torn, device, "ledger.tip", when)
    assert outcome(torn, device) == "harmless"


@pytest.mark.parametrize("slot", [0, 1])
def test_a_torn_record_of_the_tip_leaves_the_other(
    device: Device, tmp_path: Path, slot: int
) -> None:
    torn = device.copy(tmp_path / "torn")
    tip = bytearray((torn / "ledger.tip").read_bytes())
    tip[slot * 512 + 30 : slot * 512 + 60] = bytes(30)
    (torn / "ledger.tip").write_bytes(tip)
    assert outcome(torn, device) == "harmless"
    with Ledger.open(torn) as ledger:  # and the next entry has written both anew
        ledger.charge("device", "run", 71, EVENT, FREE)
    assert b'"sequence": 142' in (torn / "ledger.tip").read_bytes()
    assert b'"sequence": 141' in (torn / "ledger.tip").read_bytes()


def test_a_tip_without_a_whole_record_is_refused(device: Device, tmp_path: Path) -> None:
    torn = device.copy(tmp_path / "torn")
    (torn / "ledger.tip").write_bytes(bytes(1024))
    with pytest.raises(LedgerError, match=r"ledger\.tip: is damaged"):
        Ledger.open(torn)
    (torn / "ledger.tip").unlink()
    with pytest.raises(LedgerError, match=r"ledger\.tip: is missing"):
        Ledger.open(torn)
