"""One model's steps on public data: its device, precision and off-load, and AdamW."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from reticent.core.errors import RunError

from .means import Means, moved
from .offload import to_disk
from .zero import zero_offloaded

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

_LEAST_SCALE = 2.0**-14
"""float16's smallest normal number: gradients that overflow below it are not finite at all."""

Step = Callable[[torch.Tensor], None]
"""Takes one step down the gradient of a loss."""


@contextmanager
def learning(
    model: nn.Module,
    learning_rate: float,
    steps: int,
    means: Means,
    first: int = 0,
    others: Iterable[nn.Parameter] = (),
) -> Iterator[tuple[nn.Module, Step]]:
    """Yield what answers for ``model`` while it learns, and what takes a step down a loss.

    ``model`` is trained in place, and in CPU memory and evaluation mode afterwards. Inputs, and
    ``others``, must be on the device of ``means``.

    Args:
        steps: Length of the schedule, see :class:`Update`.
        first: Steps of it that are left out.
        others: What is learned beside the model's parameters; not with ``offload="zero"``.
    """
    model.train()
    with _placed(model, means) as placed:
        update = Update([*placed.parameters(), *others], learning_rate, steps, means, first)
        runs = in_precision(placed, means)
        if means.offload == "zero":
            with zero_offloaded(placed, runs, update.optimizer, means.device) as engine:
                yield engine, update.through(engine)
        else:
            yield runs, update
    model.eval()


@contextmanager
def _placed(model: nn.Module, means: Means) -> Iterator[nn.Module]:
    if means.offload == "cpu":
        from .sharded import sharded  # 0.7 s to import, and few plans need it.

        with sharded(model, means.device) as copy:
            yield copy
    else:
        with moved(means.device, model):
            yield model


class LowPrecision(nn.Module):
    """A model whose convolutions and matrix products run in bfloat16 or float16 (autocast).

    Weights, their gradients, and so the optimizer stay float32. bfloat16 has float32's range, so
    gradients do not vanish and no loss is scaled (Kalamkar et al. 2019). For public data only: a
    per-example gradient that was rounded after its norm was taken can exceed its bound.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: str) -> None:
        """Wrap ``model``, which keeps its parameters and its mode."""
        super().__init__()
        self._model, self._dtype, self._device = model, dtype, device

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return float32 logits."""
        with torch.autocast(self._device, dtype=self._dtype):
            return self._model(inputs).float()


def in_precision(model: nn.Module, means: Means) -> nn.Module:
    """Return ``model`` itself for ``fp32``, and what runs it in fewer bits otherwise."""
    if means.precision == "fp32":
        return model
    return LowPrecision(model, _TYPES[means.precision], means.device)


class _AdamW(torch.optim.AdamW):
    """AdamW that does not load torch's compiler.

    In torch 2.13 these methods load it, to keep it away from themselves, and that takes more than a
    second. Behind the decorators which do so they are called as they are.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        inspect.unwrap(torch.optim.AdamW.add_param_group)(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        inspect.unwrap(torch.optim.AdamW.zero_grad)(self, set_to_none)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        return inspect.unwrap(torch.optim.AdamW.step)(self, closure)


class Update:
    """AdamW with a one-cycle learning rate (Smith and Topin 2018).

    For ``fp16`` the loss is scaled (Micikevicius et al. 2018, section 3.2): a step whose gradients
    are not finite is left out, with its place in the schedule, and the scale halved. This is the
    only place where a loss is scaled: under DP-SGD that would change what is clipped.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        learning_rate: float,
        steps: int,
        means: Means,
        first: int = 0,
    ) -> None:
        """Update ``parameters`` at most ``steps`` times, with learning rates from ``first`` on.

        Raises:
            RunError: If they are to lie on disk and it has no room.
        """
        learned = list(parameters)
        self.optimizer = _AdamW(learned, lr=learning_rate, weight_decay=1e-3)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, learning_rate, total_steps=steps
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            for _ in range(first):
                self._schedule.step()
        self._drop = means.offload != "disk"
        if not self._drop:
            to_disk(self.optimizer, learned)
        # The scale lies where the gradients are: torch copies it elsewhere without waiting for it.
        self._scales_on = "cpu" if means.offload == "cpu" else means.device
        self._scaler = torch.amp.GradScaler(self._scales_on, enabled=means.precision == "fp16")

    def __call__(self, loss: torch.Tensor) -> None:
        """Take one step down the gradient of ``loss``, or none if that is not finite in float16.

        Raises:
            RunError: If it is not finite at any scale.
        """
        self.optimizer.zero_grad(set_to_none=self._drop)
        self._scaler.scale(loss.to(self._scales_on)).backward()
        scale = self._scaler.get_scale()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if self._scaler.get_scale() >= scale:
            self._schedule.step()
        elif scale < _LEAST_SCALE:
            raise RunError(
                'teacher.precision="fp16": gradients are not finite however small the loss is '
                'scaled; use "bf16" or "fp32", or a smaller teacher.learning_rate'
            )

    def through(self, engine: object) -> Step:
        """Return what takes the same steps through a DeepSpeed ``engine`` of this optimizer."""

        def step(loss: torch.Tensor) -> None:
            engine.backward(loss)  # pyright: ignore[reportAttributeAccessIssue]
            engine.step()  # pyright: ignore[reportAttributeAccessIssue]
            self._schedule.step()

        return step
