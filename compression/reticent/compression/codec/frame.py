"""The outer form of a payload: a checked header of 17 bytes, side bytes, coded symbols.

Little-endian: magic ``RC``, version, stages (of the quantizer and the entropy stage), flags, number
of coordinates (uint32), number of side bytes (uint32), CRC-32 of everything else (uint32).
The CRC finds accidents; it is no authentication.

Version 2 is version 1 with padding behind the coded symbols: zeros, then their number (uint32).
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from reticent.core.errors import PayloadError

MAGIC = b"RC"
VERSION = 1
PADDED = 2
_FIELDS = struct.Struct("<2sBBBII")
_CRC = struct.Struct("<I")
_ZEROS = struct.Struct("<I")
PADDING_OVERHEAD = _ZEROS.size
"""Bytes that padding takes at the least."""

OVERHEAD = _FIELDS.size + _CRC.size
"""Bytes of a payload that are neither side bytes nor symbols."""


@dataclass(frozen=True)
class Frame:
    """One payload, taken apart."""

    stages: int
    flags: int
    n: int
    side: bytes
    body: bytes


def seal(frame: Frame) -> bytes:
    """Return the bytes of ``frame``, without padding."""
    return _seal(VERSION, frame, b"")


def pad(payload: bytes, length: int) -> bytes:
    """Return ``payload``, as :func:`seal` made it, with padding up to exactly ``length`` bytes.

    Raises:
        PayloadError: If ``length`` is too short for it, or it is no payload.
    """
    zeros = length - len(payload) - _ZEROS.size
    if zeros < 0:
        raise PayloadError(
            f"payload of {len(payload)} bytes and {_ZEROS.size} bytes of padding do not fit into "
            f"{length}"
        )
    return _seal(PADDED, unseal(payload), bytes(zeros) + _ZEROS.pack(zeros))


def _seal(version: int, frame: Frame, padding: bytes) -> bytes:
    fields = (MAGIC, version, frame.stages, frame.flags, frame.n, len(frame.side))
    head, rest = _FIELDS.pack(*fields), (frame.side, frame.body, padding)
    return b"".join((head, _CRC.pack(_checksum(head, *rest)), *rest))


def unseal(payload: bytes) -> Frame:
    """Take ``payload`` apart, and drop its padding.

    Raises:
        PayloadError: If it is cut short, not a payload, of another version or damaged.
    """
    if len(payload) < OVERHEAD:
        raise PayloadError(f"payload has {len(payload)} bytes: must have at least {OVERHEAD}")
    magic, version, stages, flags, n, side = _FIELDS.unpack_from(payload)
    if magic != MAGIC or version not in (VERSION, PADDED):
        raise PayloadError(
            f"payload starts with {magic!r} version {version}: must be {MAGIC!r} version "
            f"{VERSION} or {PADDED}"
        )
    head, rest = payload[: _FIELDS.size], memoryview(payload)[OVERHEAD:]
    if _CRC.unpack_from(payload, _FIELDS.size)[0] != _checksum(head, rest):
        raise PayloadError("payload is damaged: its CRC-32 does not match its bytes")
    if version == PADDED:
        rest = memoryview(_without_padding(bytes(rest)))
    if side > len(rest):
        raise PayloadError(f"payload declares {side} side bytes: only {len(rest)} follow")
    return Frame(stages, flags, n, bytes(rest[:side]), bytes(rest[side:]))


def _without_padding(rest: bytes) -> bytes:
    if len(rest) < _ZEROS.size:
        raise PayloadError(f"payload has {len(rest)} bytes of padding: must have {_ZEROS.size}")
    (zeros,) = _ZEROS.unpack_from(rest, len(rest) - _ZEROS.size)
    end = len(rest) - _ZEROS.size - zeros
    if end < 0 or rest.count(0, end, end + zeros) != zeros:
        raise PayloadError(f"payload declares {zeros} bytes of padding: they must be there, all 0")
    return rest[:end]


def _checksum(*parts: bytes | memoryview) -> int:
    found = 0
    for part in parts:
        found = zlib.crc32(part, found)
    return found
