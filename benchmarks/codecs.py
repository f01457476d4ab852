"""Size, speed and error of every codec on three kinds of update.

Run with ``python benchmarks/codecs.py [--json] [--size N] [--repeats R]``. Sizes are lengths of
real payloads and times are medians of real calls on one thread. Two updates are drawn numbers of
N parameters; the third is what a client of the digits task sends, a clipped gradient with its
share of the noise.

``python benchmarks/codecs.py --noise`` measures instead what is left of a direction: the mean of
what clients of the digits task send, each a clipped gradient with all of the noise, decoded,
against the mean of the same gradients without noise and codec, as the cosine between the two.

``--coders`` times the two coders behind ``ans`` instead: constriction, and the one in plain Python
that takes its place on machines for which constriction has no wheel. Both give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

# Libraries read these when they are imported.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import numpy as np
import torch

from reticent.client.training import LocalTrainer, NoisyStep, student_model
from reticent.client.wire import noisy_step, quantization_step
from reticent.compression.codec import Codec, build_codec, coder
from reticent.compression.codec.build import ENTROPIES, PARAMETERS, QUANTIZERS
from reticent.compression.codec.histogram import measure as count
from reticent.compression.codec.histogram import read, write
from reticent.core.plan import parse_plan
from reticent.core.protocol import PROTOCOL, Constants, Order
from reticent.core.tasks import load_task
from reticent.core.update import Layout, Vector
from reticent.privacy.randomness import SeededRandomness

PLAIN = [(name,) for name in (*QUANTIZERS, *PARAMETERS)]
ROTATED = [("hadamard", name) for name in ("int1", "int2", "int4", "dither2", "dither4")]
CODED = [
    (*names, entropy)
    for names in (
        *((q,) for q in ("identity", "int4", "int8", "dither2", "dither3", "dither4", "dither8")),
        *((q,) for q in ("sign", "eden2", "topk", "lowrank")),
        ("hadamard", "int2"),
    )
    for entropy in ENTROPIES
]
CHAINS: list[tuple[str, ...]] = [*PLAIN, *ROTATED, *CODED]
PARTS = 8


@dataclass(frozen=True)
class Row:
    """Figures of one codec on one update; ``step`` is None where it comes from the data.

    ``relative_error`` is the L2 norm of the error over that of the update.
    """

    update: str
    codec: str
    step: float | None
    bytes_per_parameter: float
    ratio: float
    encode_ms: float
    decode_ms: float
    relative_error: float


@dataclass(frozen=True)
class Update:
    """One update to encode, with its layout and its public step."""

    vector: Vector
    layout: Layout
    step: float | None


def updates(size: int) -> dict[str, Update]:
    """Return named updates; those of drawn numbers are float32 ``(size,)``."""
    generator = np.random.default_rng(0)
    noise = generator.normal(size=size).astype(np.float32)
    heavy = generator.standard_t(2, size=size).astype(np.float32) * np.float32(1e-3)
    layout = layout_of(size)
    return {
        "gaussian, step sigma/2": Update(noise, layout, 0.5),
        "heavy-tailed (t2)": Update(heavy, layout, None),
        "a client's update (digits), step sigma/2": real_update(),
    }


def layout_of(size: int) -> Layout:
    """Return PARTS parameters, as matrices of 16 columns as far as they go, of ``size`` numbers."""
    lengths = [len(part) for part in np.array_split(np.arange(size), PARTS)]
    shapes = tuple((n // 16, 16) if n % 16 == 0 else (n,) for n in lengths)
    return Layout(tuple(f"part{i}" for i in range(PARTS)), shapes)


def real_update() -> Update:
    """Return the first update of client 0 of ten on the digits task, under aggregator trust."""
    given = ["task.name=digits", "task.clients=10", "federation.clients_per_round=10"]
    plan = parse_plan("", [*given, "privacy.noise_multiplier=1.0"])
    task = load_task(plan.task, plan.seed)
    trainer = LocalTrainer(plan, task, Constants(b"", np.zeros((0, 0), dtype=np.float32)))
    torch.manual_seed(0)
    start = trainer.layout.read(student_model(task, plan))
    denominator = plan.federation.sampling_rate * task.nominal_examples
    clip = 0.0 if plan.private is None else plan.private.clip
    step = noisy_step(plan, Order(PROTOCOL, "", plan.digest, 1, "", 1.0, denominator, clip))
    path = ("benchmark", 0, 1)
    vector = trainer.pseudo_gradient(start, task.client(0), step, SeededRandomness(0), path)
    return Update(vector, trainer.layout, quantization_step(step))


CLIENTS, DRAWS = 20, 3
NOISES = (0.0, 1.0, 3.0, 10.0)
"""Norm of a client's noise over that of its gradient, on average."""
TRIED: list[tuple[tuple[str, ...], float]] = [
    (("identity",), 1.0),
    (("dither4", "ans"), 0.5),
    (("dither4", "ans"), 4.0),
    (("hadamard", "int2", "ans"), 1.0),
    (("drive",), 1.0),
    (("sign",), 1.0),
    (("randk:0.05",), 1.0),
    (("topk:0.05",), 1.0),
    (("topk:0.01",), 1.0),
    (("lowrank:2",), 1.0),
]
"""Codecs, and their step over the standard deviation of a coordinate where they take a step."""


def gradients() -> tuple[list[Vector], Layout]:
    """Return clipped gradient sums of CLIENTS clients at the same model, without noise."""
    given = ["task.name=digits", f"task.clients={CLIENTS}", "privacy.noise_multiplier=1.0"]
    given += ["task.public_examples=200", "federation.sampling_rate=1.0"]
    plan = parse_plan("", [*given, f"federation.clients_per_round={CLIENTS}"])
    task = load_task(plan.task, plan.seed)
    trainer = LocalTrainer(plan, task, Constants(b"", np.zeros((0, 0), dtype=np.float32)))
    torch.manual_seed(0)
    start = trainer.layout.read(student_model(task, plan))
    step = NoisyStep(plan.private.clip if plan.private else None, 0.0, 1.0)
    source = SeededRandomness(0)
    found = [
        trainer.pseudo_gradient(start, task.client(c), step, source, ("benchmark", c, 1))
        for c in range(CLIENTS)
    ]
    return found, trainer.layout


@dataclass(frozen=True)
class Direction:
    """What of a direction a codec leaves: bits a parameter, and a cosine for each of NOISES."""

    codec: str
    bits: float
    cosines: tuple[float, ...]


def cosines() -> list[Direction]:
    """Return a row for each of TRIED; bits are those at the largest noise."""
    signals, layout = gradients()
    size = layout.size
    norm = float(np.mean([np.linalg.norm(s) for s in signals]))
    rows: list[Direction] = []
    for chain, step in TRIED:
        codec, found, bits = build_codec(chain, layout), list[float](), 0.0
        for noise in NOISES:
            cells = [
                _cosine(codec, layout, signals, noise * norm / size**0.5, step, draw)
                for draw in range(DRAWS)
            ]
            found.append(statistics.mean(cosine for cosine, _ in cells))
            bits = statistics.mean(size for _, size in cells)
        said = f", step {step:g} σ" if codec.error == "independent" else ""
        rows.append(Direction("+".join(codec.names) + said, bits, tuple(found)))
    return rows


def _cosine(
    codec: Codec, layout: Layout, signals: list[Vector], sigma: float, step: float, seed: int
) -> tuple[float, float]:
    """Return the cosine of the mean of decoded updates, and bits a parameter."""
    generator, wanted = np.random.default_rng(seed), np.sum(signals, axis=0, dtype=np.float64)
    total, size = np.zeros(layout.size), 0
    for signal in signals:
        sent = (signal + sigma * generator.normal(size=len(signal))).astype(np.float32)
        payload = codec.encode(sent, layout.blocks, generator, step * float(sent.std()))
        total += codec.decode(payload, layout.blocks)
        size += len(payload)
    cosine = total @ wanted / (np.linalg.norm(total) * np.linalg.norm(wanted))
    return float(cosine), 8 * size / (len(signals) * layout.size)


def noise_table(rows: list[Direction]) -> str:
    """Return the rows of :func:`cosines` as a Markdown table."""
    heads = ["codec", "bits", *(f"noise {n:g}×" for n in NOISES)]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for row in rows:
        cells = [row.codec, f"{row.bits:.2f}", *(f"{c:.3f}" for c in row.cosines)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def median_ms(
    call: Callable[[], object], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the median duration of ``call`` in milliseconds, after one call to warm up."""
    call()
    times = []
    for _ in range(repeats):
        start = clock()
        call()
        times.append(clock() - start)
    return 1e3 * statistics.median(times)


def measure(name: str, chain: tuple[str, ...], update: Update, repeats: int) -> Row:
    """Encode and decode ``update`` with the codec of ``chain``."""
    codec: Codec = build_codec(chain, update.layout)
    vector, blocks, step = update.vector, update.layout.blocks, update.step
    generator = np.random.default_rng(1)
    payload = codec.encode(vector, blocks, generator, step)
    error = codec.decode(payload, blocks).astype(np.float64) - vector
    shared = chain[0].endswith(":shared") or codec.error == "independent"
    return Row(
        update=name,
        codec="+".join(codec.names),
        step=step if shared else None,
        bytes_per_parameter=len(payload) / len(vector),
        ratio=vector.nbytes / len(payload),
        encode_ms=median_ms(lambda: codec.encode(vector, blocks, generator, step), repeats),
        decode_ms=median_ms(lambda: codec.decode(payload, blocks), repeats),
        relative_error=float(np.linalg.norm(error) / np.linalg.norm(vector.astype(np.float64))),
    )


def measure_all(size: int, repeats: int) -> list[Row]:
    """Return one row for each update and codec."""
    return [
        measure(name, chain, update, repeats)
        for name, update in updates(size).items()
        for chain in CHAINS
    ]


def coders(size: int, repeats: int) -> str:
    """Return CPU microseconds a symbol of each coder, for alphabets of 2, 15 and 255 symbols."""
    lines = [f"{'coder':<14}{'symbols':>8}{'push us':>10}{'pop us':>10}"]
    for alphabet in (2, 15, 255):
        drawn = np.random.default_rng(0).normal(alphabet / 2, alphabet / 8, size)
        symbols = np.clip(np.rint(drawn), 0, alphabet - 1).astype(np.uint8)
        probabilities = read(write(count(symbols, 256)), 256)[1]
        indices = np.unique(symbols, return_inverse=True)[1].astype(np.int32)
        for one in filter(None, (coder.constriction_coder(), coder.PYTHON)):
            words = one.push(indices, probabilities)
            push = median_ms(partial(one.push, indices, probabilities), repeats, time.thread_time)
            pop = median_ms(partial(one.pop, words, size, probabilities), repeats, time.thread_time)
            each = f"{1e3 * push / size:>10.4f}{1e3 * pop / size:>10.4f}"
            lines.append(f"{one.name:<14}{alphabet:>8}{each}")
    return "\n".join(lines)


def table(rows: list[Row]) -> str:
    """Return ``rows`` as aligned text."""
    head = f"{'codec':<20}{'B/param':>9}{'ratio':>8}{'enc ms':>9}{'dec ms':>9}{'rel err':>11}"
    lines: list[str] = []
    for update in dict.fromkeys(row.update for row in rows):
        lines += ["", update, head]
        lines += [
            f"{r.codec:<20}{r.bytes_per_parameter:>9.3f}{r.ratio:>8.2f}{r.encode_ms:>9.3f}"
            f"{r.decode_ms:>9.3f}{r.relative_error:>11.3g}"
            for r in rows
            if r.update == update
        ]
    return "\n".join(lines[1:])


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
    parser.add_argument("--size", type=at_least(PARTS), default=20_000, help="parameters")
    parser.add_argument("--repeats", type=at_least(5), default=21, help="timed calls, at least 5")
    parser.add_argument("--noise", action="store_true", help="cosines under noise instead")
    parser.add_argument("--coders", action="store_true", help="time the coders behind ans")
    args = parser.parse_args()
    if args.coders:
        print(coders(args.size, args.repeats))
        return
    torch.set_num_threads(1)
    if args.noise:
        found = cosines()
        text = json.dumps([asdict(row) for row in found], indent=1)
        print(text if args.json else noise_table(found))
        return
    rows = measure_all(args.size, args.repeats)
    print(json.dumps([asdict(row) for row in rows], indent=1) if args.json else table(rows))


if __name__ == "__main__":
    main()
