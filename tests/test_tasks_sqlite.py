"""Examples of a device's own SQLite database."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import torch

from reticent.core.errors import DataError
from reticent.core.tasks import sqlite
from reticent.core.tasks.sqlite import sqlite_examples

QUERY = "SELECT a, b, label FROM readings WHERE day >= ? ORDER BY rowid"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "sensors.db"
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("CREATE TABLE readings (day INTEGER, a REAL, b REAL, label, word TEXT)")
        rows = [(1, 0.5, 1, 0, "x"), (2, 1.5, 2, 1, "secret"), (3, -2.0, 3, 2, "y")]
        db.executemany("INSERT INTO readings VALUES (?, ?, ?, ?, ?)", rows)
    return path


def test_rows_become_inputs_and_labels(path: Path) -> None:
    found = sqlite_examples(path, QUERY, (1, 2), 3, [2])
    assert torch.equal(found.inputs, torch.tensor([[[1.5, 2.0]], [[-2.0, 3.0]]]))
    assert torch.equal(found.labels, torch.tensor([1, 2]))
    nothing = sqlite_examples(path, QUERY, (1, 2), 3, [9])
    assert nothing.inputs.shape == (0, 1, 2) and nothing.labels.shape == (0,)


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM readings",
        "INSERT INTO readings SELECT * FROM readings",
        "ATTACH DATABASE ':memory:' AS other",
        "PRAGMA query_only = OFF",
        "SELECT 1; DROP TABLE readings",
        "SELECT load_extension('x'), 1, 1",
        "nonsense",
    ],
)
def test_a_query_can_only_read(path: Path, query: str) -> None:
    before = path.read_bytes()
    with pytest.raises(DataError):
        sqlite_examples(path, query, (2,), 3)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("query", "classes", "said"),
    [
        ("SELECT a, label FROM readings", 3, "gives 2 columns: must give 3"),
        ("SELECT a, word, label FROM readings", 3, "not numbers"),
        ("SELECT a, NULL, label FROM readings", 3, "not finite"),
        ("SELECT a, 1e300, label FROM readings", 3, "not finite in float32"),
        ("SELECT a, b, label FROM readings", 2, "whole numbers from 0 to 1"),
        ("SELECT a, b, a FROM readings", 3, "whole numbers"),
        ("SELECT a, b, NULL FROM readings", 3, "whole numbers"),
    ],
)
def test_rows_that_are_no_examples_are_refused_and_not_told(
    path: Path, query: str, classes: int, said: str
) -> None:
    with pytest.raises(DataError, match=said) as error:
        sqlite_examples(path, query, (2,), classes)
    assert "secret" not in str(error.value)


def test_a_database_that_is_absent_damaged_or_too_large_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="no such database"):
        sqlite_examples(path.with_name("other.db"), QUERY, (2,), 3, [1])
    assert not path.with_name("other.db").exists()
    monkeypatch.setattr(sqlite, "MOST_ROWS", 2)
    with pytest.raises(DataError, match="more than 2 rows"):
        sqlite_examples(path, QUERY, (2,), 3, [1])
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(DataError):
        sqlite_examples(path, QUERY, (2,), 3, [1])
