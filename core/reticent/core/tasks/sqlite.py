"""Examples of one device out of a SQLite database, for the ``client`` of an owner's own task."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import DataError
from .base import Examples

MOST_ROWS = 1_000_000
_SECONDS = 10.0


def sqlite_examples(
    path: Path,
    query: str,
    input_shape: tuple[int, ...],
    classes: int,
    parameters: Sequence[str | int | float] = (),
) -> Examples:
    """Return what a query gives: every column but the last is a feature, the last is the label.

    The database is opened read-only, and the query runs where nothing can be written or attached,
    so that a wrong one cannot harm what a device records. The rows stay on the device; messages of
    errors name columns and counts of columns, and never a value.

    Args:
        path: The database; another process may be writing it.
        query: One SELECT.
        input_shape: Shape of an example; its size is the number of features.
        classes: Labels are the whole numbers from 0 to ``classes - 1``.
        parameters: Values for the query's placeholders.

    Returns:
        Inputs float32 ``(n, *input_shape)`` and labels int64 ``(n,)``; ``n`` may be 0.

    Raises:
        DataError: If the database cannot be read, the query is not one SELECT, or its rows are not
            finite numbers with a label, or are more than :data:`MOST_ROWS`.
    """
    size = int(np.prod(input_shape))
    rows = _rows(path, query, parameters, size + 1)
    # As float64 first: a label beyond float32's whole numbers must not be rounded to another one.
    try:
        table = np.array(rows, dtype=np.float64).reshape(len(rows), size + 1)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{path}: the query gives values that are not numbers") from error
    with np.errstate(over="ignore"):
        inputs, labels = table[:, :-1].astype(np.float32), table[:, -1]
    if not np.isfinite(inputs).all():
        raise DataError(f"{path}: the query gives features that are not finite in float32")
    if not ((labels >= 0) & (labels < classes) & (labels == np.floor(labels))).all():
        raise DataError(f"{path}: labels must be whole numbers from 0 to {classes - 1}")
    shaped = torch.from_numpy(inputs.reshape(-1, *input_shape))
    return Examples(shaped, torch.from_numpy(labels.astype(np.int64)))


def _rows(
    path: Path, query: str, parameters: Sequence[str | int | float], columns: int
) -> list[tuple[Any, ...]]:
    if not path.is_file():
        raise DataError(f"{path}: no such database")
    address = f"{path.absolute().as_uri()}?mode=ro"
    try:
        with closing(sqlite3.connect(address, uri=True, timeout=_SECONDS)) as database:
            database.execute("PRAGMA query_only = ON")
            database.set_authorizer(_reading)
            found = database.execute(query, tuple(parameters))
            if found.description is None or len(found.description) != columns:
                count = len(found.description or ())
                raise DataError(
                    f"{path}: the query gives {count} columns: must give {columns}, the features "
                    "and the label"
                )
            rows = found.fetchmany(MOST_ROWS + 1)
    except (sqlite3.Error, sqlite3.Warning, OverflowError) as error:
        raise DataError(f"{path}: the query failed: {error}") from error
    if len(rows) > MOST_ROWS:
        raise DataError(f"{path}: the query gives more than {MOST_ROWS:,} rows")
    return rows


def _reading(action: int, *_: object) -> int:
    """Allow what reads; ATTACH, PRAGMA and writes are denied."""
    allowed = {
        sqlite3.SQLITE_SELECT,
        sqlite3.SQLITE_READ,
        sqlite3.SQLITE_FUNCTION,
        sqlite3.SQLITE_RECURSIVE,
    }
    return sqlite3.SQLITE_OK if action in allowed else sqlite3.SQLITE_DENY
