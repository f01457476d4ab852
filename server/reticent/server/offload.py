"""Parameters, gradients and optimizer state of a large model in files instead of memory.

A model of P float32 parameters takes 16 P bytes under AdamW: the weights, their gradients and two
moments. In mapped files the kernel keeps what fits and writes back the rest (as the state on NVMe
in Rajbhandari et al. 2021, ZeRO-Infinity), so that the memory a process must have is that of the
activations and of one layer. The numbers are the same: only where they lie differs.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable

import torch
from torch import nn

from reticent.core.errors import RunError


def to_disk(optimizer: torch.optim.AdamW, parameters: Iterable[nn.Parameter]) -> None:
    """Move float32 parameters into files, with gradients and moments of zero beside them.

    Call it before the first step. Gradients must then be zeroed in place, and not dropped. The
    files have no name: the space is free again when the tensors are.

    Raises:
        RunError: If the folder for temporary files has no room.
    """
    for parameter in parameters:
        copy = _mapped(parameter)
        with torch.no_grad():
            copy.copy_(parameter)
        parameter.data = copy
        parameter.grad = _mapped(parameter)
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": _mapped(parameter),
            "exp_avg_sq": _mapped(parameter),
        }


def _mapped(like: torch.Tensor) -> torch.Tensor:
    """Return float32 zeros in a nameless file, of the shape and memory order of ``like``."""
    size = max(1, 4 * like.numel())
    with tempfile.NamedTemporaryFile(prefix="reticent-") as file:
        try:
            # Reserved now: a full disk under a mapped file would end the process without a word.
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise RunError(
                f'teacher.offload="disk": {size} bytes cannot be reserved in '
                f"{tempfile.gettempdir()}: {error.strerror}; set TMPDIR to a folder on a disk with "
                "room for 16 bytes a parameter"
            ) from error
        flat = torch.from_file(file.name, shared=True, size=like.numel(), dtype=torch.float32)
        # Sums over another order would round otherwise, and the numbers would not be the same.
        return flat.as_strided(like.shape, torch.empty_like(like, device="meta").stride())
