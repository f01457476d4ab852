from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from reticent.cli import main as command
from reticent.core.plan import load_plan
from reticent.core.run import create_run
from reticent.core.signing import read_public_key
from reticent.server.certificates import SERVER_DAYS, utc_now
from reticent.server.flower import SuperLinkError
from reticent.server.home import Home, create_home, open_home, rotate_certificate
from reticent.server.operate import committed
from reticent.server.registry import read_registry

Capture = pytest.CaptureFixture[str]
PLAN = Path(__file__).resolve().parent.parent / "examples" / "deployment" / "plan.toml"


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr("sys.argv", ["reticent", "server", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    return int(stopped.value.code or 0)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "server"
    create_home(folder, ["127.0.0.1"], port, utc_now())
    monkeypatch.setenv("RETICENT_SERVER", str(folder))
    return folder


def test_a_server_is_set_up_without_a_superlink(
    server: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert call(monkeypatch, "enroll", "a", "b") == 0
    printed = capsys.readouterr().out
    checksum = json.loads((server / "bundles" / "a.bundle").read_text())["checksum"]
    assert checksum in printed and "does not run" in printed
    assert call(monkeypatch, "renew", "a") == 0
    assert call(monkeypatch, "revoke", "b") == 0
    assert call(monkeypatch, "rotate") == 0
    capsys.readouterr()
    assert call(monkeypatch, "list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert {d["name"]: d["state"] for d in listed} == {"a": "unknown", "b": "revoked"}
    assert call(monkeypatch, "status") == 0
    assert "SuperLink down" in capsys.readouterr().out


def test_nothing_that_is_printed_or_logged_holds_a_private_key(
    server: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, caplog: Any
) -> None:
    with caplog.at_level(0):
        for words in (["enroll", "a"], ["renew", "a"], ["status"], ["list"], ["rotate"]):
            assert call(monkeypatch, *words) == 0
        assert call(monkeypatch, "enroll", "a") == 11
    printed = capsys.readouterr()
    secrets = [
        line
        for path in server.rglob("*")
        if path.is_file() and b"PRIVATE KEY" in path.read_bytes()
        for line in path.read_text().replace("\\n", "\n").splitlines()
        if len(line) > 40 and "-----" not in line and '"' not in line
    ]
    assert len(secrets) >= 5
    for secret in secrets:
        assert secret not in printed.out + printed.err + caplog.text


def test_a_policy_is_taken_from_a_file_and_must_be_one(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("[budget]\nepsilon = -1\ndelta = 1e-5\n")
    assert call(monkeypatch, "enroll", "a", "--policy", policy) == 12
    assert "budget.epsilon=-1" in capsys.readouterr().err
    policy.write_text("[budget]\nepsilon = 1.0\ndelta = 1e-5\n")
    assert call(monkeypatch, "enroll", "a", "--policy", policy) == 0
    bundle = json.loads((server / "bundles" / "a.bundle").read_text())
    assert bundle["policy"] == policy.read_text()


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("run", "--resume"), 3, "needs --run"),
        (("run", "absent.toml"), 3, "absent.toml"),
        (("list", "--dir", "/nonexistent"), 11, "server init"),
        (("revoke", "nobody"), 11, "is not enrolled"),
        (("enroll",), 2, "Missing argument"),
        (("init", "x", "--host", "a b"), 11, "host name or an IP address"),
    ],
)
def test_failures_say_why_and_have_a_status(
    server: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    words: tuple[str, ...],
    status: int,
    said: str,
) -> None:
    assert call(monkeypatch, *words) == status
    assert said in capsys.readouterr().err


def test_an_expired_certificate_ends_a_run_before_it_begins(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    rotate_certificate(open_home(server), utc_now() - timedelta(days=SERVER_DAYS + 1))
    assert call(monkeypatch, "run", PLAN, "--run", tmp_path / "run") == 11
    assert "server rotate" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_student_that_would_be_trained_wrongly_ends_a_run_before_it_begins(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    tied = ("--set", "student.model=odd_students:Tied")
    assert call(monkeypatch, "run", PLAN, *tied, "--run", tmp_path / "run") == 4
    assert "do not sum to its gradient" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_port_that_something_else_uses_ends_a_run_with_the_reason(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    with socket.create_server(("127.0.0.1", open_home(server).port)):
        assert call(monkeypatch, "run", PLAN, "--run", tmp_path / "run") == 6
    assert "the SuperLink ended with status" in capsys.readouterr().err


def test_a_superlink_that_is_told_to_stop_has_not_failed(
    server: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """systemd stops it by SIGTERM, and calls a unit failed whose status is not 0."""
    stopped: list[bool] = []

    class Link:
        def wait(self) -> int:
            os.kill(os.getpid(), signal.SIGTERM)
            return 1

    @contextmanager
    def superlink(home: Home) -> Iterator[Link]:
        try:
            yield Link()
        finally:
            stopped.append(True)

    monkeypatch.setattr("reticent.server.flower.superlink", superlink)
    monkeypatch.setattr("reticent.server.enrolment.synchronize", lambda *_: [])
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert call(monkeypatch, "start") == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped and "SuperLink ready" in capsys.readouterr().out


def test_a_run_that_is_there_is_not_begun_again(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    run = create_run(tmp_path / "run", load_plan(PLAN))
    assert call(monkeypatch, "run", PLAN, "--run", run.folder) == 8
    assert "--resume" in capsys.readouterr().err
    run.summary.write_text("{}")
    assert call(monkeypatch, "run", "--run", run.folder, "--resume") == 8
    assert "has finished" in capsys.readouterr().err
    own = f"federation.rounds={load_plan(PLAN).federation.rounds}"  # of the run's plan, no other
    assert call(monkeypatch, "run", "--run", run.folder, "--resume", "--set", own) == 8
    assert "has finished" in capsys.readouterr().err
    assert call(monkeypatch, "status", "--run", run.folder, "--json") == 0
    assert json.loads(capsys.readouterr().out)["run"]["state"] == "finished"


@pytest.mark.parametrize("content", [None, b"junk"])
@pytest.mark.parametrize(
    ("name", "words", "status"),
    [
        ("tls/ca.crt", ("list",), 11),
        ("tls/ca.crt", ("status",), 11),
        ("tls/server.crt", ("status",), 11),
        ("tls/ca.crt", ("enroll", "a"), 11),
        ("tls/ca.crt", ("rotate",), 11),
        ("tls/ca.key", ("rotate",), 11),
        ("keys/signing_key.pub.pem", ("enroll", "a"), 7),
        ("keys/plans/signing_key.pub.pem", ("enroll", "a"), 7),
        ("keys/artifacts/signing_key.pub.pem", ("enroll", "a"), 7),
        ("keys/plans/signing_key.pem", ("enroll", "a"), 7),
    ],
)
def test_a_file_that_is_missing_or_junk_is_named_before_anything_is_recorded(
    server: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    name: str,
    words: tuple[str, ...],
    status: int,
    content: bytes | None,
) -> None:
    (server / name).unlink()
    if content is not None:
        (server / name).write_bytes(content)
    before = tree(server / "tls")
    assert call(monkeypatch, *words) == status
    assert f"error: {server / name}: " in capsys.readouterr().err
    assert read_registry(server / "devices.json").devices == {}
    assert list((server / "bundles").iterdir()) == []
    assert tree(server / "tls") == before


def tree(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.iterdir()}


def test_without_its_authority_a_server_shows_its_devices(
    server: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert call(monkeypatch, "enroll", "pi") == 0
    (server / "tls" / "ca.crt").write_text("junk")
    capsys.readouterr()
    for words in (("list",), ("status",)):
        assert call(monkeypatch, *words) == 11
        shown = capsys.readouterr()
        assert "pi 0 unknown" in " ".join(shown.out.split())
        assert "ca.crt: is not a certificate" in shown.err
        assert call(monkeypatch, *words, "--json") == 11
        found = json.loads(capsys.readouterr().out)
    state = found["server"]
    assert state["superlink"] == "unknown" and state["devices"][0]["name"] == "pi"
    ca, own = state["certificates"]
    assert ca["file"] == "ca.crt" and "is not a certificate" in ca["problem"]
    assert own["file"] == "server.crt" and own["days"] > 300


def test_a_revocation_that_the_superlink_was_not_told_is_said_and_may_be_repeated(
    server: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert call(monkeypatch, "enroll", "pi") == 0
    authority = (server / "tls" / "ca.crt").read_bytes()
    (server / "tls" / "ca.crt").write_text("junk")
    capsys.readouterr()
    for _ in range(2):
        assert call(monkeypatch, "revoke", "pi") == 11
        said = capsys.readouterr().err
        assert "ca.crt: is not a certificate" in said
        assert "recorded" in said and "NOT told: it still admits pi until you repeat" in said
    assert read_registry(server / "devices.json").devices["pi"].revoked is not None
    (server / "tls" / "ca.crt").write_bytes(authority)
    assert call(monkeypatch, "revoke", "pi") == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("enroll", "a", "b"), "it does not admit a, b until it is told"),
        (("renew", "pi"), "it does not admit the new key of pi until it is told"),
        (("revoke", "pi"), "it still admits pi until you repeat"),
    ],
)
def test_a_superlink_that_does_not_do_what_it_is_told_is_said_to_be_untold(
    server: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    words: tuple[str, ...],
    said: str,
) -> None:
    assert call(monkeypatch, "enroll", "pi") == 0

    def failing(*_: object) -> None:
        raise SuperLinkError("flwr supernode: 503")

    monkeypatch.setattr("reticent.server.flower.answers", lambda home: True)
    monkeypatch.setattr("reticent.server.enrolment.synchronize", failing)
    assert call(monkeypatch, *words) == 6
    told = capsys.readouterr().err
    assert "503" in told and f"NOT told: {said}" in told


def test_a_last_run_that_is_gone_is_said_beside_the_devices(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert call(monkeypatch, "enroll", "pi") == 0
    gone = tmp_path / "gone"
    (server / "last-run").write_text(str(gone))
    capsys.readouterr()
    assert call(monkeypatch, "status") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "server.crt until" in shown and "pi 0 unknown" in shown
    assert "problem" in shown and "not a run directory" in shown
    assert call(monkeypatch, "status", "--json") == 0
    run = json.loads(capsys.readouterr().out)["run"]
    assert run["folder"] == str(gone) and "not a run directory" in run["problem"]
    assert call(monkeypatch, "status", "--run", gone) == 8
    (server / "last-run").write_bytes(b"\xff")
    assert call(monkeypatch, "status") == 0
    assert "last-run: cannot be read" in " ".join(capsys.readouterr().out.split())


def test_a_line_of_metrics_that_is_being_written_is_read_later(tmp_path: Path) -> None:
    run = create_run(tmp_path / "run", load_plan(PLAN))
    run.metrics.write_text('{"round": 1}\n{"rou')
    assert committed(run) == []
    run.metrics.write_text('{"round": 1}\n{"round": 2}\n')
    assert [m["round"] for m in committed(run)] == [1, 2]


def test_the_artifact_is_signed_by_the_servers_key_and_the_run_holds_no_copy(
    server: Path, tmp_path: Path
) -> None:
    from reticent.server.deployment import _countersigner

    run = create_run(tmp_path / "run", load_plan(PLAN))
    for _ in range(2):
        _countersigner(run, str(server)).close()
    assert not run.keys.is_symlink() and not (run.keys / "signing_key.pem").exists()
    own = read_public_key(run.keys / "signing_key.pub.pem")
    assert own == read_public_key(server / "keys" / "artifacts" / "signing_key.pub.pem")
