"""Running an ExecuTorch program, one example at a time."""

from __future__ import annotations

import torch
from executorch.runtime import (  # pyright: ignore[reportMissingImports]
    Runtime,
    Verification,
)

from reticent.core.errors import ArtifactError


class Program:
    """A program as a function of float32 tensors ``(n, *input_shape)``.

    Raises:
        ArtifactError: If ``data`` are not a program that this ExecuTorch can run, or inputs have
            another shape than it was made for.
    """

    def __init__(self, data: bytes) -> None:
        """Load a program whose bytes were verified."""
        # The method points into the program, and that into the bytes; neither keeps the other.
        self._data = data
        try:
            check = Verification.InternalConsistency
            self._program = Runtime.get().load_program(data, verification=check)
            method = self._program.load_method("forward")
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ArtifactError(f"model.pte: ExecuTorch refuses it: {reason}") from error
        if method is None:
            raise ArtifactError('model.pte: holds no method "forward"')
        self._method = method

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the logits of all examples."""
        try:
            # A result is copied at once: its memory is the method's, which uses it again.
            return torch.cat([self._method.execute([row])[0].clone() for row in inputs.split(1)])
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ArtifactError(f"model.pte: does not run: {reason}") from error
