"""Students of a user's own making are tried before a run, on inputs that they can take."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graph_students import Scaled
from torch import nn

from reticent.cli import main as command
from reticent.client.whole import require_whole
from reticent.core.errors import DataError
from reticent.core.plan import parse_plan

Capture = pytest.CaptureFixture[str]
TEXT = """
[task]
name = "text"
[student]
model = "{}"
quantize = {{ kind = "none" }}
"""


def check(student: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    plan = folder / "plan.toml"
    plan.write_text(TEXT.format(f"odd_students:{student}"))
    monkeypatch.setattr("sys.argv", ["reticent", "plan", "check", str(plan), *words])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    return int(stopped.value.code or 0)


@pytest.mark.parametrize("student", ["Looked", "Hooked"])
def test_a_student_of_codes_is_tried_on_codes(
    student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert check(student, tmp_path, monkeypatch) == 0
    assert "good" in capsys.readouterr().out


@pytest.mark.parametrize("student", ["Remembering", "gated", "Attending"])
def test_a_student_of_which_no_single_gradients_can_be_had_is_an_error_of_the_user_s(
    student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert check(student, tmp_path, monkeypatch) == 4
    said = capsys.readouterr().err
    assert f"student odd_students:{student} of task text" in said and "fault" not in said
    assert check(student, tmp_path, monkeypatch, "--set", "privacy.unit=client") == 0


def test_a_student_is_tried_on_inputs_at_which_its_gradients_are_finite() -> None:
    task: Any = SimpleNamespace(name="small", classes=3, input_shape=(4,))
    plan = parse_plan("", ["privacy.noise_multiplier=1.0"])
    require_whole(Scaled(torch.log1p, nn.Linear(4, 4)), plan, task)
    with pytest.raises(DataError, match="its gradients at random inputs are not finite"):
        require_whole(Scaled(torch.log, nn.Linear(4, 4)), plan, task)
