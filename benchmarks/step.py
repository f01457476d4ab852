"""Speed of a client's private training step: ours, Opacus' hooks, Opacus' ghost norms, no privacy.

    python benchmarks/step.py [--json FILE] [--repeats R] [--only MODEL...]

A step is forward, backward, clipping, noise in every coordinate and the update of the weights.
Contenders take turns of eight steps in one process on one thread; times are medians of the CPU
time of the process, so that neighbours on the machine count for little, and ratios are over
"ours". Noise is what each library draws: ours the simulation's, by float32 Box-Muller, Opacus'
those of torch.
``limit`` is the time that the step's matrix products (forward and backward, by torch's counter)
take at the rate of a large matrix product on the same thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

# Libraries read these when they are imported.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.layers import DPGRU
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from reticent.core.sequences import Attention, LastGRU, OneHot
from reticent.core.update import Layout
from reticent.privacy.clipping import ClippedGradients
from reticent.privacy.randomness import SeededRandomness

CLIP, NOISE, RATE = 0.5, 1.0, 0.1
BATCHES = (10, 36, 256)
IN_A_ROW = 8
SYMBOLS, LENGTH = 36, 40

Step = Callable[[], object]


class LastDPGRU(nn.Module):
    """Opacus' GRU in place of torch's, which Opacus does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = DPGRU(SYMBOLS, 64, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the last hidden state."""
        return self.gru(x)[0][:, -1]


def cnn(norm: bool) -> nn.Module:
    def group(channels: int) -> list[nn.Module]:
        return [nn.GroupNorm(channels // 4, channels)] if norm else []

    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, 2, 1), *group(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, 2, 1), *group(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(1568, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def recurrent(layer: nn.Module) -> nn.Module:
    return nn.Sequential(OneHot(SYMBOLS), layer, nn.Linear(64, SYMBOLS))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)),
    "cnn": lambda: cnn(norm=False),
    "cnn-gn": lambda: cnn(norm=True),
    "gru": lambda: recurrent(LastGRU(SYMBOLS, 64)),
    "attention": lambda: Attention(LENGTH, SYMBOLS, 48),
}
FOR_OPACUS = {"gru": lambda: recurrent(LastDPGRU())}


@dataclass(frozen=True)
class Row:
    """Median CPU milliseconds of one step; None where a library does not take the model."""

    model: str
    parameters: int
    batch: int
    method: str
    ours_ms: float
    noise_ms: float
    hooks_ms: float | None
    ghost_ms: float | None
    plain_ms: float
    limit_ms: float


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


def batch_of(kind: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    if kind in ("gru", "attention"):
        symbols = torch.randint(SYMBOLS, (count, LENGTH), generator=draws)
        return symbols.float(), symbols[:, 0]
    inputs = torch.randn(count, 1, 28, 28, generator=draws)
    return inputs, torch.randint(10, (count,), generator=draws)


def ours(kind: str, batch: int) -> tuple[Step, Step, str]:
    """Return our step, its noise alone, and the way gradients are clipped."""
    model = MODELS[kind]()
    layout, inputs = Layout.of(model), batch_of(kind, batch)
    gradients = ClippedGradients(model, layout, shape=tuple(inputs[0].shape[1:]))
    weights, randomness = layout.read(model), SeededRandomness(0)

    def noise() -> np.ndarray:
        return randomness.stream("noise", "run", 0, 1, 0).normal(layout.size)

    def step() -> None:
        layout.write(model, weights)
        total, drawn = gradients.sum(*inputs, loss_of, CLIP), noise()
        drawn *= NOISE * CLIP
        drawn += total
        drawn *= RATE / batch
        np.subtract(weights, drawn, out=weights, casting="same_kind")

    return step, noise, gradients.method


def opacus_hooks(kind: str, batch: int) -> Step:
    model = GradSampleModule(FOR_OPACUS.get(kind, MODELS[kind])().train(), loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=RATE),
        noise_multiplier=NOISE,
        max_grad_norm=CLIP,
        expected_batch_size=batch,
        loss_reduction="sum",
    )
    inputs, labels = batch_of(kind, batch)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model(inputs), labels).backward()
        optimizer.step()

    return step


def opacus_ghost(kind: str, batch: int) -> Step:
    model = GradSampleModuleFastGradientClipping(
        FOR_OPACUS.get(kind, MODELS[kind])().train(),
        loss_reduction="sum",
        max_grad_norm=CLIP,  # pyright: ignore[reportArgumentType]
        use_ghost_clipping=True,
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(model.parameters(), lr=RATE),
        noise_multiplier=NOISE,
        max_grad_norm=CLIP,
        expected_batch_size=batch,
        loss_reduction="sum",
    )
    loss = DPLossFastGradientClipping(model, optimizer, nn.CrossEntropyLoss(reduction="sum"), "sum")
    inputs, labels = batch_of(kind, batch)

    def step() -> None:
        optimizer.zero_grad()
        loss(model(inputs), labels).backward()
        optimizer.step()

    return step


def plain(kind: str, batch: int) -> Step:
    model = MODELS[kind]().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE / batch)
    inputs, labels = batch_of(kind, batch)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model(inputs), labels).backward()
        optimizer.step()

    return step


def usable(make: Callable[[str, int], Step], kind: str, batch: int) -> Step | None:
    """Return a step of a library that runs once; None if it does not take the model."""
    try:
        step = make(kind, batch)
        step()
    except (NotImplementedError, RuntimeError, ValueError, AttributeError, TypeError):
        return None
    return step


def medians_ms(steps: list[Step | None], repeats: int) -> list[float | None]:
    """Return the median CPU milliseconds of each step; they take turns, after a first round.

    A turn is :data:`IN_A_ROW` steps, as in training, where no other program comes between them.
    """
    taken: list[list[float]] = [[] for _ in steps]
    for turn in range(repeats + 1):
        for step, times in zip(steps, taken, strict=True):
            began = time.process_time()
            if step is not None:
                for _ in range(IN_A_ROW):
                    step()
            if turn:
                times.append((time.process_time() - began) / IN_A_ROW)
    medians = [1e3 * statistics.median(times) for times in taken]
    return [None if step is None else ms for step, ms in zip(steps, medians, strict=True)]


def product_rate(size: int = 768, repeats: int = 7) -> float:
    """Return the GFLOP/s of one float32 matrix product on this thread."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    (ms,) = medians_ms([lambda: a @ b], repeats)
    return 2 * size**3 / (ms or 1.0) / 1e6


def measure(kind: str, batch: int, rate: float, repeats: int) -> Row:
    torch.manual_seed(0)
    step, noise, method = ours(kind, batch)
    peers = [usable(make, kind, batch) for make in (opacus_hooks, opacus_ghost)]
    bare = plain(kind, batch)
    with FlopCounterMode(display=False) as counter:
        bare()
    ours_ms, noise_ms, hooks, ghost, plain_ms = medians_ms([step, noise, *peers, bare], repeats)
    return Row(
        model=kind,
        parameters=Layout.of(MODELS[kind]()).total,
        batch=batch,
        method=method,
        ours_ms=ours_ms or 0.0,
        noise_ms=noise_ms or 0.0,
        hooks_ms=hooks,
        ghost_ms=ghost,
        plain_ms=plain_ms or 0.0,
        limit_ms=counter.get_total_flops() / rate / 1e6,
    )


def table(rows: list[Row]) -> str:
    def cells(ms: float | None, row: Row) -> str:
        return f"{'-':>9}{'-':>7} " if ms is None else f"{ms:>9.2f}{ms / row.ours_ms:>7.2f}x"

    head = f"{'model':<10}{'params':>8}{'batch':>6} {'by':<6}{'ours':>8}{'noise':>7}"
    names = ("hooks", "ghost", "plain", "limit")
    lines = [head + "".join(f"{name:>9}{'/ours':>8}" for name in names)]
    for r in rows:
        times = (r.hooks_ms, r.ghost_ms, r.plain_ms, r.limit_ms)
        start = f"{r.model:<10}{r.parameters:>8,}{r.batch:>6} {r.method:<6}"
        lines.append(
            f"{start}{r.ours_ms:>8.2f}{r.noise_ms:>7.2f}" + "".join(cells(ms, r) for ms in times)
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--repeats", type=int, default=7, help="timed turns of each, at least 5")
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=list(MODELS))
    args = parser.parse_args()
    if args.repeats < 5:
        parser.error(f"--repeats {args.repeats}: must be at least 5")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Full backward hook is firing")
    rate = product_rate()
    print(f"one thread; milliseconds of CPU time; matrix products {rate:.0f} GFLOP/s")
    rows = [measure(kind, batch, rate, args.repeats) for kind in args.only for batch in BATCHES]
    print(table(rows))
    if args.json:
        found = {"gflops": rate, "threads": 1, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
