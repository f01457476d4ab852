"""A model whose weights, gradients and optimizer state lie in the host's memory (FSDP2).

PyTorch's ``fully_shard`` with ``CPUOffloadPolicy``, over one process: each layer's weights are
brought to the device for its computation and dropped afterwards, and the optimizer steps on the
CPU. On a GPU that leaves room for activations and the largest layer; on a CPU it only costs memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from .group import process_group

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@contextmanager
def sharded(model: nn.Module, device: str) -> Iterator[nn.Module]:
    """Yield a sharded copy of ``model``, and read what it has learned back into ``model``.

    The copy's parameters are in contiguous order, which FSDP2 demands; numbers can then differ in
    rounding from those of a model in another order (channels-last), and are the same otherwise.
    ``model`` keeps its order, and holds 4 bytes a parameter meanwhile.

    Raises:
        RunError: If this process has a process group already.
    """
    with process_group(device):
        mesh = init_device_mesh(device, (1,))
        # Pinned memory is for an accelerator, and asking for it without one is an error.
        policy = CPUOffloadPolicy(pin_memory=device != "cpu")
        copy = deepcopy(model)
        for parameter in copy.parameters():
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        for layer in (*_layers(copy), copy):
            layer.register_forward_hook(_no_views)
            fully_shard(layer, mesh=mesh, offload_policy=policy)
        yield copy
        model.load_state_dict({name: _whole(value) for name, value in copy.state_dict().items()})


def _layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers that are gathered one at a time: those with parameters of their own only.

    They are the children of the model and, for containers, theirs. What shares a parameter with
    another stays with the whole model.
    """
    found = [layer for layer in _inside(model) if next(layer.parameters(), None) is not None]
    uses = Counter(id(p) for layer in found for p in layer.parameters())
    return [layer for layer in found if all(uses[id(p)] == 1 for p in layer.parameters())]


def _inside(model: nn.Module) -> Iterator[nn.Module]:
    for child in model.children():
        if isinstance(child, _CONTAINERS):
            yield from _inside(child)
        else:
            yield child


def _no_views(_layer: nn.Module, _inputs: object, output: Any) -> Any:
    """Return a layer's output with copies for views.

    FSDP2's hook on a view is lost if that is then changed in place, and with it the gradient.
    """
    if isinstance(output, torch.Tensor):
        return output.clone() if output._is_view() else output
    return (
        tuple(_no_views(_layer, (), part) for part in output) if type(output) is tuple else output
    )


def _whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
