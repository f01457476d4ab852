"""A whole deployment on this machine: a server, two devices and one run.

    python loopback.py FOLDER

FOLDER must not exist; everything is written there. Every process that was started is stopped at
the end. Linux only.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from processes import Processes

PLAN = Path(__file__).resolve().parent / "plan.toml"
NAMES = ("device0", "device1")


@dataclass(frozen=True)
class Deployment:
    """A server with its devices.

    Attributes:
        folder: Holds everything.
        processes: What runs.
        port: The SuperLink's, on 127.0.0.1.
    """

    folder: Path
    processes: Processes
    port: int

    @property
    def run(self) -> Path:
        """The run directory, on the server."""
        return self.folder / "run"

    @property
    def server(self) -> Path:
        """The server's directory."""
        return self.folder / "server"

    def device(self, name: str) -> Path:
        """Return a device's directory."""
        return self.folder / name

    def reticent(self, verb: str, *arguments: str | Path, timeout: float = 60.0) -> str:
        """Run ``reticent server VERB`` and return what it printed."""
        words = ("reticent", "server", verb, *arguments, "--dir", self.server)
        return self.processes.run("cli", *words, timeout=timeout)

    def serve(self, plan: Path = PLAN, seconds: float = 180.0) -> str:
        """Run a plan to its end and return what was printed."""
        return self.reticent("run", plan, "--run", self.run, timeout=seconds)


@contextmanager
def deployment(folder: Path, names: tuple[str, ...] = NAMES) -> Iterator[Deployment]:
    """Make a server in ``folder``, which must not exist, and start its SuperLink and devices.

    Everything is stopped on leaving.
    """
    folder.mkdir(parents=True)
    running = Deployment(folder, Processes(folder), free_port())
    port = str(running.port)
    try:
        running.processes.run("cli", "reticent", "server", "init", running.server, "--port", port)
        running.reticent("enroll", *names)
        start_superlink(running)
        for name in names:
            start_device(running, name)
        yield running
    finally:
        running.processes.stop()


def start_superlink(running: Deployment) -> None:
    """Start the SuperLink and wait until it admits devices."""
    running.processes.start("superlink", "reticent", "server", "start", "--dir", running.server)
    log = running.folder / "superlink.log"
    running.processes.wait("the SuperLink", lambda: "ready" in log.read_text(), 180)


def start_device(running: Deployment, name: str) -> None:
    """Unpack a device's bundle, accept what the operator proposes, and start its agent."""
    bundle, folder = running.server / "bundles" / f"{name}.bundle", running.device(name)
    words = ("reticent", "device", "init", bundle, "--dir", folder, "--accept")
    running.processes.run("cli", *words)
    running.processes.start(name, "reticent", "device", "run", "--dir", folder)


def free_port() -> int:
    """Return a TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def main() -> None:
    """Run the example and print its summary."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python loopback.py FOLDER")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is stopped
    with deployment(Path(sys.argv[1]).resolve()) as running:
        print(running.serve(), end="")
        print(running.reticent("status"), end="")
        print(json.dumps(json.loads((running.run / "summary.json").read_text()), indent=2))


if __name__ == "__main__":
    main()
