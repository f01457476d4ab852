"""Size, speed and error of every codec on two kinds of update.

Run with ``python benchmarks/codecs.py [--json] [--size N] [--repeats R]``. Sizes are lengths of
real payloads and times are medians of real calls on one thread.
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

from reticent.compression.codec import Codec, build_codec
from reticent.core.update import Vector

CHAINS = [
    (quantizer, *entropy)
    for quantizer in ("identity", "int8", "int4", "dither8", "dither4", "topk:0.1")
    for entropy in ((), ("ans",), ("zstd",))
]
PARTS = 8


@dataclass(frozen=True)
class Row:
    """Figures of one codec on one update; ``step`` is None where it comes from the data."""

    update: str
    codec: str
    step: float | None
    bytes_per_parameter: float
    ratio: float
    encode_ms: float
    decode_ms: float
    max_error: float


def updates(size: int) -> dict[str, tuple[Vector, float | None]]:
    """Return named updates, float32 ``(size,)``, each with its public step."""
    generator = np.random.default_rng(0)
    noise = generator.normal(size=size).astype(np.float32)
    heavy = generator.standard_t(2, size=size).astype(np.float32) * np.float32(1e-3)
    return {"gaussian, step sigma/2": (noise, 0.5), "heavy-tailed (t2)": (heavy, None)}


def blocks_of(size: int) -> tuple[int, ...]:
    """Return PARTS block lengths that sum to ``size``."""
    return tuple(len(part) for part in np.array_split(np.arange(size), PARTS))


def median_ms(call: Callable[[], object], repeats: int) -> float:
    """Return the median duration of ``call`` in milliseconds, after one call to warm up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def measure(name: str, codec: Codec, vector: Vector, step: float | None, repeats: int) -> Row:
    """Encode and decode ``vector`` with ``codec``."""
    blocks, generator = blocks_of(len(vector)), np.random.default_rng(1)
    payload = codec.encode(vector, blocks, generator, step)
    error = np.abs(codec.decode(payload, blocks).astype(np.float64) - vector)
    return Row(
        update=name,
        codec="+".join(codec.names),
        step=step if codec.error == "independent" else None,
        bytes_per_parameter=len(payload) / len(vector),
        ratio=vector.nbytes / len(payload),
        encode_ms=median_ms(lambda: codec.encode(vector, blocks, generator, step), repeats),
        decode_ms=median_ms(lambda: codec.decode(payload, blocks), repeats),
        max_error=float(error.max()),
    )


def measure_all(size: int, repeats: int) -> list[Row]:
    """Return one row for each update and codec."""
    return [
        measure(name, build_codec(chain), vector, step, repeats)
        for name, (vector, step) in updates(size).items()
        for chain in CHAINS
    ]


def table(rows: list[Row]) -> str:
    """Return ``rows`` as aligned text."""
    head = f"{'codec':<16}{'B/param':>9}{'ratio':>8}{'enc ms':>9}{'dec ms':>9}{'max err':>11}"
    lines: list[str] = []
    for update in dict.fromkeys(row.update for row in rows):
        lines += ["", update, head]
        lines += [
            f"{r.codec:<16}{r.bytes_per_parameter:>9.3f}{r.ratio:>8.2f}{r.encode_ms:>9.3f}"
            f"{r.decode_ms:>9.3f}{r.max_error:>11.3g}"
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
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure_all(args.size, args.repeats)
    print(json.dumps([asdict(row) for row in rows], indent=1) if args.json else table(rows))


if __name__ == "__main__":
    main()
