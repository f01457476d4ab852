"""Measuring models apart: each in a process of its own, taking turns, under a device's limits.

A process per model is what makes memory comparable: nothing that another model or this command has
imported is counted. Turns of a few predictions each spread whatever else the machine does over all
models; only one of the processes works at a time.

A process that runs out of memory ends in many ways: by an exception, by a signal, by a library that
gives up, or never. So no message decides whether a model fits: it does not if it fails within the
profile's memory and answers without that limit.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from reticent.core.errors import ArtifactError

from ..bench import Latency, summary
from .base import Deployed
from .profiles import Profile

_TURN = 20
_PATIENCE = 120.0
"""Seconds until the first answer of a process whose memory is limited: some hang without memory."""
_LAST_WORDS = 10.0
"""Seconds between a process's last answer and its end."""


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes:
        name: For messages.
        kind: How :mod:`.worker` loads it.
        files: Contents of the files that it loads, by name.
        seed: Of the task, for the kind ``teacher``.
    """

    name: str
    kind: str
    files: Mapping[str, bytes]
    seed: int = 0

    @staticmethod
    def of(deployed: Deployed) -> Subject:
        """Return a deployed model as a subject."""
        backend = deployed.backend
        graph = deployed.graph.model_dump_json().encode()
        files = {"model.json": graph, backend.model_file: deployed.data}
        return Subject(backend.name, backend.name, files)


@dataclass(frozen=True)
class Measured:
    """What one process measured; without numbers if the model did not fit.

    Attributes:
        latency: Of one example on one thread.
        memory_bytes: Peak resident memory above that of a process with the same libraries.
        process_bytes: Peak resident memory of the whole process since it had its libraries.
        misfit: Why the model did not run within the profile; empty if it did.
    """

    latency: Latency | None
    memory_bytes: int | None
    process_bytes: int | None
    misfit: str = ""


def measure_apart(
    subjects: Sequence[Subject], example: np.ndarray, repeats: int, profile: Profile
) -> list[Measured]:
    """Measure each subject on ``example``, float32 ``(1, *input_shape)``, ``repeats`` times.

    Raises:
        ArtifactError: If a model cannot be measured although its memory is not limited, or the
            limits cannot be set.
    """
    with tempfile.TemporaryDirectory(prefix="reticent-bench-") as root, contextlib.ExitStack() as s:
        workers = []
        for index, subject in enumerate(subjects):
            folder = Path(root) / str(index)
            _write(folder, subject, example, profile)
            workers.append(s.enter_context(_Worker(subject, folder, profile)))
            # The next process starts when this one is ready, so that they do not slow each other.
            workers[-1].wait()
        while any(w.asked < repeats for w in workers):
            for worker in workers:
                worker.turn(min(_TURN, repeats - worker.asked))
        found = [w.measured() for w in workers]
    for subject in (s for s, m in zip(subjects, found, strict=True) if m.misfit):
        _require_runs(subject, example, replace(profile, memory_bytes=None))
    return found


def _require_runs(subject: Subject, example: np.ndarray, profile: Profile) -> None:
    """Let a model answer its first predictions once without a limit on memory.

    Raises:
        ArtifactError: If it cannot: it was not for want of memory that it failed.
    """
    with tempfile.TemporaryDirectory(prefix="reticent-bench-") as root:
        folder = Path(root) / "0"
        _write(folder, subject, example, profile)
        with _Worker(subject, folder, profile) as worker:
            worker.wait()


def _write(folder: Path, subject: Subject, example: np.ndarray, profile: Profile) -> None:
    folder.mkdir()
    job = {
        "kind": subject.kind,
        "seed": subject.seed,
        "memory_bytes": profile.memory_bytes,
        "cpus": profile.cpus,
    }
    (folder / "job.json").write_text(json.dumps(job))
    array = io.BytesIO()
    np.save(array, example, allow_pickle=False)
    for name, data in {**subject.files, "input.npy": array.getvalue()}.items():
        (folder / name).write_bytes(data)


class _Worker:
    """One process of :mod:`.worker`; after a failure it answers nothing more."""

    def __init__(self, subject: Subject, folder: Path, profile: Profile) -> None:
        self.subject, self.profile = subject, profile
        self.asked, self.failure = 0, ""
        self.times: list[float] = []
        self.baseline = self.peak = 0
        self.errors = folder / "stderr"
        command = [sys.executable, "-P", "-m", "reticent.compression.backends.worker", str(folder)]
        single = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **single, "PYTHONWARNINGS": "ignore"},
            )

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def wait(self) -> None:
        """Return when the model has answered its first predictions, or has failed."""
        with self._patience():
            self.baseline = self._answer().get("baseline", 0)

    @contextlib.contextmanager
    def _patience(self) -> Iterator[None]:
        """End the process if it takes too long for want of memory."""
        late = threading.Timer(_PATIENCE, self.process.kill)
        if self.profile.memory_bytes is not None:
            late.start()
        try:
            yield
        finally:
            late.cancel()

    def turn(self, count: int) -> None:
        self.asked += count
        if self.failure or not count:
            return
        with contextlib.suppress(BrokenPipeError):
            _pipe(self.process.stdin).write(f"{count}\n")
            _pipe(self.process.stdin).flush()
        answer = self._answer()
        self.times += answer.get("times_us", [])
        self.peak = answer.get("peak", 0)

    def measured(self) -> Measured:
        if self.failure:
            return Measured(None, None, None, self.failure)
        return Measured(summary(self.times), max(0, self.peak - self.baseline), self.peak)

    def _answer(self) -> dict[str, Any]:
        line = _pipe(self.process.stdout).readline()
        answer = json.loads(line) if line else {"failed": self._death()}
        if "unlimited" in answer:
            raise ArtifactError(
                f"{self.subject.name}: profile {self.profile.name} cannot be imposed on a process: "
                f"{answer['unlimited']}"
            )
        if "failed" in answer:
            self.failure = answer["failed"]
            if self.profile.memory_bytes is None:
                raise ArtifactError(f"{self.subject.name}: cannot be measured: {self.failure}")
        return answer

    def _death(self) -> str:
        try:
            status = self.process.wait(_LAST_WORDS)
        except subprocess.TimeoutExpired:  # it closed its channel, and hangs where it should end
            self.process.kill()
            status = self.process.wait()
        said = self.errors.read_text(errors="replace").strip().splitlines()
        last = said[-1] if said else "it said nothing"
        return f"the process ended with status {status}: {last}"


def _pipe(stream: IO[str] | None) -> IO[str]:
    if stream is None:
        raise ValueError("the process was started without this pipe")
    return stream
