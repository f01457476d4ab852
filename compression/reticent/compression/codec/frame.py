"""The outer form of a payload: a checked header of 17 bytes, side bytes, coded symbols.

Little-endian: magic ``RC``, version, stages (of the quantizer and the entropy stage), flags, number
of coordinates (uint32), number of side bytes (uint32), CRC-32 of everything else (uint32).
The CRC finds accidents; it is no authentication.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from reticent.core.errors import PayloadError

MAGIC = b"RC"
VERSION = 1
_FIELDS = struct.Struct("<2sBBBII")
_CRC = struct.Struct("<I")
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
    """Return the bytes of ``frame``."""
    fields = (MAGIC, VERSION, frame.stages, frame.flags, frame.n, len(frame.side))
    head, rest = _FIELDS.pack(*fields), frame.side + frame.body
    return head + _CRC.pack(_checksum(head, rest)) + rest


def unseal(payload: bytes) -> Frame:
    """Take ``payload`` apart.

    Raises:
        PayloadError: If it is cut short, not a payload, of another version or damaged.
    """
    if len(payload) < OVERHEAD:
        raise PayloadError(f"payload has {len(payload)} bytes: must have at least {OVERHEAD}")
    magic, version, stages, flags, n, side = _FIELDS.unpack_from(payload)
    if magic != MAGIC or version != VERSION:
        raise PayloadError(
            f"payload starts with {magic!r} version {version}: must be {MAGIC!r} version {VERSION}"
        )
    head, rest = payload[: _FIELDS.size], payload[OVERHEAD:]
    if _CRC.unpack_from(payload, _FIELDS.size)[0] != _checksum(head, rest):
        raise PayloadError("payload is damaged: its CRC-32 does not match its bytes")
    if side > len(rest):
        raise PayloadError(f"payload declares {side} side bytes: only {len(rest)} follow")
    return Frame(stages, flags, n, rest[:side], rest[side:])


def _checksum(head: bytes, rest: bytes) -> int:
    return zlib.crc32(rest, zlib.crc32(head))
