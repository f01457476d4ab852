"""Stands in for Flower's programs on a device, so that a server cannot send code.

A Flower app is a bundle of files that the server sends; ours is a ``pyproject.toml`` only, but a
bundle may hold modules, which Flower would import with the rights of the device's owner. Here they
are refused, by an audit hook (PEP 578), which cannot be taken off again: what a bundle may name is
code that is installed on the device. Of Flower only the SuperNode's way of receiving messages is
changed (:mod:`.in_step`).
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType
from typing import NoReturn

from . import asking

SUPERNODE = "flower-supernode"
EXECUTOR = "flower-superexec"
PROGRAM = "flwr-clientapp"


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


def write_launcher(folder: Path) -> None:
    """Write the programs that Flower finds before its own; ``folder`` comes first in PATH."""
    folder.mkdir(mode=0o700, exist_ok=True)
    # Without site and environment a Python starts in a hundredth of a second.
    command = f'"{sys.executable}" -I -S "{asking.__file__}" "{folder}"'
    for program in (PROGRAM, EXECUTOR):
        path = folder / program
        path.write_text(f'#!/bin/sh\nexec {command} {program} "$@"\n')
        path.chmod(0o700)


def loaded(program: str) -> Callable[[], int | None]:
    """Return the function that a program of Flower's calls."""
    (found,) = importlib.metadata.entry_points(group="console_scripts", name=program)
    return found.load()


def run(words: Sequence[str]) -> NoReturn:
    """Be a program of Flower's, under the hook.

    Args:
        words: Its name and its arguments.
    """
    forbid_code_in(Path(os.environ["FLWR_HOME"]))
    if words[0] == SUPERNODE:
        from .in_step import keep_in_step  # a ClientApp does without the SuperNode's modules

        keep_in_step()
    sys.argv = list(words)
    sys.exit(loaded(words[0])())


if __name__ == "__main__":
    run(sys.argv[1:])
