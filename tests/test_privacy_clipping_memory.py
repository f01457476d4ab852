"""Virtual batches: an aborted pass leaves nothing, and memory does not grow with the batch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

from reticent.compression.fold import fold_batchnorm
from reticent.compression.quantize import quantized_weights
from reticent.core.models import student
from reticent.core.update import Layout
from reticent.privacy.clipping import ClippedGradients, Loss
from reticent.privacy.clipping.sums import Method

CLIP, MICROBATCH = 0.5, 4
every_method = pytest.mark.parametrize("method", get_args(Method))


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


WATCHED = 3
"""Index of a layer that is called as a module, hooks and all, by every method."""


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    model = student("tiny", (1, 8, 8), 10)
    assert isinstance(model, nn.Sequential)
    folded = fold_batchnorm(model.eval())
    folded[WATCHED] = nn.Tanh()
    return folded


def batch_of(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 1, 8, 8, generator=generator)
    return inputs, torch.randint(0, 10, (count,), generator=generator)


class Bomb:
    """Raises at its second call: in the second micro-batch."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.calls = error, 0

    def __call__(self, *_: object) -> None:
        self.calls += 1
        if self.calls == 2:
            raise self.error


def in_the_loss(model: nn.Sequential, bomb: Bomb) -> Loss:
    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        bomb()
        return cross_entropy(logits, labels)

    return loss


def in_the_forward_pass(model: nn.Sequential, bomb: Bomb) -> Loss:
    model[WATCHED].register_forward_hook(bomb)
    return cross_entropy


def in_the_backward_pass(model: nn.Sequential, bomb: Bomb) -> Loss:
    """The last layers have their gradients by then, the first do not."""

    def watch(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        output.register_hook(bomb)

    model[WATCHED].register_forward_hook(watch)
    return cross_entropy


PLACES = [in_the_loss, in_the_forward_pass, in_the_backward_pass]
ERRORS = [MemoryError("none left"), KeyboardInterrupt(), RuntimeError("no luck")]


def private_leftovers(model: nn.Module) -> list[str]:
    """Names of everything on the model that could hold what a pass has seen."""
    found = [
        f"{type(module).__name__}.{name}"
        for module in model.modules()
        for name in ("activations", "max_batch_len")
        if hasattr(module, name)
    ]
    for name, p in model.named_parameters():
        held = (p.grad, getattr(p, "grad_sample", None), getattr(p, "_current_grad_sample", None))
        if any(h is not None for h in held) or getattr(p, "_forward_counter", 0):
            found.append(name)
    return found


@every_method
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("error", ERRORS)
def test_an_aborted_sum_leaves_nothing_for_the_next(
    place: Callable[[nn.Sequential, Bomb], Loss], error: BaseException, method: Method
) -> None:
    model = model_of()
    layout = Layout.of(model)
    fresh = ClippedGradients(copy.deepcopy(model), layout, MICROBATCH, method=method)
    used = ClippedGradients(model, layout, MICROBATCH, method=method)
    weights = layout.read(model)
    bomb = Bomb(error)
    loss = place(model, bomb)
    with pytest.raises(type(error)):
        used.sum(*batch_of(12), loss, CLIP, quantized_weights)
    assert bomb.calls == 2
    assert private_leftovers(model) == []
    assert np.array_equal(layout.read(model), weights)
    for seed in (1, 2):
        found = used.sum(*batch_of(6, seed), cross_entropy, CLIP, quantized_weights)
        expected = fresh.sum(*batch_of(6, seed), cross_entropy, CLIP, quantized_weights)
        assert np.array_equal(found, expected)


@every_method
def test_a_finished_sum_leaves_nothing_on_the_model(method: Method) -> None:
    model = model_of()
    ClippedGradients(model, Layout.of(model), MICROBATCH, method=method).sum(
        *batch_of(10), cross_entropy, CLIP
    )
    assert private_leftovers(model) == []


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_opacus_hooks_alone_do_leave_something() -> None:
    """The check above can fail: this is what it guards against."""
    model = model_of().train()
    GradSampleHooks(model, loss_reduction="sum")
    inputs, labels = batch_of(4)
    bomb = Bomb(MemoryError())
    loss = in_the_backward_pass(model, bomb)
    loss(model(inputs), labels).backward()
    with pytest.raises(MemoryError):
        loss(model(inputs), labels).backward()
    assert "Conv2d.activations" in private_leftovers(model)


def test_opacus_own_virtual_batches_break_the_bound_after_an_abort() -> None:
    """The trap: what an aborted batch has added up enters the next step too, which then holds the
    same example twice: a sensitivity of 2C."""
    layer = nn.Linear(64, 10, bias=False)
    wrapped = GradSampleModule(layer, loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(wrapped.parameters(), lr=0.0),
        noise_multiplier=0.0,
        max_grad_norm=CLIP,
        expected_batch_size=1,
        loss_reduction="sum",
    )
    stepped: list[float] = []
    optimizer.attach_step_hook(
        lambda o: stepped.append(o.params[0].summed_grad.norm().item())  # pyright: ignore
    )
    inputs, labels = batch_of(1)
    nothing = torch.zeros(1, 64)  # its gradient is zero
    data = TensorDataset(torch.cat([inputs.flatten(1), nothing]), labels.repeat(2))
    loader = DataLoader(data, batch_size=2)

    def run(fail: bool) -> None:
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=1, optimizer=optimizer
        ) as parts:
            for number, (x, y) in enumerate(parts):
                if fail and number == 1:
                    raise MemoryError
                optimizer.zero_grad()
                cross_entropy(wrapped(x), y).backward()
                optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(fail=False)
        with pytest.raises(MemoryError):
            run(fail=True)
        run(fail=False)
    assert stepped == pytest.approx([CLIP, 2 * CLIP], rel=1e-4)


@every_method
@pytest.mark.parametrize("microbatch", [1, 3, 4, 64])
def test_the_size_of_a_micro_batch_changes_nothing_but_rounding(
    microbatch: int, method: Method
) -> None:
    model = model_of()
    batch = batch_of(10)
    whole = ClippedGradients(copy.deepcopy(model), Layout.of(model), 10, method=method)
    parts = ClippedGradients(model, Layout.of(model), microbatch, method=method)
    expected = whole.sum(*batch, cross_entropy, CLIP)
    np.testing.assert_allclose(parts.sum(*batch, cross_entropy, CLIP), expected, atol=2e-6)


def peak_bytes(count: int, microbatch: int, method: Method) -> int:
    """Most bytes of tensors alive at once during a sum, by torch's own record of allocations."""
    model = model_of()
    gradients = ClippedGradients(model, Layout.of(model), microbatch, method=method)
    batch = batch_of(count)
    gradients.sum(*batch, cross_entropy, CLIP)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        gradients.sum(*batch, cross_entropy, CLIP)
    profiler = record.profiler
    assert profiler is not None and profiler.kineto_results is not None
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    sizes = [e.nbytes() for e in events]  # pyright: ignore
    return int(np.cumsum(sizes).max())


@every_method
def test_peak_memory_does_not_grow_with_the_batch(method: Method) -> None:
    small = peak_bytes(4, MICROBATCH, method)
    assert small > 4 * 15_338  # the model's 15,338 coordinates of one sum alone
    assert peak_bytes(64, MICROBATCH, method) <= 1.2 * small
    assert peak_bytes(64, 64, method) > 4 * small
