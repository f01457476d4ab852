"""Private local training with Opacus, for the contenders of ``round.py`` that run in Flower.

A module of its own, because Ray's workers import what they are sent by name, and know no script.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import round_work as work
import torch
from torch.nn import functional as F


@lru_cache(maxsize=1)
def wrapped(kind: str) -> Any:
    """Return Opacus' wrapper and optimizer, made once a process."""
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    module = GradSampleModule(work.model_of(kind))
    optimizer = DPOptimizer(
        torch.optim.SGD(module.parameters(), lr=work.LEARNING_RATE),
        noise_multiplier=work.SIGMA,
        max_grad_norm=work.CLIP,
        expected_batch_size=work.BATCH,
    )
    return module, optimizer


def reused(kind: str, state: Any, data: work.Examples) -> Any:
    """Train one client with a wrapper that is made once."""
    module, optimizer = wrapped(kind)
    module._module.load_state_dict(state)
    for _ in range(work.STEPS):
        batch = torch.nonzero(torch.rand(len(data.labels)) < work.RATE).flatten()
        if len(batch):
            optimizer.zero_grad()
            F.cross_entropy(module(data.inputs[batch]), data.labels[batch]).backward()
            optimizer.step()
    return module._module.state_dict()


def as_written(kind: str, state: Any, data: work.Examples) -> Any:
    """Train one client as the tutorials do: a PrivacyEngine each, and its epsilon."""
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    model = work.model_of(kind)
    model.load_state_dict(state)
    engine: Any = PrivacyEngine()
    module, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=work.LEARNING_RATE),
        data_loader=DataLoader(TensorDataset(*data), batch_size=work.BATCH),
        noise_multiplier=work.SIGMA,
        max_grad_norm=work.CLIP,
    )
    for inputs, labels in loader:
        optimizer.zero_grad()
        if len(labels):
            F.cross_entropy(module(inputs), labels).backward()
            optimizer.step()
    engine.get_epsilon(1e-5)
    return module._module.state_dict()
