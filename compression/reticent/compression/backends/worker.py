"""The measured process: one model, alone, in a fresh interpreter (``python -m``).

It is given a folder with ``job.json``, ``input.npy`` (one example) and the model's files. For each
line on standard input, a number, it predicts so often and answers one JSON line with the times and
the memory so far. The onnx model is measured without torch in the process, as a device would run
it, so this file imports the standard library only until it knows what it measures.

Memory is resident memory (RSS) as Linux counts it: the baseline is taken after the libraries are
imported and the example is read, the peak (high-water mark, reset then) from there on. So the peak
above the baseline holds the model, its activations, and whatever code and buffers the library
touches only when it predicts.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from .base import Backend

WARMUP = 3

Predict = Callable[[], object]


def main() -> None:
    """Measure the model in the folder named by the first argument."""
    # Libraries print to standard output; the answers have a channel of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    try:
        _limit(job["memory_bytes"], job["cpus"])
    except Exception as error:
        _say(answers, {"unlimited": _reason(error)})
        return
    try:
        _serve(_LOADERS[job["kind"]](folder), answers)
    except Exception as error:
        _say(answers, {"failed": _reason(error)})


def _reason(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def _limit(memory_bytes: int | None, cpus: int | None) -> None:
    """Hold this process to a number of cores, and of bytes that it may allocate.

    The limit counts what the process reserves for writing, whether it is touched or not; program
    code, which a device reads from its storage as needed, does not count.
    """
    if cpus is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cpus])
    if memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))


def _serve(load: Callable[[], Predict], answers: TextIO) -> None:
    gc.collect()
    baseline = _status("VmRSS")
    # Sets the high-water mark to the present value (proc(5)). Where the kernel does not offer it,
    # the peak also covers the imports, so the memory stated is never too small.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    predict = load()
    for _ in range(WARMUP):
        predict()
    _say(answers, {"baseline": baseline})
    for line in sys.stdin:
        # Caches are as another process has left them.
        predict()
        times = [_timed(predict) for _ in range(int(line))]
        _say(answers, {"times_us": times, "peak": _status("VmHWM")})


def _timed(predict: Predict) -> float:
    start = time.perf_counter_ns()
    predict()
    return (time.perf_counter_ns() - start) / 1000


def _status(key: str) -> int:
    """Return a number of bytes that Linux keeps of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def _say(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def _onnx(folder: Path) -> Callable[[], Predict]:
    import numpy as np

    from .frames import unframed
    from .onnx_session import open_session

    example, file = np.load(folder / "input.npy"), folder / "model.onnx.zst"

    def load() -> Predict:
        session = open_session(unframed(file.read_bytes(), file.name))
        return lambda: session(example)

    return load


def _torch(folder: Path, load_model: Callable[[], Any]) -> Callable[[], Predict]:
    import numpy as np
    import torch

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    example = torch.from_numpy(np.load(folder / "input.npy"))

    def load() -> Predict:
        model = load_model()
        return lambda: model(example)

    return load


def _xnnpack(folder: Path) -> Callable[[], Predict]:
    runtime = importlib.import_module("executorch.runtime")
    from .frames import unframed
    from .xnnpack_runtime import Program

    runtime.Runtime.get()
    file = folder / "model.pte.zst"
    return _torch(folder, lambda: Program(unframed(file.read_bytes(), file.name)))


def _qnnpack(folder: Path) -> Callable[[], Predict]:
    from .qnnpack import QNNPACK

    return _integers(folder, QNNPACK)


def _x86(folder: Path) -> Callable[[], Predict]:
    from .qnnpack import X86

    return _integers(folder, X86)


def _integers(folder: Path, backend: Backend) -> Callable[[], Predict]:
    from ..deployable import parse_form

    def model() -> Any:
        graph = parse_form((folder / "model.json").read_bytes())
        return backend.load(graph, (folder / backend.model_file).read_bytes())

    return _torch(folder, model)


def _fp32(folder: Path) -> Callable[[], Predict]:
    from safetensors.torch import load_file

    from ..deployable import parse_form
    from .float_chain import float_model

    def model() -> Any:
        graph = parse_form((folder / "model.json").read_bytes())
        return float_model(graph, load_file(folder / "weights.safetensors"))

    return _torch(folder, model)


def _teacher(folder: Path) -> Callable[[], Predict]:
    from safetensors.torch import load_file

    from reticent.core.plan import TaskSection
    from reticent.core.tasks import load_task

    from ..distill import Ensemble

    section = TaskSection.model_validate_json((folder / "task.json").read_bytes())
    task = load_task(section, json.loads((folder / "job.json").read_text())["seed"])
    made = json.loads((folder / "teacher.json").read_text())
    own: str | None = made["student"]

    def member() -> Any:
        return task.teacher() if own is None else task.student(own)

    def model() -> Any:
        many = made["count"] > 1
        teacher = (Ensemble([member() for _ in range(made["count"])]) if many else member()).eval()
        teacher.load_state_dict(load_file(folder / "weights.safetensors"))
        return teacher

    return _torch(folder, model)


_LOADERS = {
    "onnx": _onnx,
    "xnnpack": _xnnpack,
    "qnnpack": _qnnpack,
    "x86": _x86,
    "fp32": _fp32,
    "teacher": _teacher,
}


if __name__ == "__main__":
    main()
