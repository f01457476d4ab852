"""The device's folder, the agent that keeps its SuperNode running, and their commands."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.supercore.constant import TASK_TYPE_TO_COMMAND

from reticent.cli import main as command
from reticent.client.agent import MOST_LOG_BYTES, Agent, append, environment, supernode
from reticent.client.backoff import Backoff
from reticent.client.folder import (
    Device,
    accept_policy,
    create_device,
    held,
    is_held,
    open_device,
    renew_device,
)
from reticent.client.launcher import PROGRAM, REFUSED, write_launcher
from reticent.client.unit import device_unit
from reticent.core.bundle import Bundle, read_bundle, write_bundle
from reticent.core.errors import PolicyError, ProvisionError, RunError, StorageError
from reticent.server.certificates import utc_now
from reticent.server.enrolment import POLICY, enroll, renew
from reticent.server.home import Home, create_home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return create_home(tmp_path / "server", ["127.0.0.1"], 8000, utc_now())


@pytest.fixture
def bundle(home: Home) -> Bundle:
    return read_bundle(enroll(home, ["pi-1"], POLICY, utc_now())[0])


@pytest.fixture
def device(tmp_path: Path, bundle: Bundle) -> Device:
    return create_device(tmp_path / "pi-1", bundle)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["reticent", "device", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_folder_is_its_owners_alone_and_holds_no_accepted_policy(device: Device) -> None:
    assert mode(device.folder) == mode(device.state) == 0o700
    assert mode(device.node_key) == 0o600
    assert device.proposal.read_text() == POLICY
    assert open_device(device.folder) == device
    with pytest.raises(PolicyError, match="accepted no policy"):
        device.owners_policy()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"policy": "[budget]\nepsilon = 99.0\ndelta = 1e-5\n"}, "not signed"),
        ({"policy_signature": "00" * 64}, "not signed"),
        ({"plan_key": "nothing"}, "no usable keys"),
        ({"node_key": "nothing"}, "no usable node key"),
        ({"expires": "2020-01-01T00:00:00+00:00"}, "expired on 2020-01-01"),
    ],
)
def test_a_bundle_that_is_not_sound_makes_no_folder(
    tmp_path: Path, bundle: Bundle, changes: dict[str, Any], said: str
) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ProvisionError, match=said):
        create_device(tmp_path / "device", replace(bundle, **changes))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("key", ["created", "expires"])
@pytest.mark.parametrize("time", ["soon", "2027-01-01", "2027-01-01T00:00:00"])
def test_a_time_that_is_none_or_has_no_zone_is_named(
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    key: str,
    time: str,
) -> None:
    path = device.folder / "device.toml"
    path.write_text(re.sub(rf'{key} = ".*"', f'{key} = "{time}"', path.read_text()))
    assert call(monkeypatch, "status", "--dir", device.folder) == 11
    said = capsys.readouterr().err
    assert f"{path}: {key}='{time}': must be an ISO 8601 time with its zone" in said


@pytest.mark.parametrize("words", [("status",), ("run",)])
def test_a_device_whose_ledgers_folder_is_gone_gets_no_new_one(
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
) -> None:
    accept_policy(device, POLICY, "here")
    shutil.rmtree(device.state)
    assert call(monkeypatch, *words, "--dir", device.folder) == 5
    assert f"error: {device.state}: is gone" in capsys.readouterr().err
    assert not device.state.exists()


def test_a_folder_is_never_overwritten(device: Device, bundle: Bundle) -> None:
    with pytest.raises(ProvisionError, match="not empty"):
        create_device(device.folder, bundle)


def test_a_renewal_changes_the_key_and_keeps_ledger_and_policy(home: Home, device: Device) -> None:
    device.policy.write_text("mine")
    (device.state / "ledger.db").write_text("kept")
    before = device.node_key.read_text()
    renewed = renew_device(device, read_bundle(renew(home, "pi-1", POLICY, utc_now())))
    assert renewed.checksum != device.checksum
    assert device.node_key.read_text() != before
    assert mode(device.node_key) == 0o600
    assert device.policy.read_text() == "mine"
    assert (device.state / "ledger.db").read_text() == "kept"


def test_a_renewal_by_another_devices_bundle_is_refused(home: Home, device: Device) -> None:
    before = {p: p.read_bytes() for p in device.folder.iterdir() if p.is_file()}
    other = read_bundle(enroll(home, ["pi-2"], POLICY, utc_now())[0])
    with pytest.raises(ProvisionError, match="the bundle is of pi-2"):
        renew_device(device, other)
    assert {p: p.read_bytes() for p in device.folder.iterdir() if p.is_file()} == before


def test_a_renewal_by_another_servers_bundle_is_refused(tmp_path: Path, device: Device) -> None:
    before = {p: p.read_bytes() for p in device.folder.iterdir() if p.is_file()}
    stranger = create_home(tmp_path / "stranger", ["127.0.0.1"], 8000, utc_now())
    other = read_bundle(enroll(stranger, ["pi-1"], POLICY, utc_now())[0])
    with pytest.raises(ProvisionError, match="the bundle is of another server"):
        renew_device(device, other)
    assert {p: p.read_bytes() for p in device.folder.iterdir() if p.is_file()} == before


def test_a_renewal_waits_until_no_agent_is_connected_by_the_old_key(
    home: Home,
    device: Device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each round under the new key would be charged, and refused by the server."""
    bundle, before = renew(home, "pi-1", POLICY, utc_now()), device.node_key.read_bytes()
    with held(device):
        assert call(monkeypatch, "renew", bundle, "--dir", device.folder) == 8
    said = capsys.readouterr().err
    assert "an agent runs for this folder already: stop it, renew, and start it again" in said
    assert device.node_key.read_bytes() == before
    assert open_device(device.folder) == device
    assert not (device.folder / ".renewal").exists()
    assert call(monkeypatch, "renew", bundle, "--dir", device.folder) == 0
    assert device.node_key.read_bytes() != before


def test_who_looks_at_a_device_does_not_keep_its_agent_from_starting(device: Device) -> None:
    """Systemd does not try again what ends with status 8."""
    (device.folder / "agent.lock").touch()
    looking = (device.folder / "agent.lock").open("rb")
    fcntl.flock(looking, fcntl.LOCK_SH)  # as one who looks has it, but for longer
    timer = threading.Timer(0.1, looking.close)
    timer.start()
    assert not is_held(device)  # nor do two who look take each other for an agent
    with held(device):
        assert is_held(device)
        with pytest.raises(RunError, match="runs for this folder already"), held(device):
            pytest.fail("there were two")
    timer.join()
    assert not is_held(device)


def test_looking_at_a_device_writes_nothing(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failing card turns read-only, and its owner wants to know how the device is."""
    before = sorted(device.folder.rglob("*"))
    assert call(monkeypatch, "status", "--dir", device.folder) == 0
    assert sorted(device.folder.rglob("*")) == before


# ----- a disk that is full, read-only or odd -----


@contextmanager
def full_disk() -> Iterator[None]:
    """Nothing can be synced, as where there is no room left."""

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield


def content(device: Device) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in device.folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("words", [("policy", "accept"), ("policy", "set", "when.charging=true")])
def test_a_policy_that_cannot_be_written_leaves_the_one_before_and_nothing_else(
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
) -> None:
    accept_policy(device, "[budget]\nepsilon = 1.0\ndelta = 1e-5\n", "here")
    before = content(device)
    with full_disk():
        assert call(monkeypatch, *words, "--dir", device.folder) == 13
    assert f"error: {device.policy}: cannot be read or written: No space" in capsys.readouterr().err
    assert content(device) == before


def test_going_back_to_a_model_on_a_disk_that_fails_says_so(
    device: Device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with full_disk():
        assert call(monkeypatch, "rollback", "--dir", device.folder) == 13
    assert f"{device.models}: cannot be read or written: No space" in capsys.readouterr().err


def test_an_agent_whose_lock_cannot_be_opened_says_so_and_may_be_tried_again(
    device: Device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    accept_policy(device, POLICY, "here")
    (device.folder / "agent.lock").mkdir()
    assert call(monkeypatch, "run", "--dir", device.folder) == 13
    assert "agent.lock: cannot be read or written: Is a directory" in capsys.readouterr().err
    assert " 13" not in device.unit.read_text()
    assert call(monkeypatch, "status", "--dir", device.folder) == 0


def test_a_status_tells_what_it_can_beside_files_that_are_none(
    device: Device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    accept_policy(device, POLICY, "here")
    (device.state / "diary.jsonl").mkdir()
    assert call(monkeypatch, "status", "--dir", device.folder, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["last_round"], told["refusals"], told["accepts_now"]) == (None, {}, False)
    assert "diary.jsonl: cannot be read or written: Is a directory" in told["against"][0]
    device.policy.unlink()
    device.policy.mkdir()
    assert call(monkeypatch, "policy", "accept", "--dir", device.folder) == 13
    assert "policy.toml: cannot be read or written: Is a dir" in capsys.readouterr().err
    assert call(monkeypatch, "status", "--dir", device.folder) == 0


def test_programs_are_written_whole_or_stay_as_they_are(device: Device) -> None:
    with full_disk(), pytest.raises(StorageError, match="bin: cannot be read or written: No space"):
        write_launcher(device.programs)
    assert list(device.programs.iterdir()) == []
    write_launcher(device.programs)
    before = {path: path.stat().st_ino for path in device.programs.iterdir()}
    with full_disk():
        write_launcher(device.programs)  # an agent starts again on a full disk
    assert {path: path.stat().st_ino for path in device.programs.iterdir()} == before
    program = device.programs / PROGRAM
    program.write_text("of an earlier version")
    with full_disk(), pytest.raises(StorageError):
        write_launcher(device.programs)
    assert program.read_text() == "of an earlier version"
    write_launcher(device.programs)
    assert program.read_text().startswith("#!/bin/sh\nexec ") and mode(program) == 0o700
    assert set(device.programs.iterdir()) == set(before)


@pytest.mark.parametrize("damage", [lambda key: key.unlink(), lambda key: key.write_text("no key")])
def test_an_agent_does_not_go_on_without_its_node_key(
    device: Device, damage: Callable[[Path], object]
) -> None:
    """A SuperNode without its key would be started over and over."""
    accept_policy(device, POLICY, "here")
    damage(device.node_key)
    with pytest.raises(ProvisionError, match=re.escape(str(device.node_key))):
        Agent(device, lambda _: None, lambda *_: pytest.fail("it was started")).run()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_unit_and_would_not_accept_a_wrong_one(tmp_path: Path) -> None:
    program = tmp_path / "reticent"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    text = device_unit(tmp_path / "a device", program)

    def complaints(text: str) -> str:
        path = tmp_path / "reticent-device.service"
        path.write_text(text)
        done = subprocess.run(
            ["systemd-analyze", "verify", str(path)], capture_output=True, check=False, text=True
        )
        return done.stderr if done.returncode == 0 else done.stderr or "failed"

    # The round is killed before the agent, and Flower's programs reach their base by a socket.
    lines = set(text.splitlines())
    assert {"MemoryMax=1G", "OOMPolicy=continue", "Nice=10", "ProtectSystem=strict"} <= lines
    assert "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX" in lines
    assert "reticent-device" not in complaints(text)
    assert "Unknown key" in complaints(text.replace("OOMPolicy", "OOMPolitic"))


def test_waits_grow_are_spread_and_begin_anew_after_a_long_life() -> None:
    low, high = Backoff(draw=lambda: 0.0), Backoff(draw=lambda: 1.0)
    assert [high.after(1.0) for _ in range(4)] == [5.0, 7.5, 11.25, 16.875]
    assert [low.after(1.0) for _ in range(4)] == [2.5, 3.75, 5.625, 8.4375]
    for _ in range(5000):
        last = high.after(1.0)
    assert last == 300.0
    assert high.after(31.0) == 5.0
    assert len({Backoff().after(0.0) for _ in range(20)}) == 20


def test_the_log_is_bounded_and_private(tmp_path: Path) -> None:
    log = tmp_path / "agent.log"
    log.write_bytes(b"x" * (MOST_LOG_BYTES - 3))
    append(log, "more")
    assert log.read_text() == "more\n"
    assert mode(log) == 0o600
    assert (tmp_path / "agent.log.1").stat().st_size < MOST_LOG_BYTES


def test_the_supernode_is_told_nothing_but_the_folder(device: Device) -> None:
    words = supernode(device, 1234)
    assert words[-2:] == ["--node-config", f'device-dir="{device.folder}"']
    assert "--insecure" not in words
    assert environment(device)["FLWR_TELEMETRY_ENABLED"] == "0"
    assert device.node_key.read_text() not in " ".join(words)


AGENT = """
import sys
from pathlib import Path
from reticent.client import agent
from reticent.client.backoff import Backoff
from reticent.client.folder import open_device

def command(device, port):
    return [sys.executable, "-c", Path(sys.argv[2]).read_text(), sys.argv[1]]

quick = Backoff(first=0.2)
agent.Agent(open_device(Path(sys.argv[1])), print, command, quick).run()
"""

SUPERNODE = """
import os, signal, subprocess, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
signal.signal(signal.SIGTERM, signal.SIG_IGN) if (folder / "deaf").exists() else None
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
with (folder / "pids").open("a") as file:
    file.write(f"{os.getpid()} {child.pid}\\n")
print("SuperNode ID: 7", flush=True)
time.sleep(600)
"""


class Running:
    """An agent in a process of its own, with a SuperNode that only waits."""

    def __init__(self, device: Device) -> None:
        script = device.folder.parent / "supernode.py"
        script.write_text(SUPERNODE)
        words = [sys.executable, "-c", AGENT, str(device.folder), str(script)]
        self.device, self.process = device, subprocess.Popen(words)

    def pids(self) -> list[list[int]]:
        path = self.device.folder / "pids"
        lines = path.read_text().splitlines() if path.exists() else []
        return [[int(word) for word in line.split()] for line in lines]

    def report(self) -> dict[str, Any]:
        return json.loads(self.device.report.read_text())


@pytest.fixture
def running(device: Device, request: pytest.FixtureRequest) -> Any:
    device.policy.write_text(POLICY)
    agent = Running(device)
    yield agent
    agent.process.kill()
    agent.process.wait()
    for pid in (pid for line in agent.pids() for pid in line):
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def until(happened: Callable[[], bool], seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_supernode_that_is_killed_is_started_again_and_leaves_nobody_behind(
    running: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    until(lambda: len(running.pids()) == 1)
    until(lambda: running.report()["connection"] == "connected")
    (first,) = running.pids()
    os.kill(first[0], signal.SIGKILL)
    until(lambda: len(running.pids()) == 2)
    assert not any(alive(pid) for pid in first)
    assert running.report()["restarts"] == 1
    assert is_held(running.device)
    assert call(monkeypatch, "run", "--dir", running.device.folder) == 8
    assert "an agent runs for this folder already" in capsys.readouterr().err
    assert call(monkeypatch, "status", "--dir", running.device.folder, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["agent"]["restarts"] == 1 and told["accepts_now"] is True
    running.process.terminate()
    assert running.process.wait(20) == 0
    assert not any(alive(pid) for line in running.pids() for pid in line)
    assert not is_held(running.device)
    assert running.report()["state"] == "stopped"
    assert "SuperNode ID: 7" in running.device.log.read_text()


def test_apps_of_runs_that_ended_are_removed_when_the_agent_starts(
    device: Device, request: pytest.FixtureRequest
) -> None:
    old = device.flower / "apps" / "reticent.app.1.0.0.abcdef01"
    old.mkdir(parents=True)
    (old / "pyproject.toml").touch()
    running = request.getfixturevalue("running")
    until(lambda: len(running.pids()) == 1)
    assert not old.exists() and device.flower.is_dir()


def test_when_the_agent_is_killed_its_supernode_does_not_go_on(running: Running) -> None:
    until(lambda: len(running.pids()) == 1)
    running.process.kill()
    until(lambda: not alive(running.pids()[0][0]))


def test_commands_from_bundle_to_policy(
    tmp_path: Path,
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, folder = tmp_path / "a.bundle", tmp_path / "mine"
    write_bundle(file, bundle)
    assert call(monkeypatch, "init", file, "--dir", folder) == 0
    said = capsys.readouterr().out
    assert bundle.checksum in said and "policy accept" in said
    assert call(monkeypatch, "run", "--dir", folder) == 12
    assert call(monkeypatch, "policy", "show", "--dir", folder) == 12
    assert call(monkeypatch, "policy", "accept", "--dir", folder) == 0
    assert call(monkeypatch, "policy", "set", "when.charging=true", "--dir", folder) == 0
    capsys.readouterr()
    assert call(monkeypatch, "policy", "show", "--json", "--dir", folder) == 0
    assert json.loads(capsys.readouterr().out)["when"]["charging"] is True
    assert call(monkeypatch, "policy", "set", "budget.epsilon=-1", "--dir", folder) == 12
    assert "budget.epsilon=-1" in capsys.readouterr().err
    assert call(monkeypatch, "status", "--dir", folder) == 0
    assert "a round now" in capsys.readouterr().out
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("[budget]\n")
    assert call(monkeypatch, "policy", "check", wrong) == 12
    assert call(monkeypatch, "status", "--dir", tmp_path / "nowhere") == 11
    assert call(monkeypatch, "budget", folder, "--epsilon", "1") == 5
    assert f"{folder / 'state'}: holds no ledger" in capsys.readouterr().err
    text = "".join(p.read_text() for p in folder.iterdir() if p.is_file() and p.name != "node.key")
    assert bundle.node_key not in text


@pytest.mark.parametrize("inside", [True, False])
def test_code_that_a_server_sent_is_not_run(tmp_path: Path, inside: bool) -> None:
    """Not as a module, nor in the place of an installed one; code elsewhere runs as ever."""
    home = tmp_path / "flower"
    app = home / "apps" / "app" if inside else tmp_path / "installed"
    app.mkdir(parents=True)
    (app / "evil.py").write_text("import os; os._exit(66)")
    script = (
        "import sys, importlib\n"
        "from pathlib import Path\n"
        "from reticent.client.launcher import forbid_code_in\n"
        "forbid_code_in(Path(sys.argv[1]))\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "importlib.import_module('evil')\n"
    )
    words = [sys.executable, "-c", script, str(home), str(app)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == (1 if inside else 66)
    assert ("came from the server" in done.stderr) is inside


FORGED = """
import importlib, importlib.util, marshal, struct, sys
from pathlib import Path
from reticent.client.launcher import find_installed_only, forbid_code_in

home, app, module = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
code = compile("import os; os._exit(66)", "/usr/lib/python3/innocent.py", "exec")
data = importlib.util.MAGIC_NUMBER + struct.pack("<III", 0, 0, 0) + marshal.dumps(code)
for name in ("evil.pyc", "reticent/evil.pyc", "reticent/client/evil.pyc"):
    (app / name).parent.mkdir(parents=True, exist_ok=True)
    (app / name).write_bytes(data)
importlib.import_module("reticent.client")
forbid_code_in(home)
if sys.argv[4] == "guarded":
    find_installed_only(home)
sys.path.insert(0, str(app))
importlib.invalidate_caches()
importlib.import_module("reticent.client.backoff")
importlib.metadata.version("flwr")
importlib.import_module(module)
"""


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("module", ["evil", "reticent.evil", "reticent.client.evil"])
def test_compiled_code_that_names_another_file_is_not_run_either(
    tmp_path: Path, inside: bool, module: str
) -> None:
    """A compiled module says itself which file it is from; not even Flower's folder need hold it.

    The last two are parts of packages without an ``__init__.py``, which grow with ``sys.path``.
    """
    home = tmp_path / "flower"
    app = home / "apps" / "app" if inside else tmp_path / "elsewhere"
    words = [sys.executable, "-c", FORGED, str(home), str(app), module]
    done = subprocess.run([*words, "guarded"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "ModuleNotFoundError" in done.stderr
    if module == "evil":  # what it is kept from
        done = subprocess.run([*words, "free"], capture_output=True, text=True, check=False)
        assert done.returncode == 66


def test_of_flowers_programs_for_apps_one_is_started(device: Device) -> None:
    write_launcher(device.programs)
    assert {PROGRAM, *REFUSED} == set(TASK_TYPE_TO_COMMAND.values())
    settings = environment(device)
    for program in REFUSED:
        found = shutil.which(program, path=settings["PATH"])
        assert found == str(device.programs / program)
        done = subprocess.run([str(found)], capture_output=True, text=True, check=False)
        assert done.returncode == 1 and "is not run on this device" in done.stderr


def test_flower_finds_the_launcher_first_and_it_is_flowers_own_program(device: Device) -> None:
    write_launcher(device.programs)
    settings = environment(device)
    found = shutil.which("flwr-clientapp", path=settings["PATH"])
    assert found == str(device.programs / "flwr-clientapp")
    words = [found, "--help"]
    done = subprocess.run(words, env=dict(settings), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "usage: flwr-clientapp" in done.stdout
