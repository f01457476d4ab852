"""What Flower's commands are told, as Flower itself understands it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.common.config import parse_config_args

from reticent.server.certificates import utc_now
from reticent.server.flower import Flower
from reticent.server.home import create_home


@pytest.mark.parametrize(
    "folder", ["/srv/run", "/srv/a b", '/srv/a"b', "/srv/a'b", "/srv/😀", "/srv/a\\b=c\nd", ""]
)
def test_every_path_comes_to_a_run_as_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    understood: list[Mapping[str, Any]] = []

    def called(self: Flower, *words: str) -> dict[str, Any]:
        assert words[:2] == ("run", str(tmp_path))
        understood.append(parse_config_args([words[words.index("--run-config") + 1]]))
        return {"run-id": "7"}

    monkeypatch.setattr(Flower, "_call", called)
    flower = Flower(create_home(tmp_path / "server", ["127.0.0.1"], 8000, utc_now()))
    given = {"run-dir": folder, "attempt": "token"}
    assert flower.submit(tmp_path, given) == "7"
    assert understood == [given]
    assert flower.submit(tmp_path, {}) == "7" and understood[1] == {}
