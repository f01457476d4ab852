"""Flower's programs on a device are forks of one process, and end with it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from test_device_agent import alive, bundle, device, home, until

from reticent.client import asking, nursery
from reticent.client.agent import environment, supernode
from reticent.client.asking import SOCKET, YES, is_granted
from reticent.client.folder import Device, accept_policy
from reticent.client.launcher import PROGRAM, write_launcher
from reticent.core.errors import PolicyError
from reticent.privacy.ledger import Ledger

__all__ = ["bundle", "device", "home"]

BUDGET = "[budget]\nepsilon = 9.0\ndelta = 1e-5\n"


def named(base: int) -> dict[str, int]:
    """Return the children of a process by the names that they have in ``ps``."""
    found: dict[str, int] = {}
    for children in Path(f"/proc/{base}/task").glob("*/children"):
        for pid in children.read_text().split():
            with suppress(OSError):  # it has ended since
                found[Path(f"/proc/{pid}/comm").read_text().strip()] = int(pid)
    return found


@pytest.fixture
def base(device: Device) -> Iterator[subprocess.Popen[bytes]]:
    """What the agent starts, with a server that is not there."""
    accept_policy(device, BUDGET, "test")
    write_launcher(device.programs)
    process = subprocess.Popen(supernode(device, 1), env=dict(environment(device)))
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("ended", ["executor", "base", "base at once", "supernode"])
def test_supernode_and_superexec_are_forks_of_one_process_and_none_lives_on_alone(
    base: subprocess.Popen[bytes], ended: str
) -> None:
    until(lambda: {"flower-superexe", "flower-supernod"} <= set(named(base.pid)), 60)
    family = named(base.pid)
    words = {Path(f"/proc/{pid}/cmdline").read_bytes() for pid in (base.pid, *family.values())}
    assert len(words) == 1
    if ended == "executor":
        os.kill(family["flower-superexe"], signal.SIGKILL)
    elif ended == "supernode":
        os.kill(family["flower-supernod"], signal.SIGKILL)
    else:
        base.send_signal(signal.SIGKILL if ended == "base at once" else signal.SIGTERM)
    base.wait(60)
    until(lambda: not any(alive(pid) for pid in family.values()), 60)
    assert base.returncode == {"base at once": -9, "supernode": 247}.get(ended, 0)


FORKS = """
import sys
from pathlib import Path
from reticent.client.nursery import Nursery
from reticent.privacy.randomness import SystemRandomness

folder = Path(sys.argv[1])
words = Nursery(folder).children(["first"])
if words == ["first"]:
    import time
    time.sleep(600)
drawn = SystemRandomness().stream("noise").bytes(16).hex()
part = folder / words[1]
part.write_text(drawn)
part.rename(folder / (words[1] + ".drawn"))
"""


def test_no_two_forks_draw_the_same_noise(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 50)  # longer than a socket's name may be
    folder.mkdir()
    process = subprocess.Popen([sys.executable, "-c", FORKS, str(folder)], umask=0o077)
    try:
        until((folder / SOCKET).exists, 60)
        for number in range(3):
            assert is_granted(str(folder), [PROGRAM, str(number)])
        until(lambda: len(list(folder.glob("*.drawn"))) == 3, 60)
        assert len({path.read_text() for path in folder.glob("*.drawn")}) == 3
        assert (folder / SOCKET).stat().st_mode & 0o077 == 0  # nobody else's
        assert not is_granted(str(folder), ["rm", "everything"])
    finally:
        process.kill()
        process.wait()


def test_for_one_who_asked_and_gave_up_nothing_is_forked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is Flower's own program by then, and a second one would end the task for both."""
    process = subprocess.Popen([sys.executable, "-c", FORKS, str(tmp_path)])
    try:
        until((tmp_path / SOCKET).exists, 60)
        process.send_signal(signal.SIGSTOP)  # busy
        with monkeypatch.context() as short:
            short.setattr(asking, "_PATIENCE", 0.2)
            assert not is_granted(str(tmp_path), [PROGRAM, "early"])
        process.send_signal(signal.SIGCONT)
        assert is_granted(str(tmp_path), [PROGRAM, "late"])
        until((tmp_path / "late.drawn").exists, 60)
        assert [path.name for path in tmp_path.glob("*.drawn")] == ["late.drawn"]
    finally:
        process.kill()
        process.wait()


def test_who_took_an_offer_waits_for_what_comes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "_PATIENCE", 0.1)
    answers: list[bool] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / SOCKET))
        listener.listen()
        for answer in (YES, b""):
            asker = Thread(target=lambda: answers.append(is_granted(str(tmp_path), [PROGRAM])))
            asker.start()
            connection, _ = listener.accept()
            with connection:
                assert nursery.asked(connection) == [PROGRAM]
                assert nursery.is_taken(connection)
                asker.join(0.5)
                assert asker.is_alive()
                connection.sendall(answer)
            asker.join(20)
    assert answers == [True, False]


def test_a_fork_that_fails_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its signals above all: a nursery that hears none neither collects children nor ends."""

    def full() -> int:
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", full)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    base = nursery.Nursery(tmp_path)
    try:
        with pytest.raises(BlockingIOError):
            base._fork()
        assert not base._ticks()
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for channel in (base._listener, *base._signals):
            channel.close()


def test_where_nobody_listens_nothing_is_granted(tmp_path: Path) -> None:
    assert not is_granted(str(tmp_path), [PROGRAM])
    with socket.socket(socket.AF_UNIX) as left:  # of a process that was killed
        left.bind(str(tmp_path / SOCKET))
    assert not is_granted(str(tmp_path), [PROGRAM])


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (b'["flwr-clientapp", "--token", "x"]\n', ["flwr-clientapp", "--token", "x"]),
        (b'["flower-superexec"]\n', ["flower-superexec"]),
        (b'["flower-supernode"]\n', []),
        (b'["reticent-tick"]\n', []),
        (b'["flwr-clientapp", 1]\n', []),
        (b'{"flwr-clientapp": 1}\n', []),
        (b"[]\n", []),
        (b"[" * 50000 + b"\n", []),
        (b"\xff\n", []),
        (b'["flwr-clientapp"', []),
    ],
)
def test_only_two_programs_can_be_asked_for(sent: bytes, words: list[str]) -> None:
    here, there = socket.socketpair()
    with here, there:
        there.sendall(sent)
        there.shutdown(socket.SHUT_WR)
        assert nursery.asked(here) == words


def test_a_tick_makes_passed_time_count_where_the_budget_has_a_window(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks: list[int] = []
    monkeypatch.setattr(Ledger, "tick", lambda self: ticks.append(1))
    with pytest.raises(PolicyError):
        nursery.tick(device)
    accept_policy(device, f"{BUDGET}window_days = 1.0\n", "test")
    nursery.tick(device)
    assert not (device.state / "ledger.db").exists()
    Ledger.open(device.state).close()
    nursery.tick(device)
    assert len(ticks) == 1
    accept_policy(device, BUDGET, "test")
    nursery.tick(device)
    assert len(ticks) == 1


def test_the_base_ticks_as_soon_as_it_runs(device: Device) -> None:
    accept_policy(device, f"{BUDGET}window_days = 1.0\n", "test")
    Ledger.open(device.state).close()
    before = (device.state / "ledger.db").read_bytes()
    write_launcher(device.programs)
    words = [*supernode(device, 1)[:5], "flower-supernode", "--help"]
    subprocess.run(words, env=dict(environment(device)), check=True, stdout=subprocess.DEVNULL)
    until(lambda: (device.state / "ledger.db").read_bytes() != before, 60)


@pytest.mark.parametrize(("end", "status"), [("3", 3), ("None", 0), ("'why'", 1)])
def test_a_message_ends_with_the_status_and_the_output_of_its_program(
    end: str, status: int
) -> None:
    script = (
        "import sys\nfrom reticent.client import nursery\n"
        f"def run(words):\n    print(words)\n    sys.exit({end})\n"
        "nursery.run = run\nnursery.leave(['program'])\n"
    )
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stdout) == (status, "['program']\n")


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [("sys.exit(None)", 0, ""), ("sys.exit('why')", 1, "why"), ("raise OSError('why')", 1, "why")],
)
def test_a_supernode_whose_loop_ended_ends_although_a_thread_of_it_goes_on(
    end: str, status: int, said: str
) -> None:
    """As Flower's does, whose HTTP server is a thread, when its connection failed for good."""
    script = (
        "import sys, threading, time\nfrom reticent.client import nursery\n"
        "def run(words):\n    threading.Thread(target=time.sleep, args=(600,)).start()\n"
        f"    {end}\n"
        "nursery.run = run\nnursery.leave(['flower-supernode'])\n"
    )
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, timeout=120, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == status and said in done.stderr


@pytest.mark.parametrize(("warm", "short"), [(True, False), (True, True), (False, False)])
def test_torch_is_loaded_beforehand_only_if_the_owner_says_so_and_there_is_room(
    device: Device, warm: bool, short: bool
) -> None:
    accept_policy(device, f"{BUDGET}[resources]\nwarm = {json.dumps(warm)}\n", "test")
    script = (
        "import sys\nfrom pathlib import Path\nfrom reticent.client import nursery\n"
        "from reticent.client.folder import open_device\n"
        f"nursery.Memory.free = lambda self: {2**20 if short else 2**40}\n"
        "nursery.prepare(open_device(Path(sys.argv[1])))\n"
        "print('torch' in sys.modules, nursery.threads())\n"
    )
    words = [sys.executable, "-c", script, str(device.folder)]
    done: Any = subprocess.run(
        words, capture_output=True, text=True, check=True, env=dict(environment(device))
    )
    assert done.stdout.splitlines()[-1] == f"{warm and not short} 1"
