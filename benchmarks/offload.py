"""Memory that training a large teacher takes on a CPU, with each ``teacher.offload``.

    TMPDIR=folder-on-a-disk python benchmarks/offload.py [--width 2048] [--layers 6]

Each way runs in a process of its own. "Private" is the growth of the memory that only swap could
take back (RssAnon), at its peak, over the process before there is a model. ``cpu`` (FSDP2) and
``zero`` (DeepSpeed, left out where it is not installed) are meant for a GPU, whose memory they
free: here they show what they cost the host.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from reticent.core.tasks import Examples
from reticent.server.means import Means
from reticent.server.public_training import train_public

WAYS = ("none", "disk", "cpu", "zero")
EPOCHS = 3


def teacher(width: int, layers: int) -> nn.Sequential:
    """Return a perceptron with about ``layers`` times ``width`` squared parameters."""
    torch.manual_seed(0)
    deep = [layer for _ in range(layers) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), *deep, nn.Linear(width, 4))


def examples() -> Examples:
    """Return 50 examples, which are one batch."""
    generator = torch.Generator().manual_seed(0)
    return Examples(torch.randn(50, 8, generator=generator), torch.arange(50) % 4)


def private_bytes() -> int:
    """Return the private resident memory of this process."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@contextmanager
def peak(found: dict[str, float]) -> Iterator[None]:
    """Put the largest growth of private memory while the block runs into ``found``."""
    before, done = private_bytes(), threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            found["private"] = max(found.get("private", 0), private_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def measure(way: str, width: int, layers: int) -> dict[str, float | str]:
    """Train in this process and return parameters, peak private memory and seconds."""
    torch.set_num_threads(1)
    train_public(teacher(8, 1), examples(), 1, 0.001, 0, "warm-up", means=Means(offload=way))
    found: dict[str, float] = {}
    began = time.monotonic()
    with peak(found):
        model = teacher(width, layers)
        train_public(model, examples(), EPOCHS, 0.001, 0, "large", means=Means(offload=way))
    seconds = time.monotonic() - began
    parameters = sum(p.numel() for p in model.parameters())
    return {"way": way, "parameters": parameters, "seconds": seconds, **found}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options.width, options.layers)))
        return
    print("| off-load | parameters | private memory at its peak | seconds |\n|---|---:|---:|---:|")
    ways = WAYS if importlib.util.find_spec("deepspeed") else WAYS[:-1]
    for way in ways:
        command = [sys.executable, __file__, "--way", way]
        command += ["--width", str(options.width), "--layers", str(options.layers)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        print(
            f"| {way} | {row['parameters']:,} | {row['private'] / 2**20:,.0f} MiB | "
            f"{row['seconds']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
