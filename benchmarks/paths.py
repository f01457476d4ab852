"""Which way to a layer's clipped sum is cheaper, and whether the rule of the sizes finds it.

    python benchmarks/paths.py [--batch N] [--repeats R] [--json]

For layers that are used at T positions of each example, with a weight of d inputs and p outputs
(linear layers of sequences, and convolutions as products of their columns): microseconds of the
norms and the weighted sum of N examples, from Gram matrices and with gradients written out, on one
thread, medians of calls that take turns. ``rule`` is the way that the product takes, from the sizes
alone: a choice by a measurement in the run would round differently from one run to the next, and
the same seed would not give the same model. ``lost`` is the time of that way over the faster one's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import torch

from reticent.privacy.clipping import positions
from reticent.privacy.clipping.positions import Positions
from reticent.privacy.clipping.terms import Owners

SHAPES = {
    "attention, text, 24k": (16, 32, 32),
    "sequence of 2": (2, 64, 64),
    "sequence of 8": (8, 128, 128),
    "sequence of 8, wide": (8, 512, 512),
    "sequence of 32": (32, 128, 128),
    "sequence of 32, wide": (32, 512, 512),
    "sequence of 128": (128, 256, 256),
    "1x1 convolution on 7x7": (49, 128, 128),
    "3x3 convolution on 28x28": (784, 9, 16),
    "3x3 convolution on 14x14": (196, 144, 32),
    "3x3 convolution on 7x7": (49, 576, 64),
    "3x3 convolution on 4x4": (16, 1152, 128),
}


@dataclass(frozen=True)
class Row:
    """One layer: its sizes, both ways' microseconds, and the rule."""

    layer: str
    positions: int
    inputs: int
    outputs: int
    gram: float
    written: float
    rule: str
    lost: float


def once(back: torch.Tensor, inputs: torch.Tensor, gram: bool) -> float:
    """Return the microseconds of one norm and one sum, by one way."""
    positions.GRAM_SHARE = 0 if gram else 1 << 40
    total, owners = torch.zeros(1, back.shape[2] * inputs.shape[2]), Owners((0, len(back)))
    begun = time.perf_counter()
    term = Positions(back, inputs)
    factors = (1.0 / term.squares(None).sqrt().clamp(min=1.0)).float()
    term.add_weighted(total, None, factors, owners)
    return (time.perf_counter() - begun) * 1e6


def measure(layer: str, batch: int, repeats: int) -> Row:
    """Time both ways by turns."""
    length, inputs, outputs = SHAPES[layer]
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(batch, length, inputs, generator=generator)
    g = torch.randn(batch, length, outputs, generator=generator)
    rule = "gram" if Positions(g, a).short else "written"
    share = positions.GRAM_SHARE
    try:
        times = [(once(g, a, True), once(g, a, False)) for _ in range(repeats + 2)][2:]
    finally:
        positions.GRAM_SHARE = share
    gram, written = (statistics.median(column) for column in zip(*times, strict=True))
    taken = gram if rule == "gram" else written
    return Row(layer, length, inputs, outputs, gram, written, rule, taken / min(gram, written))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16, help="examples, at least 1")
    parser.add_argument("--repeats", type=int, default=15, help="turns, at least 5")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if args.batch < 1 or args.repeats < 5:
        parser.error("--batch must be at least 1, --repeats at least 5")
    torch.set_num_threads(1)
    rows = [measure(layer, args.batch, args.repeats) for layer in SHAPES]
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    print("| layer | T | d | p | Gram, µs | written out, µs | rule | lost |")
    print("|---|---:|---:|---:|---:|---:|---|---:|")
    for r in rows:
        print(
            f"| {r.layer} | {r.positions} | {r.inputs} | {r.outputs} | {r.gram:.0f} | "
            f"{r.written:.0f} | {r.rule} | {r.lost:.2f}× |"
        )


if __name__ == "__main__":
    main()
