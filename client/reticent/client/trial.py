"""The self-test of a model that arrived, in a process of its own with bounded time and memory.

``python -m reticent.client.trial FOLDER KEY PLAN BYTES SECONDS`` verifies the artifact in FOLDER
under the key, assembles it and has it predict the public examples that travel in it, exactly as
``reticent predict`` does before it predicts. Whatever happens to this process, the device goes on
with the model that it has.

What a device does to the test is not held against the model: a process that was killed, as for its
memory, or that did not end in time, on a busy device perhaps, has said nothing.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from reticent.core.errors import ArtifactError, ReticentError

from .resources import LIBRARIES

SECONDS = 180
"""For the whole test; importing torch takes most of it on a slow device."""

_MOST_LIBRARIES = 384 * 2**20
"""Writable memory; importing torch and what loads artifacts takes 190 MB of it on x86-64."""

_COPIES = 16  # of the model's bytes: 8-bit numbers become 32-bit ones, and activations
_PASSED = "passed"
_MOST_TEXT = 2000
_BY_THE_DEVICE = (signal.SIGKILL, signal.SIGTERM, signal.SIGALRM, signal.SIGXCPU)


class CutShort(Exception):
    """The test came to no end, which is no fault of the model."""


def memory_of(size: int) -> int:
    """Return how many bytes the test of a model of so many bytes may allocate."""
    return _MOST_LIBRARIES + _COPIES * size


def needed_of(size: int) -> int:
    """Return how many bytes must be free for such a test: what importing torch is known to take.

    The limit is above that, for builds of torch that nobody measured. Where one takes more than is
    free the device ends the test, which says nothing of the model.
    """
    return LIBRARIES + _COPIES * size


def try_model(folder: Path, key: Path, plan: str, size: int, seconds: int = SECONDS) -> str:
    """Return why the model in ``folder`` does not work here, for the owner; nothing if it does.

    Args:
        folder: An artifact.
        key: File of the public key that must have signed it.
        plan: Digest of the plan that it must be of.
        size: Bytes of its files.
        seconds: Time that the test may take.

    Raises:
        CutShort: If the device let the test come to no end.
    """
    words = (str(folder), str(key), plan, str(memory_of(size)), str(seconds))
    with _started(words) as process:
        try:
            # What it says fits into a pipe; a model that says more waits until its time is over.
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            raise CutShort(f"the self-test did not end within {seconds} s") from None
        said = _last_line(process)
    if status == 0 and said == _PASSED:
        return ""
    if -status in _BY_THE_DEVICE:
        raise CutShort(f"the self-test was ended by {_signal(-status)}")
    if status < 0:
        return f"the self-test was ended by {_signal(-status)}"
    return said or f"the self-test ended with status {status}"


def _started(words: Sequence[str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", __spec__.name, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            start_new_session=True,
        )
    except OSError as error:  # too little memory, or too many processes
        raise CutShort(f"the self-test cannot be started: {error.strerror}") from error


def _last_line(process: subprocess.Popen[bytes]) -> str:
    text = b"" if process.stdout is None else process.stdout.read(_MOST_TEXT)
    lines = text.decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else ""


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def check_model(folder: Path, key: Path, plan: str) -> None:
    """Verify, assemble and try a model in this process.

    Raises:
        ReticentError: If it is not signed by the key, not of the plan, or does not work.
    """
    import torch

    from reticent.compression.artifact import load_artifact
    from reticent.core.signing import read_public_key

    torch.set_num_threads(1)
    artifact = load_artifact(folder, read_public_key(key))
    if artifact.manifest.plan_digest != plan:
        raise ArtifactError("the artifact is of another plan than its offer says")


def main() -> None:
    """Test one model; ends with status 0 and the word "passed" if it works."""
    folder, key, plan, limit, seconds = sys.argv[1:]
    # This process ends by itself, also when nobody is left to wait for it.
    signal.alarm(int(seconds))
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds)))
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit), int(limit)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        check_model(Path(folder), Path(key), plan)
    except (ReticentError, MemoryError) as error:
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split()))
    print(_PASSED)


if __name__ == "__main__":
    main()
