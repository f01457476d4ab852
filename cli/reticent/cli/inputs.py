"""Reading examples to predict from files, never unpickling."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load

from reticent.compression.manifest import TaskInfo
from reticent.core.decoding import parse_npy
from reticent.core.errors import DataError
from reticent.core.tasks.idx import read_idx


def read_inputs(path: Path, task: TaskInfo) -> torch.Tensor:
    """Return float32 inputs ``(n, *input_shape)`` from a .npy, safetensors or IDX file.

    Raises:
        DataError: If the file is missing, damaged, or its examples have another shape.
    """
    array = _array(path)
    if array.shape[1:] != tuple(task.input_shape):
        if array.shape == tuple(task.input_shape):
            array = array[None]
        elif (1, *array.shape[1:]) == tuple(task.input_shape):
            array = array[:, None]
        else:
            raise DataError(
                f"{path}: examples have shape {array.shape[1:]}: must be {tuple(task.input_shape)}"
            )
    if array.dtype == np.uint8:
        array = _scaled(array, task)
    if array.dtype not in (np.float32, np.float64):
        raise DataError(f"{path}: values are {array.dtype}: must be float32 or uint8")
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(array).all():
        raise DataError(f"{path}: holds values that are not finite in float32")
    return torch.from_numpy(array)


def _array(path: Path) -> np.ndarray:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        if path.suffix == ".npy":
            return parse_npy(path.read_bytes())
        if path.suffix == ".safetensors":
            return load(path.read_bytes())["inputs"]
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    except KeyError as error:
        raise DataError(f'{path}: holds no array "inputs"') from error
    return read_idx(path)


def _scaled(array: np.ndarray, task: TaskInfo) -> np.ndarray:
    """Scale uint8 values as the manifest's preprocessing says (JSON: divide, mean, std)."""
    try:
        rule = json.loads(task.preprocessing)
        scaled = (array / float(rule["divide"]) - float(rule["mean"])) / float(rule["std"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"task {task.name}: the artifact does not say how uint8 values are scaled; give float32"
        ) from error
    return scaled.astype(np.float32)
