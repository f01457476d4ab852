"""What a simulation's processes do with memory that they have freed."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from reticent.simulations.memory import keep_freed_memory

FAULTS = """
import resource, sys
import numpy as np
from reticent.simulations.memory import keep_freed_memory
if sys.argv[1] == "kept":
    if not keep_freed_memory():
        sys.exit(3)
def work():
    for _ in range(20):
        one = np.ones(2**20)
        two = one + one
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    ended = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True)
    if ended.returncode == 3:
        pytest.skip("this system's allocator has no such settings")
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout)


def test_arrays_are_made_of_the_pages_of_those_before() -> None:
    assert faults("kept") * 10 < faults("plain")


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: pytest.fail("nothing is to be set"))
    assert not keep_freed_memory()


def test_without_glibc_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert not keep_freed_memory()
