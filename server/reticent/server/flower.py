"""Flower's command lines: the SuperLink's process, and what it is told and asked."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)

from reticent.core.errors import NetworkError, ProvisionError

from .commands import Commands
from .home import CONNECTION, Home

START_SECONDS = 180.0
_RETURN_SECONDS = 30.0
_CALL_SECONDS = 120.0
_NODE_OF = "SELECT node_id, status FROM node WHERE public_key = ?"
_OTHER_NAMES = (62, 64)  # OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and _IP_ADDRESS_MISMATCH
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


class SuperLinkError(NetworkError):
    """The SuperLink does not run, or does not do what it is told."""


@dataclass(frozen=True)
class Node:
    """What the SuperLink knows about a node.

    Attributes:
        id: Its id.
        status: ``registered`` (never seen), ``online``, ``offline`` or ``unregistered``.
        changed: When it last came online or went offline, as the SuperLink writes it; or None.
    """

    id: int
    status: str
    changed: str | None


class Flower:
    """Flower's ``flwr`` command, speaking to this server's SuperLink."""

    def __init__(self, home: Home) -> None:
        self._commands = Commands("flwr", environment(home))
        self._database = home.database

    def register(self, public: Path) -> int:
        """Tell the SuperLink about a node key and return the node's id."""
        return int(self._call("supernode", "register", str(public), CONNECTION)["node-id"])

    def unregister(self, node: int) -> None:
        """Let the SuperLink refuse a node from now on."""
        self._call("supernode", "unregister", str(node), CONNECTION)

    def nodes(self) -> list[Node]:
        """Return every node that the SuperLink lists."""
        listed = self._call("supernode", "list", CONNECTION)["nodes"]
        return [_node(entry) for entry in listed]

    def node_of(self, public: str) -> Node:
        """Return the node that has a key, given as an OpenSSH line; also one that is unregistered.

        ``flwr`` does not list keys, so the SuperLink's own database is looked at, that of 1.41.

        Raises:
            SuperLinkError: If there is none, or the database cannot be read.
        """
        key = load_ssh_public_key(public.encode())
        pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        try:
            with closing(
                sqlite3.connect(f"{self._database.as_uri()}?mode=ro", uri=True)
            ) as database:
                row = database.execute(_NODE_OF, (pem,)).fetchone()
        except sqlite3.Error as error:
            raise SuperLinkError(f"{self._database}: cannot be read: {error}") from error
        if row is None:
            raise SuperLinkError(
                f"{self._database}: knows no node of a key that is said to be used"
            )
        return Node(row[0] % 2**64, str(row[1]), None)  # ids have 64 bits and no sign, SQLite's do

    def submit(self, app: Path, overrides: dict[str, str]) -> str:
        """Start the app in a folder and return the id of Flower's run."""
        with tempfile.TemporaryDirectory() as folder:
            # In a file of TOML: what is written out as words may not hold quotes or all of Unicode.
            given = Path(folder) / "overrides.toml"
            given.write_text(tomli_w.dumps(overrides), encoding="utf-8")
            done = self._call("run", str(app), CONNECTION, "--run-config", str(given))
        return str(done["run-id"])

    def stop(self, run: str) -> None:
        """Stop a run of Flower's; one that has ended already is no error."""
        with suppress(NetworkError):
            self._call("stop", run, CONNECTION)

    def _call(self, *words: str) -> dict[str, Any]:
        what = f"flwr {' '.join(words[:2])}"
        try:
            done = self._commands.call([*words, "--format", "json"], _CALL_SECONDS)
        except TimeoutError as error:
            raise SuperLinkError(f"{what}: no answer in {_CALL_SECONDS:g} s") from error
        answer = _json(done.out)
        if answer is None or done.status or answer.get("success") is not True:
            said = (answer or {}).get("error-message") or done.err or done.out
            raise SuperLinkError(f"{what}: {' '.join(str(said).split())[-500:]}")
        return answer


def _node(entry: dict[str, Any]) -> Node:
    status = str(entry["status"])
    seen = entry["offline-at"] if status != "online" else entry["online-at"]
    return Node(int(entry["node-id"]), status, None if seen in ("N/A", None) else str(seen))


def _json(text: str) -> dict[str, Any] | None:
    try:
        answer = json.loads(text)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def answers(home: Home) -> bool:
    """Return whether something on the SuperLink's port shows a certificate of our authority.

    Raises:
        ProvisionError: If the authority's certificate cannot be read, or the one that is shown does
            not name the address at which this machine's commands look for the SuperLink.
    """
    trusting = ssl.create_default_context(cadata=home.authority())
    try:
        with (
            socket.create_connection((home.inward, home.port), 5) as raw,
            trusting.wrap_socket(raw, server_hostname=home.inward),
        ):
            return True
    except ssl.SSLCertVerificationError as error:
        if error.verify_code not in _OTHER_NAMES:
            return False
        raise ProvisionError(
            f"{home.tls / 'server.crt'}: does not name {home.inward}, as that of a server which an "
            "earlier version made: `reticent server rotate` makes one that does; then start the "
            "SuperLink again"
        ) from error
    except OSError:
        return False


def wait_for(home: Home) -> None:
    """Give a SuperLink that somebody else keeps running the time to come back."""
    deadline = time.monotonic() + _RETURN_SECONDS
    while not answers(home) and time.monotonic() < deadline:
        time.sleep(1.0)


class SuperLink:
    """This server's SuperLink as a child process."""

    def __init__(self, home: Home, output: Path | None) -> None:
        """Start it; its output is appended to a file, or goes where ours goes."""
        self._home, self._output = home, output
        with ExitStack() as stack:
            log = None if output is None else stack.enter_context(output.open("ab"))
            self._process = subprocess.Popen(
                [program("flower-superlink"), *arguments(home)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT if log else None,
                env=environment(home),
                umask=0o077,
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        """Wait until it answers.

        Raises:
            SuperLinkError: If it ends, or does not answer in time; with the end of its log.
        """
        deadline = time.monotonic() + START_SECONDS
        while not answers(self._home):
            if (status := self._process.poll()) is not None:
                raise SuperLinkError(f"the SuperLink ended with status {status}{self._log()}")
            if time.monotonic() > deadline:
                raise SuperLinkError(f"no SuperLink after {START_SECONDS:g} s{self._log()}")
            time.sleep(0.25)

    def ended(self) -> bool:
        """Return whether the process is gone."""
        return self._process.poll() is not None

    def wait(self) -> int:
        """Wait for its end and return its exit status."""
        return self._process.wait()

    def stop(self) -> None:
        """End it and the processes that it started."""
        with suppress(ProcessLookupError):
            self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _log(self) -> str:
        if self._output is None:
            return ""
        text = self._output.read_text(errors="replace")
        return ": " + "\n".join(text.splitlines()[-12:])


@contextmanager
def superlink(home: Home, output: Path | None = None) -> Iterator[SuperLink | None]:
    """Hold a SuperLink: None is one that was running already, which is left running.

    Args:
        home: The server.
        output: File that its output is appended to; None for where ours goes.

    Raises:
        SuperLinkError: If none can be started.
    """
    if answers(home):
        yield None
        return
    started = SuperLink(home, output)
    try:
        started.wait_until_ready()
        yield started
    finally:
        started.stop()


def arguments(home: Home) -> Sequence[str]:
    """Return the arguments of ``flower-superlink``."""
    return (
        *("--ssl-ca-certfile", str(home.tls / "ca.crt")),
        *("--ssl-certfile", str(home.tls / "server.crt")),
        *("--ssl-keyfile", str(home.tls / "server.key")),
        *("--host", home.listens_on, "--port", str(home.port)),
        *("--database", str(home.database)),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
    )


def environment(home: Home) -> dict[str, str]:
    """Return the environment of every command of Flower's."""
    # The commands of this interpreter's environment come first: Flower starts more of them.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, **_QUIET, "FLWR_HOME": str(home.flower), "PATH": path}


def program(name: str) -> str:
    """Return the path of a command that is installed beside this interpreter."""
    return str(Path(sys.executable).parent / name)
