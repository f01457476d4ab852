"""What a device must install."""

from __future__ import annotations

import tomllib
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
HEAVY = {"ray", "pandas", "pyarrow", "matplotlib", "torchvision"}


def closure(wanted: list[str]) -> set[str]:
    """Return the names of all packages that a list of requirements needs, without extras of theirs.

    Read from the metadata of what is installed; what is not installed here is needed nowhere here.
    """
    found: set[str] = set()
    waiting = [Requirement(text) for text in wanted]
    while waiting:
        one = waiting.pop()
        name = canonicalize_name(one.name)
        if name in found or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        with suppress(metadata.PackageNotFoundError):
            waiting += [Requirement(text) for text in metadata.requires(name) or ()]
    return found


def test_a_device_installs_nothing_that_only_servers_and_simulations_need() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = closure(project["dependencies"])
    assert {"torch", "flwr", "opacus", "scipy"} <= needed  # scipy comes through others
    assert not needed & HEAVY
    assert "ray" in closure(project["optional-dependencies"]["simulation"])
