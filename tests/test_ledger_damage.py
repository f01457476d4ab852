"""Damage, forgery, rollback, crashes and rivals: noticed, and never counted too low."""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reticent.core.errors import LedgerError
from reticent.privacy.events import PoissonGaussian
from reticent.privacy.ledger import Budget, Charge, Head, Ledger

EVENT = PoissonGaussian(0.2, 1.2, 1)
FREE = Budget(math.inf, 1e-5)


def filled(folder: Path, rounds: int = 5) -> Head:
    with Ledger.open(folder) as ledger:
        for number in range(rounds):
            ledger.charge_many(["a", "b", "c"], "run", number, EVENT, FREE)
            ledger.store_release("a", "run", number, b"payload %d" % number * 20)
        return ledger.head()


def state(folder: Path) -> object:
    with Ledger.open(folder) as ledger:
        payload = ledger.stored_release("a", "run", 4)
        return ledger.verify(), ledger.summary(1e-5), payload


def forge(folder: Path, statement: str) -> None:
    db = sqlite3.connect(folder / "ledger.db")
    db.execute(statement)
    db.commit()
    db.close()


def test_flipped_bytes_are_noticed_or_change_nothing(tmp_path: Path) -> None:
    good = tmp_path / "good"
    filled(good)
    content = (good / "ledger.db").read_bytes()
    expected, generator, noticed = state(good), random.Random(5), 0
    used = [i for i, byte in enumerate(content) if byte]
    for trial in range(40):
        bad = tmp_path / str(trial)
        shutil.copytree(good, bad)
        damaged = bytearray(content)
        damaged[generator.choice(used)] ^= 1 << generator.randrange(8)
        (bad / "ledger.db").write_bytes(damaged)
        try:
            assert state(bad) == expected
        except LedgerError:
            noticed += 1
    assert noticed > 25


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.6])
def test_truncation_is_noticed(tmp_path: Path, share: float) -> None:
    filled(tmp_path)
    path = tmp_path / "ledger.db"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(LedgerError, match=str(tmp_path)):
        Ledger.open(tmp_path)


def test_garbage_is_noticed(tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / "ledger.db").write_bytes(random.Random(0).randbytes(5000))
    with pytest.raises(LedgerError, match="damaged"):
        Ledger.open(tmp_path)


@pytest.mark.parametrize(
    ("statement", "match"),
    [
        ("UPDATE entries SET device = 'z' WHERE sequence = 6", "entry 6 is missing or was altered"),
        ("UPDATE entries SET round = 99 WHERE sequence = 1", "entry 1 "),
        ("UPDATE entries SET body = replace(body, '1.2', '9.9') WHERE sequence = 9", "entry 9 "),
        ("UPDATE entries SET mac = zeroblob(32) WHERE sequence = 4", "entry 4 "),
        ("DELETE FROM entries WHERE sequence = 10", "entry 10 "),
        ("DELETE FROM entries WHERE sequence > 17", "tip knows of entry 20.*holds 17"),
        ("UPDATE totals SET charges = 1 WHERE device = 'b'", "totals"),
        ("DELETE FROM totals WHERE device = 'c'", "totals"),
        ("UPDATE payloads SET payload = x'00'", "stored release"),
        ("DELETE FROM payloads", "stored release"),
        ("PRAGMA user_version = 3", "schema version 3: must be at most 2"),
        ("PRAGMA application_id = 5", "is not a ledger"),
        ("DROP TABLE totals", "tables were altered"),
    ],
)
def test_forgeries_are_named(tmp_path: Path, statement: str, match: str) -> None:
    filled(tmp_path)
    forge(tmp_path, statement)
    with pytest.raises(LedgerError, match=match):
        Ledger.open(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    for name in ("ledger.key", "ledger.db", "ledger.tip"):
        folder = tmp_path / name
        filled(folder)
        (folder / name).unlink()
        with pytest.raises(LedgerError, match=f"{name}.*(is missing|is gone)"):
            Ledger.open(folder)


def test_another_key_or_a_short_one_is_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / "ledger.key").write_bytes(bytes(32))
    with pytest.raises(LedgerError, match="entry 1 "):
        Ledger.open(tmp_path)
    (tmp_path / "ledger.key").write_bytes(bytes(31))
    with pytest.raises(LedgerError, match="holds 31 bytes"):
        Ledger.open(tmp_path)


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="cannot be used"):
        Ledger.open(tmp_path / "file" / "ledger")


def test_full_disk_refuses_the_charge(tmp_path: Path) -> None:
    with Ledger.open(tmp_path) as ledger:
        pages = ledger._store.db.execute("PRAGMA page_count").fetchone()[0]
        ledger._store.db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(LedgerError, match="full"):
            ledger.charge_many([f"{i:03}" * 80 for i in range(400)], "run", 0, EVENT, FREE)
        assert ledger.verify() == Head(0, "00" * 32)


def test_rollback_is_found_by_an_anchor(tmp_path: Path) -> None:
    old = filled(tmp_path / "now", rounds=5)
    shutil.copytree(tmp_path / "now", tmp_path / "copy")
    with Ledger.open(tmp_path / "now") as ledger:
        ledger.charge("a", "run", 5, EVENT, FREE)
        new = ledger.head()
        assert ledger.contains(old)
        assert ledger.contains(new)
        assert ledger.contains(Head(0, "00" * 32))
        assert not ledger.contains(Head(old.sequence, new.mac))
        assert not ledger.contains(Head(0, new.mac))
    with Ledger.open(tmp_path / "copy") as copy:  # consistent in itself, and yet out of date
        assert copy.contains(old)
        assert not copy.contains(new)
        copy.charge("b", "run", 5, EVENT, FREE)
        assert copy.head().sequence == new.sequence
        assert not copy.contains(new)


step = st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.booleans(), st.binary(max_size=3))


@settings(max_examples=20, deadline=None)
@given(st.lists(step, max_size=12))
def test_any_history_keeps_its_chain_and_its_count(
    steps: list[tuple[str, int, bool, bytes]],
) -> None:
    with tempfile.TemporaryDirectory() as name, Ledger.open(Path(name)) as ledger:
        charged: set[tuple[str, int]] = set()
        released: dict[tuple[str, int], bytes] = {}
        heads = [ledger.head()]
        for device, number, release, payload in steps:
            charge = ledger.charge(device, "run", number, EVENT, FREE)
            assert charge.repeated == ((device, number) in charged)
            charged.add((device, number))
            if release and released.setdefault((device, number), payload) == payload:
                ledger.store_release(device, "run", number, payload)
            heads.append(ledger.head())
        assert ledger.verify() == heads[-1]
        assert all(ledger.contains(head) for head in heads)
        assert heads[-1].sequence == len(charged) + len(released)
        for device in "abc":
            count = sum(name == device for name, _ in charged)
            assert sum(e.steps for e in ledger.events(device)) == count


CHILD = """
import math, sys
from pathlib import Path
from reticent.privacy.events import PoissonGaussian
from reticent.privacy.ledger import Budget, Ledger

folder, run, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
with Ledger.open(folder) as ledger:
    print("open", flush=True)
    for number in range(count):
        charge = ledger.charge("a", run, number, PoissonGaussian(0.2, 1.2, 1), Budget(math.inf, .1))
        if "release" in sys.argv and ledger.stored_release("a", run, number) is None:
            ledger.store_release("a", run, number, bytes([number % 256]) * 9)
        print("sent", number, charge.repeated, flush=True)
"""


def child(folder: Path, run: str, count: int, then: str = "release") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(folder), run, str(count), then]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_a_kill_never_counts_too_little(tmp_path: Path) -> None:
    generator = random.Random(11)
    for trial in range(8):
        victim = child(tmp_path, f"run-{trial}", 100_000)
        assert victim.stdout is not None
        lines = [victim.stdout.readline() for _ in range(generator.randrange(2, 60))]
        victim.send_signal(signal.SIGKILL)
        lines += victim.stdout.readlines()  # what it had sent before the signal arrived
        victim.wait()
        victim.stdout.close()
        # A line cut off by the signal counts: someone may have seen it.
        sent = sum(line.startswith("sent") for line in lines)
        with Ledger.open(tmp_path) as ledger:
            rows = ledger._store.db.execute(
                "SELECT kind, count(*) FROM entries WHERE run = ? GROUP BY kind", (f"run-{trial}",)
            )
            counts = dict(rows.fetchall())
            assert sent > 0
            assert counts["charge"] >= counts["release"] >= sent
            # What it had begun continues under the same charge.
            last = counts["charge"] - 1
            assert ledger.charge("a", f"run-{trial}", last, EVENT, FREE).repeated


def test_two_processes_share_a_ledger(tmp_path: Path) -> None:
    pair = [child(tmp_path / "ledger", run, 100) for run in ("one", "two")]
    outputs = [process.communicate(timeout=60)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    assert all(output.count("sent") == 100 for output in outputs)
    with Ledger.open(tmp_path / "ledger") as ledger:
        assert ledger.verify().sequence == 400
        assert ledger.events("a") == [PoissonGaussian(0.2, 1.2, 200)]


def test_two_processes_charge_one_round_once(tmp_path: Path) -> None:
    pair = [child(tmp_path / "ledger", "same", 100, "stop") for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    assert sum(output.count("False") for output in outputs) == 100
    with Ledger.open(tmp_path / "ledger") as ledger:
        assert ledger.events("a") == [PoissonGaussian(0.2, 1.2, 100)]
        charge = ledger.charge("a", "same", 7, EVENT, FREE)
        assert isinstance(charge, Charge)
        assert charge.repeated
