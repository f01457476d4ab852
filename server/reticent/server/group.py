"""A process group of this one process, which FSDP2 and DeepSpeed cannot do without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from reticent.core.errors import RunError


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Have a default process group of one while the block runs.

    It meets in this process's memory: no port, no file, and no network but the loopback interface.

    Raises:
        RunError: If there is one already, which belongs to somebody else.
    """
    if dist.is_initialized():
        raise RunError(
            'teacher.offload: must be "none" or "disk" in a process that has a '
            "torch.distributed process group already, because its teacher is trained in a group "
            "of its own"
        )
    backend = "gloo" if device == "cpu" else f"cpu:gloo,{device}:nccl"
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
