"""Fuzz every decoder of tests/decoders.py: executions, failures, slowest, peak memory.

    python benchmarks/fuzz.py --runs 1000000                       # outside CI; needs atheris
    python benchmarks/fuzz.py --runs 20000 --engine random         # without atheris
    python benchmarks/fuzz.py --only "plan as JSON" --runs 100000
    python benchmarks/fuzz.py --runs 1000000 --done fuzz.jsonl     # again: goes on where it ended

``atheris`` (libFuzzer with coverage of the Python sources; ``pip install atheris``) makes inputs
from the valid ones that reach new lines; ``random`` changes valid ones blindly. Each decoder runs
in a process of its own, with at most ``ADDRESS_SPACE`` bytes, so native allocations are bounded
too; a process that dies is a failure. Time is CPU time; traced memory is that of Python and numpy,
measured once in ``EVERY`` executions. A failing input is written to ``--crashes``. Ends with
status 1 if there was a failure. With ``--done`` a decoder that came through so many executions
without a failure is written to that file, and left out the next time.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

ADDRESS_SPACE = 8 << 30
EVERY = 16
LONGEST = 65536


class Trial:
    """Runs one decoder over and over, and keeps count."""

    def __init__(self, name: str, crashes: Path) -> None:
        """Make ready to decode."""
        import decoders  # pyright: ignore[reportMissingImports]

        self.decoder, self.crashes = decoders.DECODERS[name], crashes
        self.done = self.accepted = self.failures = 0
        self.slowest, self.peak = 0.0, 0
        self.reasons: set[str] = set()
        self._of = decoders

    def run(self, data: bytes) -> None:
        """Decode once; a failure is counted and its input kept."""
        traced = self.done % EVERY == 0
        if traced:
            tracemalloc.start()
        try:
            cost = self._of.tried(self.decoder, data) if traced else self._plain(data)
        except Exception as error:
            self._fail(data, f"{type(error).__name__}: {error}")
        else:
            self.accepted += cost.accepted
            self.slowest, self.peak = max(self.slowest, cost.seconds), max(self.peak, cost.bytes)
            if reason := self._of.exceeded(self.decoder, data, cost):
                self._fail(data, reason)
        finally:
            tracemalloc.stop()
        self.done += 1

    def _plain(self, data: bytes):
        began, accepted = time.thread_time(), True
        try:
            self.decoder.decode(data)
        except self.decoder.errors:
            accepted = False
        return self._of.Cost(time.thread_time() - began, 0, accepted)

    def _fail(self, data: bytes, reason: str) -> None:
        self.failures += 1
        kind = reason[:120]
        if kind not in self.reasons and len(self.reasons) < 20:
            self.reasons.add(kind)
            self.crashes.mkdir(parents=True, exist_ok=True)
            name = self.decoder.name.replace("/", "-").replace(" ", "-")
            (self.crashes / f"{name}-{len(self.reasons)}").write_bytes(data)
            print(f"{self.decoder.name}: {reason}", file=sys.stderr, flush=True)

    def report(self) -> None:
        """Print what was counted as one line of JSON."""
        keys = ("done", "accepted", "failures", "slowest", "peak")
        print(json.dumps({key: getattr(self, key) for key in keys}), flush=True)


def fuzz_randomly(trial: Trial, runs: int, seed: int) -> None:
    """Decode changed valid inputs, and now and then arbitrary bytes."""
    draws = random.Random(seed)
    for number in range(runs):
        if number % 10 == 9:
            data = draws.randbytes(draws.randint(0, 400))
        else:
            data = trial._of.mutated(trial.decoder, draws)
        trial.run(data)
    trial.report()


def fuzz_with_atheris(name: str, runs: int, seed: int, crashes: Path) -> None:
    """Decode what libFuzzer makes, and now and then a blind change of it is mended."""
    import atheris  # pyright: ignore[reportMissingImports]

    with atheris.instrument_imports(include=["reticent"]):  # pyright: ignore[reportAttributeAccessIssue]
        trial = Trial(name, crashes)
    corpus = crashes / "corpus" / name.replace("/", "-").replace(" ", "-")
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(trial.decoder.valid):
        (corpus / str(number)).write_bytes(data)

    def once(data: bytes) -> None:
        trial.run(trial.decoder.mended(data) if len(data) % 4 else data)
        if trial.done == runs:
            trial.report()

    flags = [f"-runs={runs + 100}", f"-seed={seed}", f"-max_len={LONGEST}", "-rss_limit_mb=8192"]
    atheris.Setup([sys.argv[0], *flags, "-verbosity=0", str(corpus)], once)
    atheris.Fuzz()


def work(name: str, args: argparse.Namespace) -> None:
    """Fuzz one decoder in this process."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    if args.engine == "atheris":
        fuzz_with_atheris(name, args.runs, args.seed, args.crashes)
    else:
        fuzz_randomly(Trial(name, args.crashes), args.runs, args.seed)


def apart(name: str, args: argparse.Namespace) -> dict[str, float] | None:
    """Fuzz one decoder in a process of its own; None when that died."""
    options = {"--runs": args.runs, "--seed": args.seed, "--engine": args.engine}
    given = [str(part) for pair in options.items() for part in pair]
    command = [sys.executable, __file__, "--work", name, "--crashes", str(args.crashes), *given]
    lines = subprocess.run(command, stdout=subprocess.PIPE, check=False).stdout.splitlines()
    found = [line for line in lines if line.startswith(b"{")]
    return json.loads(found[-1]) if found else None


def finished(path: Path | None, runs: int) -> set[str]:
    """Return the decoders that came through at least ``runs`` executions before."""
    if path is None or not path.exists():
        return set()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["decoder"] for row in rows if row["done"] >= runs}


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=["atheris", "random"], default="atheris")
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--crashes", type=Path, default=Path("fuzz-crashes"))
    parser.add_argument("--done", type=Path, help="decoders to leave out, and to add to")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work, args)
        return 0
    import decoders  # pyright: ignore[reportMissingImports]

    failed = False
    print("| decoder | executions | accepted | failures | slowest, ms | peak, KiB |")
    print("|---|---:|---:|---:|---:|---:|")
    over = finished(args.done, args.runs)
    for name in args.only or [name for name in decoders.DECODERS if name not in over]:
        row = apart(name, args)
        failed |= row is None or row["failures"] > 0
        if row is None:
            print(f"| {name} | the process died | | 1 | | |", flush=True)
            continue
        if args.done and not row["failures"]:
            with args.done.open("a") as file:
                file.write(json.dumps({"decoder": name, **row}) + "\n")
        counts = " | ".join(f"{row[key]:,}" for key in ("done", "accepted", "failures"))
        costs = f"{1000 * row['slowest']:.1f} | {row['peak'] / 1024:,.0f}"
        print(f"| {name} | {counts} | {costs} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
