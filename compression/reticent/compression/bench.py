"""Measured latency and size of models, for comparison side by side.

QNNPACK starts its own threads at the first integer prediction of a process, as many as torch has
then, and keeps waking them up even after torch is set to one thread (two to three times slower on
small models). So measure before any other integer prediction, or call ``torch.set_num_threads(1)``
before the first one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import safetensors.torch
import torch
from torch import nn

from reticent.core.errors import DataError

from .deployable import Spec
from .packing import pack

Model = Callable[[torch.Tensor], torch.Tensor]

_WARMUP = 3


@dataclass(frozen=True)
class Latency:
    """Time of one prediction in microseconds: one example, one thread.

    Attributes:
        median_us: Median over the repeats.
        p95_us: 95th percentile over the repeats (nearest rank).
    """

    median_us: float
    p95_us: float


def side_by_side(
    rows: Mapping[str, tuple[Model, torch.Tensor]], repeats: int = 100
) -> dict[str, Latency]:
    """Time several models, taking turns call by call in this process.

    Taking turns spreads whatever else the machine does evenly over the models, so the rows can be
    compared with each other even where they cannot be compared with another day's.

    Each is timed on one example, on one thread, after a few untimed calls.

    Raises:
        DataError: If a row's inputs are not one example (float32 ``(1, *input_shape)``), naming the
            row, or ``repeats`` is below 1.
    """
    if repeats < 1:
        raise DataError(f"repeats={repeats}: must be at least 1")
    for name, (_, inputs) in rows.items():
        if inputs.dim() < 1 or len(inputs) != 1:
            raise DataError(f"{name}: inputs have shape {tuple(inputs.shape)}: must be one example")
    times: dict[str, list[float]] = {name: [] for name in rows}
    with _one_thread(), torch.no_grad():
        for turn in range(_WARMUP + repeats):
            for name, (model, inputs) in rows.items():
                elapsed = _timed(model, inputs)
                if turn >= _WARMUP:
                    times[name].append(elapsed)
    return {name: summary(values) for name, values in times.items()}


def size_on_disk(model: nn.Module | Spec) -> int:
    """Return the bytes of the safetensors file that holds the model's arrays.

    Of an integer model that is the ``model.safetensors`` of its artifact, packed.
    """
    arrays = model.state_dict() if isinstance(model, nn.Module) else pack(model.arrays)
    return len(safetensors.torch.save({n: v.contiguous().clone() for n, v in arrays.items()}))


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _timed(model: Model, inputs: torch.Tensor) -> float:
    start = time.perf_counter_ns()
    model(inputs)
    return (time.perf_counter_ns() - start) / 1000


def summary(times: list[float]) -> Latency:
    """Return median and 95th percentile of times in microseconds."""
    ordered = sorted(times)
    rank = -(-95 * len(ordered) // 100) - 1
    return Latency(statistics.median(ordered), ordered[rank])
