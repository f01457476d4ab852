"""Models: one teacher, a few students small enough for a device, and a user's own."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from .errors import DataError, PlanError, ReticentError

STUDENTS = ("tiny", "tiny-gn", "wide", "wide-gn")

Kernel = tuple[int, int]

_SMALL = 16
"""Below this height or width a first stride of 2 would leave too few pixels: it is 1."""


class Residual(nn.Module):
    """Two convolutions with BatchNorm around a shortcut (He et al. 2016)."""

    def __init__(self, width: int, kernel: Kernel = (3, 3)) -> None:
        """Make a block of ``width`` channels."""
        super().__init__()
        self.body = nn.Sequential(
            *_conv(width, width, kernel), nn.ReLU(), *_conv(width, width, kernel)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the shape of ``x``, ``(n, width, height, width)``."""
        return torch.relu(x + self.body(x))


def teacher(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Return a residual network of about 105,000 parameters for the server, randomly initialised.

    Maps ``(n, channels, height, width)`` to logits ``(n, classes)``. Any height and width of at
    least 1 works. On signals (a height of 1) the kernels are 1x9 in place of 3x3: as many weights.
    Initial weights come from torch's global generator. They lie in channels-last order, in which a
    training step takes about two thirds, and an answer half, of the time on x86-64.

    Raises:
        DataError: If ``input_shape`` is not ``(channels, height, width)``.
    """
    channels, height, _ = _image_shape(input_shape)
    kernel = _kernel(3, height)
    network = nn.Sequential(
        *_conv(channels, 24, kernel),
        nn.ReLU(),
        nn.MaxPool2d(2, ceil_mode=True),
        Residual(24, kernel),
        *_conv(24, 48, kernel),
        nn.ReLU(),
        nn.MaxPool2d(2, ceil_mode=True),
        Residual(48, kernel),
        Residual(48, kernel),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, classes),
    )
    return network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def student(kind: str, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Return a new student for a device, randomly initialised from torch's global generator.

    ``tiny`` has three 3x3 convolutions of stride 2 (16, 32, 32 channels), ``wide`` a 5x5 and a 3x3
    one (16, 32); each is followed by BatchNorm and ReLU, and then come Flatten and Linear. On
    inputs smaller than 16 pixels the first stride is 1. On signals, ``(channels, 1, width)``, a
    kernel is 1x9 in place of 3x3 and 1x25 in place of 5x5: as many weights, none of which could
    only ever meet padding (under privacy they would be noised all the same). Parameters for one
    channel and 10 classes, with BatchNorm folded into the convolutions:

    ======  ======  ======
    kind    28x28   8x8
    ======  ======  ======
    tiny    19,178  15,338
    wide    20,746  10,186
    ======  ======  ======

    ``tiny-gn`` and ``wide-gn`` have GroupNorm (four channels a group) instead, which keeps no
    running statistics and is never folded. ``"package.module:attribute"`` is imported and called
    with ``(input_shape, classes)``.

    Every built-in student is one ``nn.Sequential`` of Conv2d, BatchNorm2d or GroupNorm, ReLU,
    Flatten and Linear, and maps ``(n, *input_shape)`` to logits ``(n, classes)``.

    Raises:
        PlanError: If there is no such kind, or a user's own is not a model.
        DataError: If ``input_shape`` is not ``(channels, height, width)``.
    """
    if ":" in kind:
        return own_student(kind, input_shape, classes)
    if kind not in STUDENTS:
        close = difflib.get_close_matches(kind, STUDENTS, n=1)
        hint = f' (did you mean "{close[0]}"?)' if close else ""
        raise PlanError(
            f'student.model="{kind}": must be one of {", ".join(STUDENTS)}, or '
            f'"package.module:attribute"{hint}'
        )
    channels, height, width = _image_shape(input_shape)
    base, _, norm = kind.partition("-")
    group = norm == "gn"
    first = 1 if (width if height == 1 else min(height, width)) < _SMALL else 2
    kernel = _kernel(3, height)
    stem = _conv(channels, 16, kernel if base == "tiny" else _kernel(5, height), first, group)
    layers = [*stem, nn.ReLU(), *_conv(16, 32, kernel, 2, group), nn.ReLU()]
    strides = [first, 2]
    if base == "tiny":
        layers += [*_conv(32, 32, kernel, 2, group), nn.ReLU()]
        strides.append(2)
    for stride in strides:
        height, width = -(-height // stride), -(-width // stride)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * height * width, classes))


def import_object(key: str, spec: str) -> Callable[..., Any]:
    """Import the callable that a plan's ``key`` names as ``"package.module:attribute"``.

    Raises:
        PlanError: If it cannot be imported or is not callable.
    """
    where = f'{key}="{spec}"'
    module_name, _, attribute = spec.partition(":")
    names = [*module_name.split("."), attribute]
    if not all(name.isidentifier() for name in names):
        raise PlanError(f'{where}: must look like "package.module:attribute"')
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise PlanError(
            f"{where}: {module_name} cannot be imported: {error} (it must be installed, or its "
            "folder on PYTHONPATH)"
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        problem = "is not callable" if hasattr(module, attribute) else "does not exist"
        raise PlanError(f"{where}: {attribute} {problem} in module {module_name}")
    return found


def call_own(key: str, spec: str, *arguments: Any) -> Any:
    """Return what the callable that ``key`` names returns for ``arguments``.

    Raises:
        PlanError: If it cannot be imported, or cannot be called with so many arguments.
        DataError: If it raises something that is no error of ours. What that says is not repeated:
            it may hold a value of the data. ``RETICENT_DEBUG=1`` shows it, on a terminal.
    """
    found = import_object(key, spec)
    with suppress(ValueError):  # of some callables in C nothing is known
        try:
            inspect.signature(found).bind(*arguments)
        except TypeError as error:
            raise PlanError(
                f'{key}="{spec}": cannot be called with {len(arguments)} arguments: {error}'
            ) from error
    try:
        return found(*arguments)
    except ReticentError:
        raise
    except Exception as error:
        raise DataError(
            f'{key}="{spec}": raised {type(error).__name__} (RETICENT_DEBUG=1 shows where)'
        ) from error


def own_student(spec: str, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Return a user's own student, named ``"package.module:attribute"``.

    Raises:
        PlanError: If it cannot be imported, or is not a model.
    """
    model = call_own("student.model", spec, input_shape, classes)
    if not isinstance(model, nn.Module):
        raise PlanError(
            f'student.model="{spec}": returned a {type(model).__name__}: must be a torch.nn.Module'
        )
    return model


def _kernel(size: int, height: int) -> Kernel:
    return (1, size * size) if height == 1 else (size, size)


def _conv(
    inputs: int, outputs: int, kernel: Kernel, stride: int = 1, group: bool = False
) -> list[nn.Module]:
    norm = nn.GroupNorm(outputs // 4, outputs) if group else nn.BatchNorm2d(outputs)
    padding = (kernel[0] // 2, kernel[1] // 2)
    # The norm's own bias follows, and folding gives the convolution one.
    return [nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False), norm]


def _image_shape(input_shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise DataError(
            f"input shape {input_shape}: the built-in models take (channels, height, width); give "
            "the task models of its own"
        )
    channels, height, width = input_shape
    return channels, height, width
