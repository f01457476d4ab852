"""IDX, the file format of MNIST and its relatives: bounded reading of files nobody vouches for.

An IDX file is two zero bytes, one byte for the element type, one for the number of dimensions, the
dimensions as big-endian 32-bit integers, and the elements (LeCun, Cortes and Burges 1998).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..plain_files import read_plain

MAX_BYTES = 256 * 2**20
"""Default limit on a file and on what it decompresses to."""

MAX_DIMS = 8

_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_CODES = {np.dtype(text).newbyteorder("="): code for code, text in _TYPES.items()}
_GZIP = b"\x1f\x8b"


class _Source:
    """Reads exact numbers of bytes from plain or gzipped data, and never more than asked for."""

    def __init__(self, data: bytes, where: str) -> None:
        self._where = where
        self._rest = data
        self._zip = zlib.decompressobj(wbits=31) if data.startswith(_GZIP) else None

    def _some(self, limit: int) -> bytes:
        if self._zip is None:
            part, self._rest = self._rest[:limit], self._rest[limit:]
            return part
        try:
            part = self._zip.decompress(self._rest, limit)
        except zlib.error as error:
            raise DataError(f"{self._where}: damaged gzip data: {error}") from error
        self._rest = self._zip.unused_data if self._zip.eof else self._zip.unconsumed_tail
        return part

    def take(self, count: int, what: str) -> bytes:
        part = self._some(count)
        if len(part) != count:
            raise DataError(f"{self._where}: ends after {len(part)} of {count} bytes of {what}")
        return part

    def finish(self) -> None:
        # A gzip member carries a checksum, which is only compared once its end has been read.
        if self._some(1) or self._rest:
            raise DataError(f"{self._where}: holds more bytes than its header announces")
        if self._zip is not None and not self._zip.eof:
            raise DataError(f"{self._where}: gzip data end without their checksum")


def _shape(source: _Source, dims: int, where: str) -> tuple[int, ...]:
    if not 1 <= dims <= MAX_DIMS:
        raise DataError(f"{where}: has {dims} dimensions: must be 1 to {MAX_DIMS}")
    sizes = np.frombuffer(source.take(4 * dims, "dimensions"), dtype=">u4")
    shape = tuple(int(size) for size in sizes)
    if 0 in shape:
        raise DataError(f"{where}: has shape {shape}: every dimension must be at least 1")
    return shape


def parse_idx(
    data: bytes, where: str = "IDX data", *, sha256: str | None = None, max_bytes: int = MAX_BYTES
) -> NDArray[Any]:
    """Return the array in IDX bytes, gzipped or not, in native byte order and read-only.

    The size that the header announces is compared with ``max_bytes`` before anything of that size
    is allocated or decompressed, and the data must have exactly that size.

    Args:
        data: The bytes of a file.
        where: What to call the data in errors.
        sha256: When given, the SHA-256 (hex) of the *decompressed* content, so that one sum serves
            a file with and without gzip.
        max_bytes: Limit on the elements, in bytes.

    Raises:
        DataError: Naming ``where`` and what is wrong.
    """
    source = _Source(data, where)
    head = source.take(4, "magic number")
    if head[:2] != b"\0\0":
        raise DataError(f"{where}: not an IDX file: starts with {head[:2].hex()}, must be 0000")
    if head[2] not in _TYPES:
        known = ", ".join(f"{code:02x}" for code in _TYPES)
        raise DataError(f"{where}: element type {head[2]:02x} is unknown: must be one of {known}")
    kind = np.dtype(_TYPES[head[2]])
    shape = _shape(source, head[3], where)
    size = math.prod(shape) * kind.itemsize
    if size > max_bytes:
        raise DataError(f"{where}: shape {shape} takes {size} bytes: must be at most {max_bytes}")
    body = source.take(size, "elements")
    source.finish()
    if sha256 is not None:
        _compare(sha256, head + np.array(shape, dtype=">u4").tobytes(), body, where)
    array = np.frombuffer(body, dtype=kind).reshape(shape)
    array = array.astype(kind.newbyteorder("="), copy=False)
    array.setflags(write=False)
    return array


def _compare(expected: str, header: bytes, body: bytes, where: str) -> None:
    digest = hashlib.sha256(header)
    digest.update(body)
    if digest.hexdigest() != expected.lower():
        raise DataError(
            f"{where}: SHA-256 of the content is {digest.hexdigest()}: must be {expected}"
        )


def read_idx(path: Path, *, sha256: str | None = None, max_bytes: int = MAX_BYTES) -> NDArray[Any]:
    """Read one IDX file, gzipped or not; see :func:`parse_idx`.

    Raises:
        DataError: If the file cannot be read, is too large, malformed or not the expected one.
    """
    data = read_plain(path, max_bytes, DataError, links=True)
    return parse_idx(data, str(path), sha256=sha256, max_bytes=max_bytes)


def encode_idx(array: NDArray[Any]) -> bytes:
    """Return ``array`` as IDX bytes: the inverse of :func:`parse_idx`.

    Raises:
        DataError: If the element type or the shape cannot be written.
    """
    code = _CODES.get(array.dtype.newbyteorder("="))
    if code is None:
        known = ", ".join(str(kind) for kind in _CODES)
        raise DataError(f"IDX cannot hold elements of type {array.dtype}: must be one of {known}")
    if not 1 <= array.ndim <= MAX_DIMS or 0 in array.shape or max(array.shape) >= 2**32:
        raise DataError(f"IDX cannot hold an array of shape {array.shape}")
    shape = np.array(array.shape, dtype=">u4").tobytes()
    return bytes([0, 0, code, array.ndim]) + shape + array.astype(_TYPES[code]).tobytes()


def gzip_bytes(data: bytes) -> bytes:
    """Compress as tightly as gzip can, without a name or a time: the same bytes on every run."""
    out = io.BytesIO()
    with gzip.GzipFile("", "wb", compresslevel=9, fileobj=out, mtime=0) as file:
        file.write(data)
    return out.getvalue()
