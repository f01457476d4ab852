"""Entropy stages: one-byte symbols to bytes and back, losslessly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import zstandard

from reticent.core.errors import PayloadError

from . import coder
from .base import Symbols
from .histogram import measure, read, write

_LEVEL = 3


@dataclass(frozen=True)
class Entropy:
    """The last stage of a codec.

    Attributes:
        code: Number of this stage in a payload's header, 0 to 3; never reused.
        encode: ``(symbols, alphabet) -> bytes``.
        decode: ``(data, count, alphabet) -> symbols``; raises PayloadError unless ``data`` is
            exactly ``count`` symbols below ``alphabet``. Both are called with ``count > 0``.
    """

    code: int
    encode: Callable[[Symbols, int], bytes]
    decode: Callable[[bytes, int, int], Symbols]


def pack(symbols: Symbols, alphabet: int) -> bytes:
    """Return symbols in as many bits as the alphabet needs, the first one in the lowest bits."""
    if alphabet == 256:
        return symbols.tobytes()
    bits = symbols[:, None] >> np.arange(_bits(alphabet), dtype=np.uint8) & np.uint8(1)
    return np.packbits(bits, bitorder="little").tobytes()


def unpack(data: bytes, count: int, alphabet: int) -> Symbols:
    """Undo :func:`pack`."""
    width = _bits(alphabet)
    need = (count * width + 7) // 8
    if len(data) != need:
        raise PayloadError(f"payload has {len(data)} bytes of symbols: must have {need}")
    raw = np.frombuffer(data, dtype=np.uint8)
    if alphabet == 256:
        return raw
    bits = np.unpackbits(raw, bitorder="little")
    if bits[count * width :].any():
        raise PayloadError("payload has padding bits that are not 0")
    weights = np.uint8(1) << np.arange(width, dtype=np.uint8)
    return (bits[: count * width].reshape(count, width) * weights).sum(axis=1, dtype=np.uint8)


def _bits(alphabet: int) -> int:
    return alphabet.bit_length() - 1


def ans_encode(symbols: Symbols, alphabet: int) -> bytes:
    """Return a histogram and the symbols, coded by asymmetric numeral systems (Duda 2013)."""
    table = measure(symbols, alphabet)
    head = write(table)
    present, probabilities = read(head, alphabet)[:2]
    if len(present) == 1:
        return head
    dense = np.zeros(alphabet, dtype=np.int32)
    dense[present] = np.arange(len(present), dtype=np.int32)
    words = coder.CODER.push(dense[symbols], probabilities)
    return head + words.astype("<u4").tobytes()


def ans_decode(data: bytes, count: int, alphabet: int) -> Symbols:
    """Undo :func:`ans_encode`; the coder must be used up exactly."""
    present, probabilities, used = read(data, alphabet)
    rest = data[used:]
    if len(present) == 1:
        if rest:
            raise PayloadError(f"payload has {len(rest)} bytes after one repeated symbol: must end")
        return np.full(count, present[0], dtype=np.uint8)
    words = np.frombuffer(rest[: len(rest) // 4 * 4], dtype="<u4").astype(np.uint32)
    if len(rest) % 4 or not len(words) or words[-1] == 0:
        raise PayloadError("payload's coded words are incomplete: the last one must not be 0")
    indices, used_up = coder.CODER.pop(words, count, probabilities)
    if not used_up:
        raise PayloadError(f"payload's coded words hold more than {count} symbols")
    return present[indices]


def zstd_encode(symbols: Symbols, alphabet: int) -> bytes:
    """Return one zstandard frame (RFC 8878) of the symbols, one byte each."""
    return zstandard.ZstdCompressor(level=_LEVEL).compress(symbols.tobytes())


def zstd_decode(data: bytes, count: int, alphabet: int) -> Symbols:
    """Undo :func:`zstd_encode`; sizes are checked in the frame header before any allocation."""
    try:
        frame = zstandard.get_frame_parameters(data)
        # A frame's own size and window would override max_output_size, so they are checked first.
        if frame.content_size != count or frame.window_size > max(1024, count):
            raise PayloadError(
                f"payload's zstd frame declares {frame.content_size} bytes and a window of "
                f"{frame.window_size}: must declare {count} and no larger window"
            )
        plain = zstandard.ZstdDecompressor().decompress(
            data, max_output_size=count, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise PayloadError(f"payload's zstd frame is malformed: {error}") from error
    symbols = np.frombuffer(plain, dtype=np.uint8)
    if len(symbols) != count or symbols.max() >= alphabet:
        raise PayloadError(f"payload's zstd frame must hold {count} symbols below {alphabet}")
    return symbols


PLAIN = Entropy(0, pack, unpack)
ANS = Entropy(1, ans_encode, ans_decode)
ZSTD = Entropy(2, zstd_encode, zstd_decode)
