"""A model whose gradients and optimizer state lie in the host's memory (DeepSpeed, ZeRO-Offload).

Ren et al. 2021: weights stay on the device, which computes the gradients, and the CPU takes the
step. AdamW is PyTorch's, not DeepSpeed's own, which would be compiled first and round otherwise.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .group import process_group

_CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,  # Only names the speed of what is printed.
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,  # Gradients longer than 1 are clipped unless this says otherwise.
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
}


@contextmanager
def zero_offloaded(
    model: nn.Module, runs: nn.Module, optimizer: torch.optim.AdamW, device: str
) -> Iterator[Any]:
    """Yield a DeepSpeed engine that answers as ``runs`` and steps with ``optimizer``.

    ``model`` learns in place. The numbers are those of ``optimizer`` alone.

    Args:
        model: Holds the parameters, on the device.
        runs: ``model``, or what wraps it.
        optimizer: Of the parameters of ``model``, before its first step.

    Raises:
        RunError: If this process has a process group already.
    """
    deepspeed = importlib.import_module("deepspeed")
    orders = [parameter.stride() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    with process_group(device), _rank():
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        engine = None
        try:
            engine = deepspeed.initialize(
                model=runs,
                optimizer=optimizer,
                model_parameters=list(model.parameters()),
                config=_CONFIG,
                dist_init_required=False,
            )[0]
            yield engine
        finally:
            if engine is not None:
                engine.destroy()
            # It keeps the groups that it has seen, unless it destroys them itself.
            deepspeed.comm.destroy_process_group()
            for parameter, order in zip(model.parameters(), orders, strict=True):
                # Each is a contiguous view of one buffer for all.
                own = torch.empty_strided(parameter.shape, order, device=parameter.device)
                parameter.data = own.copy_(parameter.detach())


@contextmanager
def _rank() -> Iterator[None]:
    """Say in the environment, where DeepSpeed looks, that this is the first process."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before
