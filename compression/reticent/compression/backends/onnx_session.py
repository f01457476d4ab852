"""Running an ONNX model with onnxruntime, on one thread. Imports neither torch nor onnx."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime  # pyright: ignore[reportMissingImports]

from reticent.core.errors import ArtifactError

_ERRORS_ONLY = 3


def open_session(data: bytes) -> Callable[[np.ndarray], np.ndarray]:
    """Return the model as a function of float32 arrays ``(n, *input_shape)``.

    Raises:
        ArtifactError: If ``data`` are not a model that this onnxruntime can run.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    # Without this, x86 processors that lack VNNI may saturate sums of two 8-bit products.
    options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        session = onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"])
        (given,), (made,) = session.get_inputs(), session.get_outputs()
    except Exception as error:  # onnxruntime's errors have no common base
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(f"model.onnx: onnxruntime refuses it: {reason}") from error

    def run(inputs: np.ndarray) -> np.ndarray:
        try:
            return np.asarray(session.run([made.name], {given.name: inputs})[0])
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise ArtifactError(f"model.onnx: does not run: {reason}") from error

    return run
