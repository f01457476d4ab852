"""Integer weights in as few bytes as they need, and back without loss.

An int8 engine computes with one byte a weight. A file need not hold them so: a weight of 4 bits
takes half a byte, and one of a pruned or low-entropy layer less. :func:`pack` tries three forms for
each layer and keeps the smallest:

====  =======================================================================
code  body
====  =======================================================================
none  the int8 array as it is (dtype int8; the other two are uint8)
1     fixed width: a table of the values that occur, then each weight's index in it
2, 3  asymmetric numeral systems (Duda 2013) over 16 or 256 values, with a histogram
====  =======================================================================

A packed array is one row of bytes: the code, the number of dimensions, the shape (little-endian
uint32 each), the body. In form 1 the body is the number of values less one, the values (int8, in
ascending order), and the indices, each ``ceil(log2(values))`` bits, the first ones in the highest
bits of a byte, the last byte padded with zeros.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from reticent.core.errors import ArtifactError, PayloadError

from .codec.entropy import ans_decode, ans_encode

MAX_WEIGHTS = 256 * 2**20
"""Most weights that a file may unpack to, all layers together: checked before any is allocated."""

_MOST_PER_BYTE = 4096
"""A row stands for at most so many weights a byte, so that a few bytes cannot declare gigabytes."""

_FIXED, _ANS16, _ANS256 = 1, 2, 3
_ALPHABETS = {_ANS16: 16, _ANS256: 256}
_MAX_DIMS = 4

Bytes = NDArray[np.uint8]


def pack(arrays: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the arrays of an int8 model as a file should hold them.

    int8 arrays become uint8 rows where that is smaller; the steps of a layer become one where all
    are equal. Everything else stays as it is.
    """
    return {name: _packed(name, array.detach()) for name, array in arrays.items()}


def unpack(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Undo :func:`pack`, exactly.

    Raises:
        ArtifactError: If a packed array is malformed, or all together are larger than
            ``MAX_WEIGHTS``; it names the array.
    """
    shapes = {n: _shape(n, t) for n, t in tensors.items() if t.dtype == torch.uint8}
    total = sum(math.prod(shape) for shape in shapes.values())
    if total > MAX_WEIGHTS:
        raise ArtifactError(f"packed arrays declare {total} weights: at most {MAX_WEIGHTS} allowed")
    arrays = {
        name: _unpacked(name, tensor, shapes[name]) if name in shapes else tensor
        for name, tensor in tensors.items()
    }
    return {name: _spread(name, array, arrays) for name, array in arrays.items()}


def _packed(name: str, array: torch.Tensor) -> torch.Tensor:
    if name.endswith(".scale") and len(array) > 1 and bool((array == array[0]).all()):
        return array[:1].clone()
    if array.dtype != torch.int8 or not 0 < array.dim() <= _MAX_DIMS or array.numel() == 0:
        return array.contiguous()
    values = array.contiguous().numpy().reshape(-1)
    head = struct.pack(f"<{array.dim()}I", *array.shape)
    bodies = {_FIXED: _fixed_encode(values)}
    code = _ANS16 if values.min() >= -8 and values.max() < 8 else _ANS256
    bodies[code] = ans_encode(_symbols(values, _ALPHABETS[code]), _ALPHABETS[code])
    best = min(bodies, key=lambda c: (len(bodies[c]), c))
    data = bytes([best, array.dim()]) + head + bodies[best]
    if not len(data) < len(values) <= _MOST_PER_BYTE * len(data):
        return array.contiguous()
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())


def _shape(name: str, tensor: torch.Tensor) -> tuple[int, ...]:
    data = bytes(tensor[: 2 + 4 * _MAX_DIMS].numpy()) if tensor.dim() == 1 else b""
    dims = data[1] if len(data) > 1 else 0
    if not 0 < dims <= _MAX_DIMS or len(data) < 2 + 4 * dims:
        raise ArtifactError(f"array {name}: is packed with a head that is malformed")
    shape = struct.unpack_from(f"<{dims}I", data, 2)
    if min(shape) == 0:
        raise ArtifactError(f"array {name}: is packed with shape {shape}: no size may be 0")
    if math.prod(shape) > _MOST_PER_BYTE * len(tensor):
        raise ArtifactError(
            f"array {name}: is packed with shape {shape} in {len(tensor)} bytes: at most "
            f"{_MOST_PER_BYTE} weights a byte are allowed"
        )
    return shape


def _unpacked(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    data = bytes(tensor.contiguous().numpy())
    code, body, count = data[0], data[2 + 4 * len(shape) :], math.prod(shape)
    try:
        if code == _FIXED:
            values = _fixed_decode(body, count)
        elif code in _ALPHABETS:
            symbols = ans_decode(body, count, _ALPHABETS[code])
            values = (symbols.astype(np.int16) - _ALPHABETS[code] // 2).astype(np.int8)
        else:
            raise PayloadError(f"is packed in form {code}: must be 1, 2 or 3")
    except PayloadError as error:
        raise ArtifactError(f"array {name}: {error}") from error
    return torch.from_numpy(values.reshape(shape).copy())


def _spread(name: str, array: torch.Tensor, arrays: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the one step of a layer as often as the layer has output channels."""
    weight = arrays.get(f"{name.removesuffix('.scale')}.weight")
    if name.endswith(".scale") and array.shape == (1,) and weight is not None and weight.dim():
        return array.expand(len(weight)).contiguous()
    return array


def _symbols(values: NDArray[np.int8], alphabet: int) -> Bytes:
    return (values.astype(np.int16) + alphabet // 2).astype(np.uint8)


def _fixed_encode(values: NDArray[np.int8]) -> bytes:
    table, index = np.unique(values, return_inverse=True)
    width = _width(len(table))
    shifts = np.arange(width - 1, -1, -1)
    bits = (index.reshape(-1, 1) >> shifts & 1).astype(np.uint8)
    return bytes([len(table) - 1]) + table.tobytes() + np.packbits(bits).tobytes()


def _fixed_decode(body: bytes, count: int) -> NDArray[np.int8]:
    size = body[0] + 1 if body else 0
    width = _width(size)
    need = 1 + size + -(-count * width // 8)
    table = np.frombuffer(body[1 : 1 + size], dtype=np.int8)
    if not body or len(body) != need or (np.diff(table.astype(np.int16)) <= 0).any():
        raise PayloadError(
            f"{len(body)} bytes of {count} indices into {size} values: must be {need}, and the "
            "values ascending"
        )
    raw = np.frombuffer(body[1 + size :], dtype=np.uint8)
    bits = np.unpackbits(raw)
    if bits[count * width :].any():
        raise PayloadError("padding bits of the indices are not 0")
    powers = 1 << np.arange(width - 1, -1, -1)
    index = bits[: count * width].reshape(count, width) @ powers
    if index.max(initial=0) >= size:
        raise PayloadError(f"an index is {index.max()}: must be below {size}")
    return table[index.astype(np.intp)]


def _width(values: int) -> int:
    return max(values - 1, 0).bit_length()
