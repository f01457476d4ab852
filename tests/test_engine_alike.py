"""Machines that would give other bits are refused, or said."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reticent.core.errors import DataError, DependencyError
from reticent.core.plan import parse_plan
from reticent.simulations.alike import FOLDERS, Marks, compared, digest, own_marks
from reticent.simulations.devices import devices_for
from reticent.simulations.ray_engine import _Actor, admitted, no_start

OWN = Marks("0.1.0 (abc)", "2.13.0", "x86_64 AVX512, cpu build")


def test_a_machine_of_the_same_kind_is_passed_over() -> None:
    assert compared(OWN, OWN.plain()) == ""
    assert compared(own_marks(), own_marks().plain()) == ""


@pytest.mark.parametrize("key", ["code", "torch"])
def test_other_code_is_refused(key: str) -> None:
    other = replace(OWN, **{key: "0.0.9"})
    with pytest.raises(DependencyError, match=r"a Ray node has .*0\.0\.9.*this machine has"):
        compared(OWN, other.plain())


@pytest.mark.parametrize("stale", [True, None, (), ("a", "b"), (1, 2, 3), Marks("a", "b", "c")])
def test_what_an_older_version_answers_is_another_version(stale: Any) -> None:
    with pytest.raises(DependencyError, match="reticent of another version"):
        compared(OWN, stale)


class Died(Exception):
    """As Ray's ActorDiedError tells of an actor that did not come to be, or was lost."""

    def __init__(self, text: str, actor_init_failed: bool) -> None:
        super().__init__(text)
        self.actor_init_failed = actor_init_failed


def test_a_machine_where_no_actor_can_start_is_told_from_one_that_was_lost() -> None:
    text = "The actor died\nTraceback:\nModuleNotFoundError: No module named 'reticent'\n"
    why = no_start(Died(text, actor_init_failed=True))
    assert "cannot start an actor: ModuleNotFoundError: No module named 'reticent'; the" in why
    assert no_start(Died(text, actor_init_failed=False)) == ""
    assert no_start(RuntimeError("the raylet was killed")) == ""


def test_a_machine_without_the_data_is_refused(tmp_path: Path) -> None:
    def told(name: str) -> Any:
        plan = parse_plan("", [f"task.name={name}"])
        return _Actor(devices_for(plan, tmp_path), plan.canonical()).ready()

    assert admitted(told("digits")) == ""
    with pytest.raises(DataError, match=r"cannot read the task's data: .*absent"):
        admitted(told("absent:task"))


@pytest.mark.parametrize("stale", [True, (), ("a", "b"), ("a", "b", "c"), (("a", "b", "c"), "")])
def test_other_code_is_told_before_missing_data(stale: Any) -> None:
    with pytest.raises(DependencyError, match="this machine has reticent"):
        admitted(stale)
    with pytest.raises(DependencyError, match="this machine has reticent"):
        admitted((("a", "b", "c"), "no data"))


def test_another_processor_is_said() -> None:
    other = replace(OWN, kernels="x86_64 AVX2, cpu build")
    said = compared(OWN, other.plain())
    assert "AVX2" in said and "AVX512" in said and "need not give the same model" in said


def test_the_digest_is_of_what_the_code_says_and_not_of_where_it_lies(tmp_path: Path) -> None:
    """A checkout has a root for each folder, an installed package one for all."""
    names = {"core", "compression", "privacy", "client", "server", "simulations"}
    assert {folder.name for folder in FOLDERS} == names
    there = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in FOLDERS]
    assert digest(reversed(there)) == digest(FOLDERS)
    module = tmp_path / "simulations" / "workers.py"
    module.write_text(module.read_text().replace("BLOCK = 13", "BLOCK = 8"))
    assert digest(there) != digest(FOLDERS)
