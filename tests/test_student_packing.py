"""Packed weights: smaller, exact, and refused when malformed."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reticent.compression import packing
from reticent.compression.packing import pack, unpack
from reticent.core.errors import ArtifactError
from reticent.core.seeds import numpy_generator

ROWS, COLUMNS = 40, 50


def weights(bits: int, zeros: float = 0.0) -> torch.Tensor:
    """Uniform integers of a grid of ``bits`` bits, a share of them pruned, int8 ``(40, 50)``."""
    generator = numpy_generator(3, "packing", bits)
    top = max(1, 2 ** (bits - 1) - 1)
    levels = np.array([-1, 1]) if bits == 1 else np.arange(-top, top + 1)
    values = generator.choice(levels, (ROWS, COLUMNS))
    values[generator.random((ROWS, COLUMNS)) < zeros] = 0
    return torch.from_numpy(values.astype(np.int8))


def entropy_bytes(values: torch.Tensor) -> float:
    shares = np.unique(values.numpy(), return_counts=True)[1] / values.numel()
    return float(-(shares * np.log2(shares)).sum()) * values.numel() / 8


def same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[n].dtype == second[n].dtype and torch.equal(first[n], second[n]) for n in first
    )


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.sets(st.integers(-128, 127), min_size=1, max_size=200),
    st.integers(0, 2**32),
)
def test_what_is_unpacked_is_what_was_packed(shape: list[int], values: set[int], seed: int) -> None:
    drawn = numpy_generator(seed, "w").choice(sorted(values), shape).astype(np.int8)
    arrays = {
        "a.weight": torch.from_numpy(drawn),
        "a.scale": torch.full((shape[0],), 0.5),
        "a.bias": torch.linspace(0, 1, shape[0]),
        "norm.weight": torch.ones(7),
    }
    assert same(unpack(pack(arrays)), arrays)


@pytest.mark.parametrize(("bits", "share"), [(4, 0.5), (3, 0.375), (2, 0.21), (1, 0.125)])
def test_dense_weights_take_their_bits(bits: int, share: float) -> None:
    packed = pack({"w": weights(bits)})["w"]
    assert packed.dtype == torch.uint8
    assert packed.numel() <= share * ROWS * COLUMNS + 32
    assert torch.equal(unpack({"w": packed})["w"], weights(bits))


def test_dense_int8_stays_as_it_is() -> None:
    assert torch.equal(pack({"w": weights(8)})["w"], weights(8))


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
@pytest.mark.parametrize("zeros", [0.5, 0.9])
def test_pruned_weights_come_near_their_entropy(bits: int, zeros: float) -> None:
    values = weights(bits, zeros)
    packed = pack({"w": values})["w"]
    # The histogram is 32 bytes and one for each value that occurs.
    assert packed.numel() <= 1.02 * entropy_bytes(values) + 16 + 32 + values.unique().numel()
    assert torch.equal(unpack({"w": packed})["w"], values)


def test_equal_steps_are_stored_once_and_others_are_not() -> None:
    equal, other = torch.full((4,), 0.25), torch.tensor([0.25, 0.25, 0.5, 0.25])
    packed = pack({"a.weight": torch.zeros(4, 1, dtype=torch.int8), "a.scale": equal})
    assert packed["a.scale"].tolist() == [0.25]
    assert torch.equal(unpack(packed)["a.scale"], equal)
    assert torch.equal(pack({"a.scale": other})["a.scale"], other)


def test_fixed_width_indices_are_read_as_the_module_says() -> None:
    body = bytes([2]) + np.array([-5, 0, 7], dtype=np.int8).tobytes() + bytes([0b00011000])
    data = bytes([1, 2]) + struct.pack("<2I", 1, 4) + body
    row = torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())
    assert unpack({"w": row})["w"].tolist() == [[-5, 0, 7, -5]]


def tensor(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())


HEAD = struct.pack("<2I", 1, 4)


@pytest.mark.parametrize(
    "data",
    [
        b"\x01",
        b"\x01\x00",
        b"\x01\x05" + struct.pack("<5I", 1, 1, 1, 1, 1),
        b"\x01\x02" + HEAD[:6],
        b"\x01\x02" + struct.pack("<2I", 0, 4),
        b"\x09\x02" + HEAD + b"\x00\x01",
        b"\x01\x02" + HEAD,
        b"\x01\x02" + HEAD + b"\x00",
        b"\x01\x02" + HEAD + b"\x01\x05\x00\x00",
        b"\x01\x02" + HEAD + b"\x01\x00\x05\x01",
        b"\x01\x02" + HEAD + b"\x02\x00\x01\x02\xff",
        b"\x01\x02" + HEAD + b"\x01\x00\x05\x00\x00",
        b"\x02\x02" + HEAD + b"\x00\x00",
        b"\x03\x02" + HEAD + b"\x01",
    ],
)
def test_malformed_rows_are_refused_by_name(data: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"array layer\.weight"):
        unpack({"layer.weight": tensor(data)})


@settings(deadline=None, max_examples=100)
@given(st.sampled_from([8, 4, 2, 1]), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_a_changed_byte_is_refused_or_gives_weights_of_the_declared_shape(
    bits: int, at: float, flip: int
) -> None:
    row = pack({"w": weights(bits, 0.5)})["w"].clone()
    row[int(at * len(row))] ^= flip
    try:
        array = unpack({"w": row})["w"]
    except ArtifactError:
        return
    assert array.dtype == torch.int8 and array.numel() > 0


def test_a_bomb_is_refused_before_anything_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    # One repeated symbol: a few bytes that declare 16 billion weights.
    body = pack({"w": torch.zeros(100, 100, dtype=torch.int8)})["w"].numpy().tobytes()[10:]
    for sizes in ((2**17, 2**17), (100, 2000)):
        bomb = bytes([1, 2]) + struct.pack("<2I", *sizes) + body
        with pytest.raises(ArtifactError, match="at most 4096 weights a byte"):
            unpack({"w": tensor(bomb)})
    # Where that would be needed, the array is stored as it is.
    assert pack({"w": torch.zeros(100, 2000, dtype=torch.int8)})["w"].dtype == torch.int8
    # Of two arrays the sum counts.
    monkeypatch.setattr(packing, "MAX_WEIGHTS", math.ceil(1.5 * ROWS * COLUMNS))
    packed = pack({"a": weights(2), "b": weights(2)})
    assert unpack({"a": packed["a"]})
    with pytest.raises(ArtifactError, match="packed arrays declare"):
        unpack(packed)
