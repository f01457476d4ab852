"""A whole deployment on this machine: certificates, a SuperLink, two SuperNodes and one run.

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

from keys import write_certificates, write_node_key
from processes import ProcessError, Processes

APP = Path(__file__).resolve().parent
NODES = 2
DELTA = 1e-5


@dataclass(frozen=True)
class Deployment:
    """A running SuperLink with its SuperNodes.

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
    def server_state(self) -> Path:
        """The server's signing key and its record of the devices' ledger heads."""
        return self.folder / "server-state"

    def state(self, node: int) -> Path:
        """Return the folder of a device's ledger."""
        return self.folder / f"state{node}"

    def flwr(self, *arguments: str | Path) -> str:
        """Run Flower's command line and return what it printed."""
        return self.processes.run("cli", "flwr", *arguments)

    def submit(self) -> str:
        """Start the app of this folder and return the id of the run."""
        setting = f'run-dir="{self.run}" state-dir="{self.server_state}"'
        answer = self.flwr("run", APP, "tls", "--run-config", setting, "--format", "json")
        return json.loads(answer)["run-id"]

    def finish(self, run_id: str, seconds: float) -> None:
        """Wait for the run's summary, which is the last file that a run writes.

        Raises:
            ProcessError: If there is none in time, or the ServerApp ended without one; with the
                ServerApp's log and every other one.
        """
        summary = self.run / "summary.json"
        superlink = self.folder / "superlink.log"

        def over() -> bool:
            # `flwr run` cannot tell a ServerApp that raised from one that did not.
            return summary.is_file() or "Finished task" in superlink.read_text(errors="replace")

        try:
            self.processes.wait("the run's summary", over, seconds)
            if not summary.is_file():
                raise ProcessError(f"the ServerApp ended early\n{self.processes.logs()}")
        except ProcessError as error:
            log = self.flwr("log", run_id, "tls", "--show")
            raise ProcessError(f"{error}\n== ServerApp\n{log}") from error


@contextmanager
def deployment(folder: Path, budget: float = 10.0) -> Iterator[Deployment]:
    """Start everything in ``folder``, and stop it on leaving.

    Args:
        folder: Must not exist.
        budget: The epsilon that each device's owner allows, at delta 1e-5.
    """
    folder.mkdir(parents=True)
    write_certificates(folder)
    processes = Processes(folder)
    running = Deployment(folder, processes, free_port())
    try:
        processes.run("cli", "reticent", "server", "init", running.server_state)
        _start_superlink(running)
        for node in range(NODES):
            start_supernode(running, node, budget)
        yield running
    finally:
        processes.stop()


def _start_superlink(running: Deployment) -> None:
    folder, port = running.folder, running.port
    running.processes.start(
        "superlink",
        "flower-superlink",
        *("--ssl-ca-certfile", folder / "ca.crt"),
        *("--ssl-certfile", folder / "server.pem"),
        *("--ssl-keyfile", folder / "server.key"),
        *("--port", str(port), "--database", folder / "superlink.db"),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
    )
    home = folder / "cli-home"
    home.mkdir(exist_ok=True)
    connection = f'address = "127.0.0.1:{port}"\nroot-certificates = "{folder / "ca.crt"}"\n'
    (home / "config.toml").write_text(f"[superlink.tls]\n{connection}")
    running.processes.wait("the SuperLink", lambda: _listens(port), 30)


def start_supernode(running: Deployment, node: int, budget: float, register: bool = True) -> None:
    """Start a SuperNode with a new key, which the SuperLink is told of if ``register``."""
    folder, name = running.folder, f"supernode{node}"
    write_node_key(folder / f"{name}.key")
    if register:
        running.flwr("supernode", "register", folder / f"{name}.key.pub", "tls")
    settings = (
        f"partition-id={node} num-partitions={NODES} "
        f'state-dir="{running.state(node)}" budget-epsilon={budget} budget-delta={DELTA} '
        f'server-key="{running.server_state / "keys" / "signing_key.pub.pem"}"'
    )
    running.processes.start(
        name,
        "flower-supernode",
        *("--root-certificates", folder / "ca.crt"),
        *("--superlink", f"127.0.0.1:{running.port}"),
        *("--auth-supernode-private-key", folder / f"{name}.key"),
        *("--port", str(free_port())),
        *("--node-config", settings),
    )


def free_port() -> int:
    """Return a TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def main() -> None:
    """Run the example and print its summary."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python loopback.py FOLDER")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is stopped
    with deployment(Path(sys.argv[1]).resolve()) as running:
        running.finish(running.submit(), 180)
        print((running.run / "metrics.jsonl").read_text(), end="")
        print(json.dumps(json.loads((running.run / "summary.json").read_text()), indent=2))


if __name__ == "__main__":
    main()
