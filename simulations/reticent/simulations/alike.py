"""What has to be the same on two machines for a client to get the same bits on both."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from reticent.client import app
from reticent.compression import packing
from reticent.core import errors
from reticent.core.errors import DependencyError
from reticent.privacy import release
from reticent.server import folding

_FILES = (module.__file__ for module in (errors, packing, release, app, folding))
FOLDERS = tuple(Path(str(file)).parent for file in (*_FILES, __file__))
"""Where the code of all that trains lies: namespaces may have other folders beside these."""


@dataclass(frozen=True)
class Marks:
    """What a process computes with.

    Attributes:
        code: Version of reticent, and a digest of its source files.
        torch: Version of torch.
        kernels: Build of torch, and the processor that it takes its kernels for.
    """

    code: str
    torch: str
    kernels: str

    def plain(self) -> tuple[str, ...]:
        """Return the marks as a tuple, for another process."""
        return self.code, self.torch, self.kernels


@lru_cache(maxsize=1)
def own_marks() -> Marks:
    """Return the marks of this process."""
    code = digest(FOLDERS)
    version, _, build = torch.__version__.partition("+")
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return Marks(
        f"{importlib.metadata.version('reticent')} ({code[:12]})",
        version,
        f"{processor}, {build or 'default'} build",
    )


def digest(folders: Iterable[Path]) -> str:
    """Return the SHA-256 of all modules in ``folders``, wherever these lie."""
    files = {
        file.relative_to(folder.parent).as_posix(): file
        for folder in folders
        for file in folder.rglob("*.py")
    }
    found = hashlib.sha256()
    for name in sorted(files):
        found.update(f"{name}\0{hashlib.sha256(files[name].read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()


def compared(own: Marks, theirs: Any) -> str:
    """Return what may make the same seed give another model there, in words; or nothing.

    Args:
        own: The marks of this process.
        theirs: What another process gave for :meth:`Marks.plain`; an older reticent gave anything.

    Raises:
        DependencyError: If the code or torch is another one.
    """
    known = isinstance(theirs, tuple) and len(theirs) == 3 and all(type(m) is str for m in theirs)
    there = Marks(*theirs) if known else Marks("of another version", "of another version", "")
    if (there.code, there.torch) != (own.code, own.torch):
        raise DependencyError(
            f"a Ray node has reticent {there.code} and torch {there.torch}, this machine has "
            f"reticent {own.code} and torch {own.torch}: install the same on every node, "
            f"pip install 'reticent[simulation]' torch=={own.torch} from the same source"
        )
    if there.kernels == own.kernels:
        return ""
    return (
        f"a Ray node computes with {there.kernels}, this machine with {own.kernels}: the same seed "
        "need not give the same model"
    )
