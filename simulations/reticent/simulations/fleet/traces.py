"""Reading a file of availability: ``client,start,end`` lines, or JSON lines with those keys."""

from __future__ import annotations

import array
import codecs
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from reticent.core.errors import DataError

from .availability import Trace

MOST_INTERVALS = 5_000_000
"""24 bytes each: 120 MB."""

_LONGEST_LINE = 1024
_WHOLE = re.compile(rb"[+-]?[0-9]+")
_NUMBER = re.compile(rb"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(inf|nan)")


def read_trace(path: Path, clients: int, period: float | None) -> Trace:
    """Return the intervals in ``path``; they take 24 bytes each, however the file is written.

    A ``.jsonl`` file holds one JSON object a line, any other is CSV, with or without a first line
    ``client,start,end``; either may begin with a byte order mark. Times are seconds; an interval
    holds its start and not its end.

    Raises:
        DataError: Naming the line: not three numbers, 1,024 bytes or more, a client that is not in
            0 to ``clients`` - 1, an interval that is empty, negative, beyond the period, or
            overlaps another of the same client; no interval at all, or more than
            :data:`MOST_INTERVALS`.
    """
    digest, owners = hashlib.sha256(), array.array("q")
    starts, ends = array.array("d"), array.array("d")
    parse = _from_json if path.suffix == ".jsonl" else _from_csv
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(_LONGEST_LINE), b""), 1):
                digest.update(line)
                where = f"{path}, line {number}"
                if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
                    raise DataError(f"{where}: holds {_LONGEST_LINE:,} bytes or more")
                # Spreadsheets begin a file with a byte order mark.
                text = line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").strip()
                if not text or (number == 1 and text.replace(b" ", b"") == b"client,start,end"):
                    continue
                client, start, end = parse(text, where)
                _check(client, start, end, clients, period, where)
                owners.append(client)
                starts.append(start)
                ends.append(end)
                if len(owners) > MOST_INTERVALS:
                    raise DataError(f"{where}: holds more than {MOST_INTERVALS:,} intervals")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not owners:
        raise DataError(f"{path}: holds no interval")
    return _sorted(path, owners, starts, ends, period, digest.hexdigest())


def _from_csv(text: bytes, where: str) -> tuple[int, float, float]:
    parts = [part.strip() for part in text.split(b",")]
    kinds = (_WHOLE, _NUMBER, _NUMBER)
    if len(parts) != 3 or not all(k.fullmatch(p) for k, p in zip(kinds, parts, strict=True)):
        raise DataError(f"{where}: {_shown(text)}: must be client,start,end")
    client, start, end = parts
    return int(client), float(start), float(end)


def _from_json(text: bytes, where: str) -> tuple[int, float, float]:
    try:
        data: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {_shown(text)}: must be a JSON object") from error
    if not isinstance(data, dict) or set(data) != {"client", "start", "end"}:
        raise DataError(f"{where}: {_shown(text)}: must have the keys client, start and end")
    client, start, end = data["client"], data["start"], data["end"]
    if type(client) is not int or not all(type(v) in (int, float) for v in (start, end)):
        raise DataError(f"{where}: {_shown(text)}: must hold a whole number and two numbers")
    try:
        return client, float(start), float(end)
    except OverflowError as error:  # JSON's whole numbers have no end
        raise DataError(f"{where}: {_shown(text)}: must hold times up to 1.8e308") from error


def _check(
    client: int, start: float, end: float, clients: int, period: float | None, where: str
) -> None:
    if not 0 <= client < clients:
        raise DataError(f"{where}: client {client}: must be 0 to {clients - 1} (task.clients)")
    if not (0 <= start < end < math.inf):
        raise DataError(f"{where}: from {start:g} to {end:g}: must be 0 <= start < end, finite")
    if period is not None and end > period:
        raise DataError(f"{where}: end {end:g}: must be at most the period, {period:g}")


def _sorted(
    path: Path,
    owners: array.array[int],
    starts: array.array[float],
    ends: array.array[float],
    period: float | None,
    digest: str,
) -> Trace:
    client, start, end = np.asarray(owners), np.asarray(starts), np.asarray(ends)
    order = np.lexsort((start, client))
    client, start, end = client[order], start[order], end[order]
    overlap = np.flatnonzero((client[1:] == client[:-1]) & (start[1:] < end[:-1]))
    if len(overlap):
        i = int(overlap[0])
        raise DataError(
            f"{path}: client {client[i]}: the intervals from {start[i]:g} to {end[i]:g} and from "
            f"{start[i + 1]:g} to {end[i + 1]:g} overlap"
        )
    # Intervals that touch are one: nobody leaves between them.
    new = (client[1:] != client[:-1]) | (start[1:] > end[:-1])
    first, last = np.flatnonzero(np.r_[True, new]), np.flatnonzero(np.r_[new, True])
    return Trace(client[first].astype(np.int64), start[first], end[last], period, digest)


def _shown(text: bytes) -> str:
    return repr(text[:60].decode("utf-8", "replace"))
