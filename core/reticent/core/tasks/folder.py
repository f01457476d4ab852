"""The folder of data that a user brought: where it is and how files get into it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ..errors import DataError
from ..run import write_atomic

ENVIRONMENT = "RETICENT_DATA"
Arrays = dict[str, NDArray[np.generic]]


def data_folder() -> Path:
    """Return the folder that RETICENT_DATA names, or ``~/.local/share/reticent``."""
    own = os.environ.get(ENVIRONMENT)
    return Path(own) if own else Path.home() / ".local" / "share" / "reticent"


def store(name: str, arrays: Arrays, notes: dict[str, str]) -> Path:
    """Write ``name.safetensors`` into the data folder, whole or not at all; return its path.

    Raises:
        DataError: If the folder cannot be written.
    """
    path = data_folder() / f"{name}.safetensors"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save(arrays, notes))
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written: {error.strerror}; set {ENVIRONMENT} to a folder that can"
        ) from error
    return path


def restore(folder: Path, name: str, hint: str) -> Arrays:
    """Return the arrays of ``name.safetensors`` in ``folder``.

    Args:
        folder: The data folder.
        name: The data set.
        hint: How to get it, for the message when it is not there.

    Raises:
        DataError: If the file is absent or damaged.
    """
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise DataError(f"{name}: {path} is not there: {hint}")
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise DataError(f"{path}: is damaged: {error}; add the data again: {hint}") from error
