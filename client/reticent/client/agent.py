"""The agent: keeps a device's SuperNode running, and says how it is."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType

from reticent.core.errors import ProvisionError
from reticent.core.run import write_atomic

from .backoff import Backoff
from .family import Child, adopt_orphans, end_children
from .folder import Device, held, read_node_key
from .launcher import SUPERNODE, write_launcher
from .leaving import leave

MOST_LOG_BYTES = 1_000_000
_GRACE_SECONDS = 15.0
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_NODE = re.compile(r"SuperNode ID: (\d{1,20})\b")
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "OMP_NUM_THREADS": "1",
}
_SAID = (
    ("SuperNode ID:", "connected"),
    ("Connection successful", "connected"),
    ("Connection attempt failed", "no connection; trying again"),
    ("Failed to initialize the connection", "turned away by the server, or not reached"),
)


@dataclass(frozen=True)
class Report:
    """What an agent says of itself, in ``agent.json``.

    Attributes:
        state: ``running``, ``waiting`` (to start the SuperNode again) or ``stopped``.
        connection: In words.
        pid: The agent's process.
        supernode: The SuperNode's process; 0 while there is none.
        node: The SuperLink's id of the SuperNode while it may count as connected; else 0.
        restarts: How often the SuperNode was started again.
        changed: Seconds since 1970.
    """

    state: str
    connection: str = "not yet"
    pid: int = 0
    supernode: int = 0
    node: int = 0
    restarts: int = 0
    changed: float = 0.0


@dataclass
class Agent:
    """One call of ``reticent device run``.

    Attributes:
        device: The device's folder.
        say: Takes a line for a person.
        command: Returns the SuperNode's command for a free port; another one only in tests.
        backoff: How long to wait before the SuperNode is started again.
    """

    device: Device
    say: Callable[[str], None]
    command: Callable[[Device, int], Sequence[str]] = field(default=lambda d, p: supernode(d, p))
    backoff: Backoff = field(default_factory=Backoff)
    _stop: threading.Event = field(default_factory=threading.Event)
    _report: Report = field(default_factory=lambda: Report("running", pid=os.getpid()))
    _writing: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        """Keep the SuperNode running until SIGTERM or SIGINT; then end all that was started.

        Raises:
            RunError: If another agent runs for the folder.
            PolicyError: If the owner has accepted no policy.
            ProvisionError: If the node key is gone or damaged: no restart of a SuperNode mends it.
            StorageError: If the disk takes no file that the agent cannot do without.
        """
        with held(self.device):
            self.device.owners_policy()
            read_node_key(self.device.node_key)
            write_launcher(self.device.programs)
            adopt_orphans()
            before = read_report(self.device)
            with self._signals():
                try:
                    self._tell(node=0 if before is None else before.node)
                    self._keep_running()
                finally:
                    end_children()
                    self._tell(state="stopped", connection="none", supernode=0)

    def _keep_running(self) -> None:
        while not self._stop.is_set():
            self._leave()
            # An app for each run that there ever was: Flower never removes one, and nothing of
            # Flower's runs at this moment. What is still needed comes again with its next message.
            shutil.rmtree(self.device.flower / "apps", ignore_errors=True)
            child = Child(
                self.command(self.device, free_port()), environment(self.device), self._line
            )
            self._tell(state="running", connection="connecting", supernode=child.pid)
            self.say(f"SuperNode started (process {child.pid}), for {self.device.address}")
            status = self._watch(child)
            if status is None:
                return
            wait = self.backoff.after(child.lived())
            end_children()
            self._leave()
            self._tell(state="waiting", supernode=0, restarts=self._report.restarts + 1)
            self.say(f"SuperNode ended with status {status}; again in {wait:.0f} s")
            self._stop.wait(wait)

    def _watch(self, child: Child) -> int | None:
        """Return the exit status of the SuperNode; None when the agent was told to stop."""
        while not self._stop.is_set():
            if (status := child.wait(0.5)) is not None:
                return status
        child.stop(_GRACE_SECONDS)
        return None

    def _leave(self) -> None:
        """Tell the SuperLink that a SuperNode is gone that may not have said so itself."""
        if self._report.node and leave(self.device, self._report.node):
            self._tell(node=0)

    def _line(self, text: str) -> None:
        plain = _COLOUR.sub("", text)
        append(self.device.log, plain)
        if found := _NODE.search(plain):
            self._tell(node=int(found[1]))
        for said, meaning in _SAID:
            if said in plain:
                self._tell(connection=meaning)

    def _tell(self, **changes: object) -> None:
        with self._writing:
            changed = replace(self._report, **changes)
            if changed != self._report:
                self._report = replace(changed, changed=time.time())
                data = json.dumps(asdict(self._report)).encode()
                with suppress(OSError):  # a full disk must not end the agent
                    write_atomic(self.device.report, data)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(_: int, __: FrameType | None) -> None:
            self._stop.set()

        before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def supernode(device: Device, port: int) -> list[str]:
    """Return the SuperNode's command; ``port`` is one of the loopback interface."""
    if set(str(device.folder)) & set("\"'\\"):
        raise ProvisionError(f"{device.folder}: Flower cannot be given such a path: move it")
    return [
        *(sys.executable, "-P", "-m", f"{__package__}.nursery", str(device.folder)),
        SUPERNODE,
        *("--root-certificates", str(device.authority)),
        *("--superlink", device.address),
        *("--auth-supernode-private-key", str(device.node_key)),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--node-config", f'device-dir="{device.folder}"'),
    ]


def environment(device: Device) -> Mapping[str, str]:
    """Return the SuperNode's environment."""
    # Our launcher comes first, then the commands of this interpreter's environment: Flower starts
    # them by name.
    places = [str(device.programs), str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    path = os.pathsep.join(places)
    return {**os.environ, **_QUIET, "FLWR_HOME": str(device.flower), "PATH": path}


def free_port() -> int:
    """Return a TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def append(path: Path, line: str) -> None:
    """Append a line to a log; at :data:`MOST_LOG_BYTES` it becomes ``….1``, which is replaced."""
    with suppress(OSError):  # a full disk must not end the agent
        if path.exists() and path.stat().st_size + len(line) >= MOST_LOG_BYTES:
            path.replace(path.with_name(f"{path.name}.1"))
        with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a") as file:
            file.write(line + "\n")


def read_report(device: Device) -> Report | None:
    """Return what the last agent said; None if there was none, or it cannot be read."""
    try:
        report = Report(**json.loads(device.report.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    numbers = (report.pid, report.supernode, report.node, report.restarts)
    texts = type(report.state) is type(report.connection) is str
    sound = texts and all(type(n) is int and n >= 0 for n in numbers)
    return report if sound and isinstance(report.changed, int | float) else None
