"""Stands in for Flower's programs on a device, so that a server cannot send code.

A Flower app is a bundle of files that the server sends; ours is a ``pyproject.toml`` only, and the
SuperNode takes no other (:mod:`.in_step`). Should one come past it all the same, its code is not
run: modules are looked for only where they were looked for before the bundle came, an audit hook
(PEP 578), which cannot be taken off again, refuses code from Flower's folder, and the programs of
Flower's that are for other kinds of apps are not started. What a bundle may name is code that is
installed on the device.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import CodeType, ModuleType
from typing import NoReturn

from reticent.core.signing import write_new

from . import asking
from .disk import mapped

SUPERNODE = "flower-supernode"
EXECUTOR = "flower-superexec"
PROGRAM = "flwr-clientapp"
REFUSED = ("flwr-agentapp", "flwr-connector", "flwr-model", "flwr-serverapp", "flwr-simulation")


def forbid_code_in(folder: Path) -> None:
    """Refuse to run code whose file is in ``folder``, for the rest of this process.

    Python modules, their compiled forms and extension modules are covered. Data files are not code.
    """
    inside = os.path.realpath(folder) + os.sep

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "exec" and isinstance(arguments[0], CodeType):
            name: object = arguments[0].co_filename
        elif event == "import" and len(arguments) > 1:
            name = arguments[1]  # an extension module's file, or None
        else:
            return
        if isinstance(name, str) and os.path.realpath(name).startswith(inside):
            raise ImportError(f"{name}: came from the server, and is not run on this device")

    sys.addaudithook(hook)


class _Installed:
    """Finds modules on ``sys.path`` as it was, and parts of packages not in ``folder`` either."""

    def __init__(self, folder: Path) -> None:
        self._path = list(sys.path)
        self._folder = os.path.realpath(folder) + os.sep

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a module as Python does."""
        if path is None:
            return PathFinder.find_spec(name, self._path, target)
        # A namespace package grows with sys.path, and so into what was added to it.
        added = set(sys.path) - set(self._path)
        return PathFinder.find_spec(name, [p for p in path if not self._came(p, added)], target)

    def invalidate_caches(self) -> None:
        """Look at folders anew."""
        PathFinder.invalidate_caches()

    def find_distributions(self, *context: DistributionFinder.Context) -> Iterable[Distribution]:
        """Find what is installed, for ``importlib.metadata``."""
        return PathFinder.find_distributions(*context)

    def _came(self, place: str, added: set[str]) -> bool:
        where = os.path.realpath(place) + os.sep
        return any(
            where.startswith(bound)
            for bound in (self._folder, *(os.path.realpath(a) + os.sep for a in added))
        )


def find_installed_only(folder: Path) -> None:
    """From now on import modules only from where they are found now, and none from ``folder``."""
    finder = _Installed(folder)
    sys.meta_path[:] = [finder if found is PathFinder else found for found in sys.meta_path]


def write_launcher(folder: Path) -> None:
    """Write the programs that Flower finds before its own; ``folder`` comes first in PATH.

    Each is replaced whole. One that is as it should be is left alone, so that an agent starts again
    on a full disk.

    Raises:
        StorageError: If one cannot be written; each is then the old one or the new one.
    """
    # Without site and environment a Python starts in a hundredth of a second.
    command = f'"{sys.executable}" -I -S "{asking.__file__}" "{folder}"'
    with mapped(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        for program in (PROGRAM, EXECUTOR):
            _write(folder / program, f'exec {command} {program} "$@"')
        for program in REFUSED:
            _write(folder / program, f'echo "{program}: is not run on this device" >&2\nexit 1')


def _write(path: Path, commands: str) -> None:
    data = f"#!/bin/sh\n{commands}\n".encode()
    if not os.access(path, os.X_OK) or path.read_bytes() != data:
        part = path.with_name(f".{path.name}.part")
        part.unlink(missing_ok=True)
        try:
            write_new(part, data, 0o700)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def loaded(program: str) -> Callable[[], int | None]:
    """Return the function that a program of Flower's calls."""
    (found,) = importlib.metadata.entry_points(group="console_scripts", name=program)
    return found.load()


def run(words: Sequence[str]) -> NoReturn:
    """Be a program of Flower's, under the hook.

    Args:
        words: Its name and its arguments.
    """
    folder = Path(os.environ["FLWR_HOME"])
    forbid_code_in(folder)
    find_installed_only(folder)
    if words[0] == SUPERNODE:
        from .in_step import mend_supernode  # a ClientApp does without the SuperNode's modules

        mend_supernode()
    sys.argv = list(words)
    sys.exit(loaded(words[0])())


if __name__ == "__main__":
    run(sys.argv[1:])
