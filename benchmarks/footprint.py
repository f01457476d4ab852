"""Memory of a device's processes, and the time of a round: the agent beside plain Flower.

    python benchmarks/footprint.py [--rounds 6] [--plain]

A SuperLink and one device on this machine, over TLS, with `examples/deployment`. Memory is the
proportional set size (PSS) of every process of the device, sampled every 0.2 s; idle is the median
before the run, the peak is the largest sum during it. A round is the time from one ClientApp's
start to the next. With ``--plain`` the device is a ``flower-supernode`` as it comes.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import threading
import time
import tomllib
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "deployment"
sys.path.insert(0, str(EXAMPLE))

import loopback  # noqa: E402
from processes import _descendants  # noqa: E402


class Sampler(threading.Thread):
    """Samples a process and its descendants until stopped."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid, self._end = pid, threading.Event()
        self.samples: list[tuple[float, dict[str, int]]] = []

    def run(self) -> None:
        """Sample."""
        while not self._end.wait(0.2):
            self.samples.append((time.time(), memory(self._pid)))

    def stop(self) -> None:
        """End the thread."""
        self._end.set()
        self.join()


def memory(pid: int) -> dict[str, int]:
    """Return the PSS in bytes of a process and its descendants, by the name of their program."""
    found: dict[str, int] = defaultdict(int)
    for process in _descendants(pid):
        with suppress(OSError, StopIteration):
            words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
            name = next(w for w in map(bytes.decode, words) if named(w))
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            pss = next(line for line in lines if line.startswith("Pss:"))
            found[named(name)] += int(pss.split()[1]) * 1024
    return dict(found)


def named(word: str) -> str:
    """Return what a word of a command line says which program it is; empty if it does not."""
    last = word.rpartition("/")[2]
    names = {
        "reticent": "agent",
        "reticent.client.launcher": "flwr-clientapp",
        "reticent.client.supernode": "flower-supernode",
    }
    known = {"flower-supernode", "flower-superexec", "flwr-clientapp"}
    return names.get(last, last if last in known else "")


def start_plain(running: loopback.Deployment, name: str) -> None:
    """Start a SuperNode as it comes, with the same key and settings."""
    folder, bundle = running.device(name), running.server / "bundles" / f"{name}.bundle"
    words = ("reticent", "device", "init", bundle, "--dir", folder, "--accept")
    running.processes.run("cli", *words)
    told = tomllib.loads((folder / "device.toml").read_text())
    settings = (
        f'partition-id=0 state-dir="{folder / "state"}" budget-epsilon=99.0 budget-delta=1e-5 '
        f'node-key="{folder / "node.key"}"'
    )
    running.processes.start(
        name,
        *("flower-supernode", "--root-certificates", folder / "ca.crt"),
        *("--superlink", told["address"], "--auth-supernode-private-key", folder / "node.key"),
        *("--port", str(loopback.free_port()), "--node-config", settings),
    )


def measure(folder: Path, rounds: int, plain: bool) -> None:
    """Run and print."""
    if plain:
        loopback.start_device = start_plain
    with loopback.deployment(folder, ("device0",)) as running:
        sampler = Sampler(running.processes.running["device0"].pid)
        time.sleep(12)
        sampler.start()
        time.sleep(5)
        idle = len(sampler.samples)
        changes = {
            "task.clients": 1,
            "federation.rounds": rounds,
            "federation.clients_per_round": 1,
            "federation.min_replies": 1,
            "federation.eval_every": 1000,
        }
        words = [w for k, v in changes.items() for w in ("--set", f"{k}={v}")]
        running.reticent("run", loopback.PLAN, "--run", running.run, *words, timeout=300)
        sampler.stop()
        show(sampler.samples, idle, running.run, rounds)


def show(samples: list[tuple[float, dict[str, int]]], idle: int, run: Path, rounds: int) -> None:
    """Print the table."""
    names = sorted({name for _, found in samples for name in found})
    for name in [*names, "all"]:
        sums = [sum(f.values()) if name == "all" else f.get(name, 0) for _, f in samples]
        rest = statistics.median(sums[:idle])
        print(f"{name:18} idle {rest / 1e6:6.0f} MB   peak {max(sums[idle:]) / 1e6:6.0f} MB")
    begins = [
        now
        for (now, found), (_, before) in zip(samples[1:], samples, strict=False)
        if "flwr-clientapp" in found and "flwr-clientapp" not in before
    ]
    gaps = [b - a for a, b in itertools.pairwise(begins)]
    print(
        f"round              median {statistics.median(gaps):.1f} s of {len(gaps)}: "
        f"{min(gaps):.1f} to {max(gaps):.1f}"
    )


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--plain", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder) / "all", given.rounds, given.plain)


if __name__ == "__main__":
    main()
