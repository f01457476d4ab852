"""Memory and time of a device: plain Flower, the agent, and the agent that keeps torch loaded.

    python benchmarks/footprint.py [--rounds 6] [--kinds plain cold warm] [--limit MB]

A SuperLink and one device of each kind on this machine, over TLS, with `examples/deployment`, all
in the same rounds, so that whatever else the machine does meets all alike. Memory is the
proportional set size (PSS) of every process of a device, sampled every 0.2 s: idle is the median
before the run, the peak is the largest sum during it. A message is one `flwr-clientapp`: how long
it lives, and what it computes. The round is the median between two starts of it; with one kind it
is that kind's own, with several the slowest one's.

With ``--limit`` each device runs in a memory control group of its own (old or new, below this
process's; needs the right to make one), and what became of the rounds is shown too: how many were
released, why others were refused, how often the kernel killed for memory, and how often the
SuperNode was started again. The exit status is 1 if anything was killed or started again.

``plain`` is a ``flower-supernode`` as it comes, with the same app.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
import tomllib
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "deployment"
sys.path.insert(0, str(EXAMPLE))

import loopback  # noqa: E402
from processes import ProcessError, _descendants  # noqa: E402

TICKS = os.sysconf("SC_CLK_TCK")
APP = "flwr-clientapp"
NAMES = {"flower-supernod": "flower-supernode", "flower-superexe": "flower-superexec"}
KINDS = ("plain", "cold", "warm")


@dataclass
class App:
    """A process of the app: when it was seen first and last, and its processor seconds then."""

    first: float
    last: float = 0.0
    computed: float = 0.0


@dataclass
class Sampler(threading.Thread):
    """Samples a device's process and its descendants until stopped."""

    pid: int
    samples: list[dict[str, int]] = field(default_factory=list)
    apps: dict[int, App] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make it a thread."""
        super().__init__(daemon=True)
        self.end = threading.Event()

    __hash__ = threading.Thread.__hash__

    def run(self) -> None:
        """Sample."""
        while not self.end.wait(0.2):
            found: dict[str, int] = defaultdict(int)
            for process in _descendants(self.pid):
                with suppress(OSError, ValueError):
                    self._look(process, found)
            self.samples.append(found)

    def stop(self) -> None:
        """End the thread."""
        self.end.set()
        self.join()

    def _look(self, process: int, found: dict[str, int]) -> None:
        folder = Path(f"/proc/{process}")
        name = named(folder)
        lines = (folder / "smaps_rollup").read_text().splitlines()
        pss = [int(line.split()[1]) for line in lines if line.startswith("Pss:")]
        found[name] += 1024 * sum(pss)
        if name == APP:
            times = (folder / "stat").read_text().rpartition(")")[2].split()[11:13]
            app = self.apps.setdefault(process, App(time.time()))
            app.last, app.computed = time.time(), sum(map(int, times)) / TICKS


def named(folder: Path) -> str:
    """Return which program a process is."""
    name = (folder / "comm").read_text().strip()
    if name in (*NAMES, APP, "reticent-base"):
        return NAMES.get(name, name)
    words = (folder / "cmdline").read_bytes().decode().split("\0")
    if any(word.endswith("asking.py") for word in words):
        return "asking"
    known = (*NAMES.values(), APP)
    return next((word.rpartition("/")[2] for word in words if word.endswith(known)), "agent")


def start(running: loopback.Deployment, name: str, group: Path | None) -> None:
    """Start a device whose name is its kind."""
    folder, bundle = running.device(name), running.server / "bundles" / f"{name}.bundle"
    words = ("reticent", "device", "init", bundle, "--dir", folder, "--accept")
    running.processes.run("cli", *words, timeout=300)
    if name == "warm":
        with (folder / "policy.toml").open("a") as file:
            file.write("\n[resources]\nwarm = true\n")
    agent = ("reticent", "device", "run", "--dir", folder)
    command = plain(folder) if name == "plain" else agent
    within = ("sh", "-c", 'echo $$ > "$0" && exec "$@"', group / "cgroup.procs") if group else ()
    running.processes.start(name, *within, *command)


def plain(folder: Path) -> tuple[str | Path, ...]:
    """Return the command of a SuperNode as it comes, with the same key and settings."""
    told = tomllib.loads((folder / "device.toml").read_text())
    state, index = folder / "state", told["index"]
    return (
        *("flower-supernode", "--root-certificates", folder / "ca.crt"),
        *("--superlink", told["address"], "--auth-supernode-private-key", folder / "node.key"),
        *("--port", str(loopback.free_port()), "--node-config"),
        f'partition-id={index} state-dir="{state}" budget-epsilon=99.0 budget-delta=1e-5 '
        f'node-key="{folder / "node.key"}"',
    )


class Groups:
    """Memory control groups below this process's own; removed at the end."""

    def __init__(self, limit: int) -> None:
        """Find where they can be made; ``limit`` is in bytes, 0 for none."""
        self._limit, self._made = limit, dict[str, Path]()

    def make(self, name: str) -> Path | None:
        """Return a new group."""
        if not self._limit:
            return None
        group, limit = _own_group()
        self._made[name] = group / f"reticent-footprint-{os.getpid()}-{name}"
        self._made[name].mkdir()
        (self._made[name] / limit).write_text(str(self._limit))
        return self._made[name]

    def kills(self, name: str) -> int:
        """Return how many processes the kernel killed for the group's memory."""
        if name not in self._made:
            return 0
        told: dict[str, str] = {}
        for file in ("memory.events", "memory.oom_control"):
            with suppress(OSError):
                lines = (self._made[name] / file).read_text().splitlines()
                told |= {line.split()[0]: line.split()[1] for line in lines}
        return int(told["oom_kill"])

    def remove(self) -> None:
        """Remove them; nothing runs in them any more."""
        for group in self._made.values():
            group.rmdir()


def _own_group() -> tuple[Path, str]:
    """Return the memory control group of this process, and the name of its limit."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            return Path("/sys/fs/cgroup/memory") / path.strip("/"), "memory.limit_in_bytes"
        if not controllers and Path("/sys/fs/cgroup/cgroup.controllers").exists():
            return Path("/sys/fs/cgroup") / path.strip("/"), "memory.max"
    raise SystemExit("no memory control group: --limit needs one")


def measure(folder: Path, rounds: int, kinds: tuple[str, ...], groups: Groups) -> bool:
    """Run and print; return whether nothing was killed."""
    loopback.start_device = lambda running, name: start(running, name, groups.make(name))
    with loopback.deployment(folder, kinds) as running:
        processes = running.processes
        node = {name: running.folder / f"{name}.log" for name in kinds}
        node |= {n: running.device(n) / "agent.log" for n in kinds if n != "plain"}
        for name in kinds:
            said = node[name]
            processes.wait(name, lambda s=said: s.exists() and "Node ID" in s.read_text(), 300)
        samplers = {name: Sampler(processes.running[name].pid) for name in kinds}
        time.sleep(5)
        for sampler in samplers.values():
            sampler.start()
        time.sleep(10)
        idle = {name: len(sampler.samples) for name, sampler in samplers.items()}
        serve(running, rounds, len(kinds))
        for name, sampler in samplers.items():
            sampler.stop()
            show(name, sampler, idle[name])
        sound = [survived(running, name, groups) for name in kinds if name != "plain"]
    return all(sound)


def serve(running: loopback.Deployment, rounds: int, devices: int) -> None:
    """Run the example with so many devices; a run that they all decline is shown, and no error."""
    changes = {
        "task.clients": devices,
        "federation.rounds": rounds,
        "federation.clients_per_round": devices,
        "federation.min_replies": 1,
        "federation.eval_every": 1000,
        "federation.timeout": 300,
    }
    words = [w for k, v in changes.items() for w in ("--set", f"{k}={v}")]
    try:
        running.reticent("run", loopback.PLAN, "--run", running.run, *words, timeout=1500)
    except ProcessError as error:
        print(str(error).splitlines()[-1])


def show(name: str, sampler: Sampler, idle: int) -> None:
    """Print what a device took."""
    programs = sorted({program for found in sampler.samples for program in found})
    for program in [*programs, "all"]:
        sums = [
            sum(found.values()) if program == "all" else found.get(program, 0)
            for found in sampler.samples
        ]
        rest, most = statistics.median(sums[:idle]), max(sums[idle:])
        print(f"{name:6} {program:17} idle {rest / 1e6:4.0f} MB   peak {most / 1e6:4.0f} MB")
    apps = sorted(sampler.apps.values(), key=lambda app: app.first)
    if apps:
        lived = statistics.median(app.last - app.first for app in apps)
        computed = statistics.median(app.computed for app in apps)
        print(f"{name:6} message           {lived:5.1f} s, of them computing {computed:4.1f} s")
    gaps = [b.first - a.first for a, b in itertools.pairwise(apps)]
    if gaps:
        print(
            f"{name:6} round             {statistics.median(gaps):5.1f} s, least {min(gaps):.1f} s"
        )


def survived(running: loopback.Deployment, name: str, groups: Groups) -> bool:
    """Print what became of a device's rounds; return whether nothing was killed."""
    folder = running.device(name)
    diary = folder / "state" / "diary.jsonl"
    lines = [json.loads(line) for line in diary.read_text().splitlines()] if diary.exists() else []
    counts = Counter(line["what"] for line in lines)
    restarts = json.loads((folder / "agent.json").read_text())["restarts"]
    print(f"{name:6} rounds            {dict(counts)}, SuperNode restarted {restarts} times")
    for reason, count in Counter(x["reason"] for x in lines if x["what"] == "refused").items():
        print(f"{name:6} refused           {count} times: {reason}")
    kills = groups.kills(name)
    print(f"{name:6} memory            {kills} processes killed by the kernel")
    return not kills and not restarts


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--limit", type=int, default=0, help="MB (2^20 bytes) for each device")
    given = parser.parse_args()
    groups = Groups(given.limit << 20)
    with tempfile.TemporaryDirectory() as folder:
        try:
            sound = measure(Path(folder) / "all", given.rounds, tuple(given.kinds), groups)
        finally:
            groups.remove()
    sys.exit(0 if sound else 1)


if __name__ == "__main__":
    main()
