"""Training with everything in files: the same numbers, in less memory than without."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest
import torch

from reticent.core.errors import RunError
from reticent.core.models import teacher
from reticent.core.seeds import torch_generator
from reticent.core.tasks import Examples
from reticent.server import offload
from reticent.server.means import Means
from reticent.server.public_training import train_public

LIMITED = """
import resource
import torch
from torch import nn
from reticent.core.tasks import Examples
from reticent.server.means import Means
from reticent.server.public_training import train_public

def mebibytes():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("VmData"))

def trained(layers, offload):
    torch.manual_seed(0)
    deep = [layer for _ in range(layers) for layer in (nn.Linear(1024, 1024), nn.ReLU())]
    model = nn.Sequential(nn.Linear(8, 1024), nn.ReLU(), *deep, nn.Linear(1024, 4))
    train_public(model, examples, 1, 0.001, 0, "large", means=Means(offload=offload))

torch.set_num_threads(1)
examples = Examples(torch.ones(8, 8), torch.arange(8) % 4)
trained(1, "disk")  # so that what torch keeps for itself is there before the limit is set
limit = (mebibytes() + 56) << 20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
trained(6, "disk")
print("disk fits")
try:
    trained(6, "none")
except RuntimeError as error:
    print("memory", "allocate" in str(error))
"""


def trained(offload: str) -> torch.nn.Module:
    torch.manual_seed(0)
    generator = torch_generator(0, "offload")
    inputs = torch.randn(12, 1, 8, 8, generator=generator)
    model = teacher((1, 8, 8), 4)
    examples = Examples(inputs, torch.arange(12) % 4)
    return train_public(model, examples, 3, 0.01, 0, "teacher", means=Means(offload=offload))


def test_on_disk_or_not_the_teacher_is_the_same() -> None:
    memory, disk = trained("none").state_dict(), trained("disk").state_dict()
    assert all(torch.equal(memory[name], disk[name]) for name in memory)


def test_a_disk_without_room_is_an_error_and_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int, _offset: int, _size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(offload.os, "posix_fallocate", full)
    with pytest.raises(RunError, match="No space left on device; set TMPDIR"):
        trained("disk")


@pytest.mark.skipif(sys.platform != "linux", reason="limits of private memory are Linux's")
def test_a_teacher_that_does_not_fit_in_memory_is_trained_from_disk() -> None:
    """6.3 million parameters are 24 MiB of weights and 96 MiB in training; the limit is 56."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["disk fits", "memory True"], done.stderr
