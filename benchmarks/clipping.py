"""Speed of clipped gradient sums: ghost norms against Opacus' hooks, and per-layer against flat.

Run with ``python benchmarks/clipping.py [--json] [--repeats R]``. Times are medians of calls that
take turns in one process on one thread; a ratio compares two medians of the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

# Libraries read these when they are imported.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from reticent.compression.fold import fold_batchnorm
from reticent.core.models import student
from reticent.core.update import Layout
from reticent.privacy.clipping import ClippedGradients

SHAPE, CLASSES, CLIP = (1, 28, 28), 10, 0.5
BATCHES = (6, 8, 32, 64)
KINDS = ("mlp", "tiny", "tiny-gn", "wide")


@dataclass(frozen=True)
class Row:
    """Times of one sum; ``speedup`` is hooks / ghost, ``difference`` is relative to the norm."""

    student: str
    parameters: int
    kept: int
    batch: int
    hooks_ms: float
    ghost_ms: float
    per_layer_ms: float
    speedup: float
    difference: float


def model_of(kind: str) -> nn.Sequential:
    """Return a student without batch normalisation; ``mlp`` has 101,770 parameters."""
    torch.manual_seed(0)
    if kind == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, CLASSES))
    model = student(kind, SHAPE, CLASSES)
    if not isinstance(model, nn.Sequential):
        raise TypeError(f"{kind} is a {type(model).__name__}: must be an nn.Sequential")
    return fold_batchnorm(model.eval())


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the sum of the examples' losses."""
    return F.cross_entropy(logits, labels, reduction="sum")


def medians_ms(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    """Return the median milliseconds of each call; they take turns, after one round to warm up."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 1):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if turn:
                taken.append(time.perf_counter() - start)
    return [1e3 * statistics.median(taken) for taken in times]


def measure(kind: str, sparsity: float, batch: int, repeats: int) -> Row:
    """Compare the methods on one student, mask and batch size."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(batch, *SHAPE, generator=generator)
    labels = torch.randint(0, CLASSES, (batch,), generator=generator)
    total = Layout.of(model_of(kind)).total
    mask = np.random.default_rng(0).random(total) >= sparsity
    layout = Layout.of(model_of(kind), mask)

    def sums(gradients: ClippedGradients) -> Callable[[], np.ndarray]:
        return lambda: gradients.sum(inputs, labels, cross_entropy, CLIP)

    hooks = sums(ClippedGradients(model_of(kind), layout, method="hooks"))
    ghost = sums(ClippedGradients(model_of(kind), layout, method="ghost"))
    layers = sums(ClippedGradients(model_of(kind), layout, clipping="per-layer"))
    first = hooks()
    hooks_ms, ghost_ms, layers_ms = medians_ms([hooks, ghost, layers], repeats)
    return Row(
        student=kind,
        parameters=total,
        kept=layout.size,
        batch=batch,
        hooks_ms=hooks_ms,
        ghost_ms=ghost_ms,
        per_layer_ms=layers_ms,
        speedup=hooks_ms / ghost_ms,
        difference=float(np.linalg.norm(first - ghost()) / np.linalg.norm(first)),
    )


def table(rows: list[Row]) -> str:
    """Return ``rows`` as aligned text."""
    lines = [
        f"{'student':<9}{'params':>9}{'kept':>9}{'batch':>7}{'hooks ms':>10}{'ghost ms':>10}"
        f"{'layers ms':>11}{'speed-up':>10}{'rel. diff':>11}"
    ]
    lines += [
        f"{r.student:<9}{r.parameters:>9,}{r.kept:>9,}{r.batch:>7}{r.hooks_ms:>10.2f}"
        f"{r.ghost_ms:>10.2f}{r.per_layer_ms:>11.2f}{r.speedup:>9.2f}x{r.difference:>11.1e}"
        for r in rows
    ]
    return "\n".join(lines)


def at_least(least: int) -> Callable[[str], int]:
    """Return an argument type: an integer of at least ``least``."""

    def parse(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least}")
        return int(text)

    return parse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--repeats", type=at_least(5), default=15, help="timed calls, at least 5")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        measure(kind, sparsity, batch, args.repeats)
        for kind in KINDS
        for sparsity in (0.0, 0.5)
        for batch in BATCHES
    ]
    print(json.dumps([asdict(row) for row in rows], indent=1) if args.json else table(rows))


if __name__ == "__main__":
    main()
