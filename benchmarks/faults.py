"""Faults at length, over real TLS, SuperLinks and devices on loopback; short forms are in tests.

    python benchmarks/faults.py kills --kills 60 --rounds 30
    python benchmarks/faults.py network --faults 300 --rounds 50
    python benchmarks/faults.py nodes --nodes 200

``kills`` sends SIGKILL to the ServerApp, the SuperLink and devices at random moments of a run and
compares the final model with that of a simulation that nothing happened to. ``network`` puts a
proxy before each of five devices which cuts, stalls, slows, duplicates and alters what passes,
takes the network from two of them again and again, and compares the final model with that of a
simulation in which each round has the updates of just those devices that took part. ``nodes``
connects many nodes at once to one SuperLink: real requests over TLS with node keys, without
SuperNodes or training (``tests/swarm.py`` says what is simulated).

Prints a table, writes JSON to ``--out``, and ends with status 1 if something does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

for place in ("tests", "examples/deployment"):
    sys.path.insert(0, str(Path(__file__).parents[1] / place))

NAMES = ("device0", "device1")
Found = dict[str, Any]


def kills(folder: Path, args: argparse.Namespace) -> Found:
    """Kill processes over a run, and tell what became of it."""
    import federations  # pyright: ignore[reportMissingImports]
    from kills import Killer, points  # pyright: ignore[reportMissingImports]

    from reticent.core.run import Run
    from reticent.simulations.simulate import simulate

    plan = federations.plan_of(args.rounds, "federation.timeout=60", "federation.retries=9")
    undisturbed = simulate(plan, folder / "simulated").read_summary()["model"]
    commits: list[float] = []
    began = time.monotonic()
    with federations.federation(folder, NAMES) as running:
        made = federations.operation(
            running, plan, lambda operation, metrics: commits.append(time.monotonic() - began)
        )
        schedule = points(args.seed, args.kills, args.rounds, len(NAMES), args.span)
        killer = Killer(schedule, made, running, NAMES, lambda: len(commits))
        began = time.monotonic()
        killer.start()
        try:
            made.serve()
        finally:
            killer.end()
        accounts = federations.accounts(running, NAMES)
    run = Run(folder / "run")
    metrics = run.read_metrics()
    every = list(range(1, args.rounds + 1))
    return {
        "kills": len(killer.done),
        "missed": len(killer.missed),
        "rounds": args.rounds,
        "seconds": round(commits[-1], 1),
        "by_target": {
            target: recoveries([k for k in killer.done if k.point.target == target], commits)
            for target in sorted({kill.point.target for kill in killer.done})
        },
        "dropped": dict(sum((Counter(m["dropped"]) for m in metrics), Counter())),
        "charges": {name: account["charges"] for name, account in accounts.items()},
        "holds": {
            "every kill was done": not killer.missed,
            "every round once": [m["round"] for m in metrics] == every,
            "the model of an undisturbed run": run.read_summary()["model"] == undisturbed,
            "each device charged each round once": all(
                account["charges"] == args.rounds for account in accounts.values()
            ),
            "each release charged": all(
                account["released"] <= set(every) for account in accounts.values()
            ),
        },
    }


def network(folder: Path, args: argparse.Namespace) -> Found:
    """Run over a network that fails all the time, and tell what became of it."""
    import federations  # pyright: ignore[reportMissingImports]
    import storms  # pyright: ignore[reportMissingImports]
    from faulty_network import Proxy  # pyright: ignore[reportMissingImports]

    from reticent.core.run import Run

    names = tuple(f"device{i}" for i in range(args.devices))
    clients = args.devices
    plan = federations.plan_of(
        args.rounds,
        *(f"task.clients={clients}", f"federation.clients_per_round={clients}"),
        *(f"federation.min_replies={args.quorum}", f"federation.timeout={args.timeout}"),
        *(f"federation.enough={args.quorum}", "federation.retries=9", "engine.workers=1"),
    )
    commits: list[float] = []
    proxies: list[Any] = []
    with ExitStack() as stack:

        def address(index: int, port: int) -> str:
            proxies.append(stack.enter_context(Proxy(port, args.seed + index)))
            return f"127.0.0.1:{proxies[-1].port}"

        running = stack.enter_context(federations.federation(folder, names, address))
        participants = federations.Participants(running)

        def after(operation: Any, metrics: Found) -> None:
            commits.append(time.monotonic() - began)
            participants.note()

        schedule = storms.gusts(args.seed, args.faults, args.rounds, clients, args.span)
        flapping = range(round(args.flapping * clients))
        storm = storms.Storm(schedule, proxies, flapping, lambda: len(commits), args.seed)
        began, resumed = time.monotonic(), 0
        storm.start()
        try:
            while not served(federations.operation(running, plan, after, resumed > 0)):
                resumed += 1
        finally:
            storm.end()
        restarts = sum(restarts_of(running.device(name)) for name in names)
        accounts = federations.accounts(running, names)
    metrics = Run(folder / "run").read_metrics()
    befell = sum((proxy.befell for proxy in proxies), Counter())
    rounds = [{names.index(name) for name in used} for used in participants.rounds]
    used = {name: {n for n, u in enumerate(participants.rounds, 1) if name in u} for name in names}
    sizes = Counter(len(used) for used in rounds)
    every = list(range(1, args.rounds + 1))
    return {
        "injected": storm.injected,
        "befell": dict(befell),
        "flaps": storm.flaps,
        "rounds": args.rounds,
        "seconds": round(commits[-1], 1),
        "restarts": restarts,
        "resumed": resumed,
        "dropped": dict(sum((Counter(m["dropped"]) for m in metrics), Counter())),
        "devices in a round": {str(size): sizes[size] for size in sorted(sizes)},
        "charges": {name: accounts[name]["charges"] for name in names},
        "used": {name: len(used[name]) for name in names},
        "holds": {
            "every round once": [m["round"] for m in metrics] == every,
            "replies counted are the devices that took part": [m["replies"] for m in metrics]
            == [len(used) for used in rounds],
            "the model of a simulation with the same devices in each round": Run(
                folder / "run"
            ).read_summary()["model"]
            == storms.replay(plan, folder / "replayed", rounds),
            "no device was charged a round twice": all(
                account["charges"] <= args.rounds for account in accounts.values()
            ),
            "each used update was released and charged": all(
                used[name] <= accounts[name]["released"]
                and len(accounts[name]["released"]) <= accounts[name]["charges"]
                for name in names
            ),
        },
    }


def nodes(folder: Path, args: argparse.Namespace) -> Found:
    """Connect many nodes to one SuperLink, let all answer in a few rounds, and measure."""
    import federations  # pyright: ignore[reportMissingImports]
    import swarm  # pyright: ignore[reportMissingImports]

    from reticent.client.agent import free_port
    from reticent.server.certificates import utc_now
    from reticent.server.flower import Flower, SuperLink
    from reticent.server.home import create_home
    from reticent.simulations.grid import enter_task

    enter_task()
    os.environ["PYTHONPATH"] = str(federations.TESTS)  # for `swarm_server`
    home = create_home(folder / "server", ["127.0.0.1"], free_port(), utc_now())
    authority, out = home.tls / "ca.crt", folder / "rounds.jsonl"
    keys = [swarm.new_key() for _ in range(args.nodes)]
    link = SuperLink(home, home.log)
    try:
        link.wait_until_ready()
        meter = Meter(federations.processes_with(str(home.database))[0])
        empty = meter.megabytes()
        swarm.register(home.address, authority, keys)
        crowd = swarm.Swarm(
            [swarm.FleetNode(home.address, authority, key) for key in keys], size=args.up
        )
        crowd.start()
        until(lambda: len(crowd.seconds["activate"]) == args.nodes)
        begun = crowd.marked()
        idle_share = meter.share(args.idle)
        idle, idle_memory = crowd.seconds["check-in"][begun["check-in"] :], meter.megabytes()
        begun = crowd.marked()
        config = {"nodes": args.nodes, "rounds": args.rounds, "size": args.down, "out": out}
        Flower(home).submit(swarm.app(folder / "app", config), {})
        until(out.is_file)
        busy_share = meter.share_until(lambda: len(lines(out)) == args.rounds)
        busy = crowd.seconds["check-in"][begun["check-in"] :]
        crowd.end()
        memory = meter.megabytes(peak=True)
    finally:
        link.stop()
    told = lines(out)
    return {
        "nodes": args.nodes,
        "bytes": f"{args.down} down, {args.up} up",
        "tried again": crowd.retries,
        "activate s": quantiles(crowd.seconds["activate"]),
        "check-in s, idle": quantiles(idle),
        "check-in s, in rounds": quantiles(busy),
        "fetch s": quantiles(crowd.seconds["fetch"]),
        "answer s": quantiles(crowd.seconds["answer"]),
        "round s": [round(line["seconds"], 1) for line in told],
        "SuperLink MB": {"empty": empty, "idle": idle_memory, "peak": memory},
        "SuperLink cores": {"idle": idle_share, "in rounds": busy_share},
        "holds": {
            f"no node failed {crowd.failures[:1] or ''}".rstrip(): not crowd.failures,
            "each round has each node's reply once": len(told) == args.rounds
            and all(line["authors"] == line["asked"] for line in told)
            and all(len(line["asked"]) == args.nodes for line in told),
        },
    }


class Meter:
    """Reads a process's memory and processor time."""

    def __init__(self, pid: int) -> None:
        """Watch ``pid``."""
        self._proc = Path(f"/proc/{pid}")

    def megabytes(self, peak: bool = False) -> int:
        """Return what is resident, or was at most."""
        word = "VmHWM:" if peak else "VmRSS:"
        lines = (self._proc / "status").read_text().splitlines()
        return round(int(next(line for line in lines if line.startswith(word)).split()[1]) / 1000)

    def share(self, seconds: float) -> float:
        """Return how many cores are used on average in the next so many seconds."""
        end = time.monotonic() + seconds
        return self.share_until(lambda: time.monotonic() > end)

    def share_until(self, happened: Callable[[], bool]) -> float:
        """Return how many cores are used on average until something happened."""
        began, before = time.monotonic(), self._ticks()
        until(happened)
        used = (self._ticks() - before) / os.sysconf("SC_CLK_TCK")
        return round(used / (time.monotonic() - began), 2)

    def _ticks(self) -> int:
        fields = (self._proc / "stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])


def until(happened: Callable[[], bool], seconds: float = 900.0) -> None:
    """Wait until something has happened."""
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {seconds:g} s")
        time.sleep(0.1)


def lines(path: Path) -> list[Found]:
    """Return the whole lines of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines(True) if line[-1] == "\n"]


def quantiles(values: list[float]) -> Found:
    """Return how many there are, their median, 99th percentile and largest."""
    ordered = sorted(values)
    names = {"p50": 0.5, "p99": 0.99, "most": 1.0}
    at = {name: ordered[min(len(ordered) - 1, int(q * len(ordered)))] for name, q in names.items()}
    return {"of": len(ordered), **{name: round(value, 3) for name, value in at.items()}}


def served(operation: Any) -> bool:
    """Serve a run; return whether it came to its end, or too few devices were connected."""
    from reticent.core.errors import NetworkError

    try:
        operation.serve()
    except NetworkError as error:
        print(f"the operator resumes: {error}")
        return False
    return True


def restarts_of(folder: Path) -> int:
    """Return how often a device's agent started its SuperNode again."""
    return json.loads((folder / "agent.json").read_text())["restarts"]


def recoveries(done: list[Any], commits: list[float]) -> Found:
    """Return how long it took from each kill until the next round was committed."""
    waits = [next((c - k.at for c in commits if c > k.at), None) for k in done]
    known = sorted(wait for wait in waits if wait is not None)
    median = round(statistics.median(known), 1) if known else None
    return {"kills": len(done), "median": median, "most": round(known[-1], 1) if known else None}


def show(found: Found) -> None:
    """Print what was found."""
    for key, value in found.items():
        if key == "by_target":
            print(
                f"\n{'killed':12}{'times':>6}{'median s':>10}{'most s':>8}   until the next round"
            )
            for target, row in value.items():
                print(f"{target:12}{row['kills']:6}{row['median']:10}{row['most']:8}")
            print()
        elif key != "holds":
            print(f"{key:12} {value}")
    for what, holds in found["holds"].items():
        print(f"{'yes' if holds else 'NO':4}{what}")


def main() -> int:
    """Run one kind of fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    killing = kinds.add_parser("kills")
    killing.add_argument("--kills", type=int, default=60)
    killing.add_argument("--rounds", type=int, default=30)
    killing.add_argument("--span", type=float, default=5.0, help="longest delay in seconds")
    storming = kinds.add_parser("network")
    storming.add_argument("--faults", type=int, default=300)
    storming.add_argument("--rounds", type=int, default=50)
    storming.add_argument("--devices", type=int, default=5)
    storming.add_argument("--quorum", type=int, default=3)
    storming.add_argument("--flapping", type=float, default=0.4, help="share of the devices")
    storming.add_argument("--timeout", type=float, default=30.0, help="of a round, in seconds")
    storming.add_argument("--span", type=float, default=4.0, help="longest delay in seconds")
    crowding = kinds.add_parser("nodes")
    crowding.add_argument("--nodes", type=int, default=200)
    crowding.add_argument("--rounds", type=int, default=3)
    crowding.add_argument("--idle", type=float, default=30.0, help="seconds without a round")
    crowding.add_argument("--up", type=int, default=5200, help="bytes of an update")
    crowding.add_argument("--down", type=int, default=6800, help="bytes of a broadcast")
    for kind in (killing, storming, crowding):
        kind.add_argument("--seed", type=int, default=0)
        kind.add_argument("--out", type=Path, help="file for the figures as JSON")
        kind.add_argument("--keep", type=Path, help="new folder to work in, which is kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        folder = args.keep or Path(temporary) / "all"
        folder.mkdir(parents=True)
        found = {"kills": kills, "network": network, "nodes": nodes}[args.kind](folder, args)
    show(found)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(found["holds"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
