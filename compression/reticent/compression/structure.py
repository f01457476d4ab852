"""A chain of layers as plain JSON, and back: how a student that was reshaped reaches the devices.

:func:`describe` and :func:`build` are inverse to each other up to the values of the parameters,
which travel apart. The text comes from the network on a device, so :func:`build` takes a closed
list of layers, each of which treats every example on its own, and bounds what it allocates before
it allocates it. Nothing in the text is a name that is looked up or code that is run.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from reticent.core.errors import PayloadError, PlanError
from reticent.core.plan import Plan
from reticent.core.protocol import Constants
from reticent.core.tasks import Task

from .adapt import Adapted, Frozen, adapted, hold_values, is_adapted, largest_rank
from .fold import folded, is_chain

MAX_TEXT = 2**16
MAX_LAYERS = 256
MAX_PARAMETERS = 2**24
MAX_ACTIVATION = 2**22
"""Most numbers that one layer may put out for one example."""

Shape = tuple[int, ...]
Size = Annotated[int, Field(ge=1, le=2**20)]
Offset = Annotated[int, Field(ge=0, le=2**10)]
Pair = tuple[Size, Size]
Offsets = tuple[Offset, Offset]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def parameters(self) -> int:
        """Return how many parameters the layer has."""
        return 0

    def shape(self, given: Shape) -> Shape:
        """Return the shape that one example of shape ``given`` leaves with.

        Raises:
            ValueError: If the layer cannot take it.
        """
        return given


class _Conv(_Record):
    kind: Literal["conv2d"] = "conv2d"
    inputs: Size
    outputs: Size
    kernel: Pair
    stride: Pair
    padding: Offsets
    dilation: Pair
    groups: Size
    bias: bool

    def parameters(self) -> int:
        return self.outputs * (self.inputs // self.groups * math.prod(self.kernel) + self.bias)

    def shape(self, given: Shape) -> Shape:
        _require(self.inputs % self.groups == 0 and self.outputs % self.groups == 0, "groups")
        _require(len(given) == 3 and given[0] == self.inputs, f"shape {given}")
        return (self.outputs, *_places(given, self, self.dilation, False))


class _Linear(_Record):
    kind: Literal["linear"] = "linear"
    inputs: Size
    outputs: Size
    bias: bool

    def parameters(self) -> int:
        return self.outputs * (self.inputs + self.bias)

    def shape(self, given: Shape) -> Shape:
        _require(given[-1] == self.inputs, f"shape {given}")
        return (*given[:-1], self.outputs)


class _GroupNorm(_Record):
    kind: Literal["group_norm"] = "group_norm"
    groups: Size
    channels: Size
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)]

    def parameters(self) -> int:
        return 2 * self.channels

    def shape(self, given: Shape) -> Shape:
        _require(self.channels % self.groups == 0, "groups")
        # torch refuses a group of one number, but only in batches of one example: it would tell
        # the size of a batch.
        _require(math.prod(given) > self.groups, "a group of one number")
        _require(given[0] == self.channels, f"shape {given}")
        return given


class _Plain(_Record):
    kind: Literal["relu", "gelu", "silu", "sigmoid", "tanh", "identity", "flatten"]

    def shape(self, given: Shape) -> Shape:
        return (math.prod(given),) if self.kind == "flatten" else given


class _MaxPool(_Record):
    kind: Literal["max_pool2d"] = "max_pool2d"
    kernel: Pair
    stride: Pair
    padding: Offsets
    dilation: Pair
    ceil: bool

    def shape(self, given: Shape) -> Shape:
        return _pooled(given, self, self.dilation)


class _AvgPool(_Record):
    kind: Literal["avg_pool2d"] = "avg_pool2d"
    kernel: Pair
    stride: Pair
    padding: Offsets
    ceil: bool
    count_padding: bool

    def shape(self, given: Shape) -> Shape:
        return _pooled(given, self, (1, 1))


class _AdaptivePool(_Record):
    kind: Literal["adaptive_avg_pool2d"] = "adaptive_avg_pool2d"
    size: Pair

    def shape(self, given: Shape) -> Shape:
        _require(len(given) == 3, f"shape {given}")
        return (given[0], *self.size)


def _require(fits: bool, what: str) -> None:
    if not fits:
        raise ValueError(f"cannot take {what}")


def _pooled(given: Shape, pool: _MaxPool | _AvgPool, dilation: Pair) -> Shape:
    _require(len(given) == 3, f"shape {given}")
    halves = all(2 * p <= k for p, k in zip(pool.padding, pool.kernel, strict=True))
    _require(halves, "a padding of more than half the kernel")
    return (given[0], *_places(given, pool, dilation, pool.ceil))


def _places(
    given: Shape, layer: _Conv | _MaxPool | _AvgPool, dilation: Pair, ceil: bool
) -> tuple[int, int]:
    """Return the height and width that a sliding window leaves."""
    windows = zip(given[1:], layer.kernel, layer.stride, layer.padding, dilation, strict=True)
    height, width = (_along(*window, ceil) for window in windows)
    return height, width


def _along(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool) -> int:
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    _require(room >= 0, f"{size} places with a window that is larger")
    steps = -(-room // stride) if ceil else room // stride
    # A last window that would start in the padding on the right is left out.
    return steps if ceil and steps * stride >= size + padding else steps + 1


Layer = Annotated[
    _Conv | _Linear | _GroupNorm | _Plain | _MaxPool | _AvgPool | _AdaptivePool,
    Field(discriminator="kind"),
]


class _Adapter(_Record):
    layer: Annotated[int, Field(ge=0, lt=MAX_LAYERS)]
    rank: Size


class Structure(BaseModel):
    """The layers of a chain in order, and which of them have factors: what the text holds.

    With any factors everything but them is held (:mod:`reticent.compression.adapt`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Literal[1] = 1
    layers: Annotated[tuple[Layer, ...], Field(min_length=1, max_length=MAX_LAYERS)]
    adapters: Annotated[tuple[_Adapter, ...], Field(max_length=MAX_LAYERS)] = ()


_PLAIN: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
    "flatten": nn.Flatten,
}
_Model = TypeVar("_Model", bound=BaseModel)
_KINDS = "Conv2d, Linear, GroupNorm, pooling, Flatten and the usual activations"


def student_of(task: Task, plan: Plan, constants: Constants | None = None) -> nn.Module:
    """Return an untrained student in the shape that is trained federatedly.

    Args:
        task: The task.
        plan: The plan.
        constants: Hold the layers where the plan changes them, and what is held. Otherwise the
            student is the task's own, with batch normalisation folded away.

    Raises:
        PayloadError: If the structure is not a description that fits the task, or is there though
            the plan does not change the layers, or is not there though it does; or if what is held
            is not what this student holds.
    """
    text = constants.structure if constants else ""
    if bool(text) != plan.student.reshaped:
        wrong = "is there though" if text else "is missing: this run needs a description, as"
        changes = "changes" if plan.student.reshaped else "does not change"
        raise PayloadError(f"constants.structure {wrong} the plan {changes} the student's layers")
    model = folded(task.student(plan.student.model))
    if text:
        # Nothing that a plan can ask for makes a student larger than the one its owner agreed to.
        most = sum(p.numel() for p in model.parameters())
        model = build(text, task.input_shape, task.classes, min(most, MAX_PARAMETERS))
    kind, has = plan.student.adapt.kind, "factors" if is_adapted(model) else "no factors"
    if is_adapted(model) != (kind != "none"):
        raise PayloadError(f'constants.structure has {has}: student.adapt.kind="{kind}"')
    if constants is not None:
        hold_values(model, constants.held)
    return model


def describe(model: nn.Module) -> str:
    """Return the layers of ``model`` as JSON text; the values of its parameters are left out.

    Raises:
        PlanError: If ``model`` is no chain, or a layer has no description; the layer is named.
    """
    if not is_chain(model):
        raise PlanError(
            f"student {type(model).__name__}: only an nn.Sequential of layers can be reshaped "
            "(student.thin, student.factorize, student.adapt); write it as one, or leave them off"
        )
    children = [(n, m.layer if isinstance(m, Frozen) else m) for n, m in model.named_children()]
    layers = tuple(_record(name, layer) for name, layer in children)
    ranks = {i: m.rank for i, m in enumerate(model) if isinstance(m, Adapted)}
    adapters = tuple(_Adapter(layer=i, rank=rank) for i, rank in ranks.items())
    structure = _checked(Structure, {"layers": layers, "adapters": adapters}, "student")
    return structure.model_dump_json()


def build(
    text: str, input_shape: tuple[int, ...], classes: int, most: int = MAX_PARAMETERS
) -> nn.Sequential:
    """Return the chain that ``text`` describes, with all parameters zero.

    No random numbers are drawn.

    Args:
        text: What :func:`describe` made, or anything at all.
        input_shape: Shape of one example.
        classes: Length of the logits.
        most: Most parameters that the layers may have, factors left out.

    Raises:
        PayloadError: If the text is not a description, is too large in any way, or its layers do
            not map one example to logits of the task's classes.
    """
    if len(text) > MAX_TEXT:
        raise PayloadError(f"structure has {len(text)} characters: at most {MAX_TEXT}")
    try:
        structure = Structure.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the text"
        raise PayloadError(f"structure: {where}: {first['msg']}") from error
    count = sum(layer.parameters() for layer in structure.layers)
    if count > most:
        raise PayloadError(f"structure has {count} parameters: at most {most}")
    _check_shapes(structure, input_shape, classes)
    with torch.random.fork_rng(devices=[]):
        chain = nn.Sequential(*map(_module, structure.layers))
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.zero_()
    return _with_adapters(chain, structure) if structure.adapters else chain


def _with_adapters(chain: nn.Sequential, structure: Structure) -> nn.Sequential:
    ranks = {adapter.layer: adapter.rank for adapter in structure.adapters}
    layers = dict(enumerate(chain))
    wrong = [i for i, rank in ranks.items() if i not in layers or rank > largest_rank(layers[i])]
    if wrong or len(ranks) < len(structure.adapters):
        raise PayloadError(
            "structure: every adapter must be of another layer, and smaller than the layer"
        )
    return adapted(chain, ranks)


def _check_shapes(structure: Structure, input_shape: Shape, classes: int) -> None:
    shape = tuple(input_shape)
    for index, layer in enumerate(structure.layers):
        try:
            shape = layer.shape(shape)
        except ValueError as error:
            raise PayloadError(f"structure: layer {index} ({layer.kind}) {error}") from error
        if math.prod(shape) > MAX_ACTIVATION:
            raise PayloadError(
                f"structure: layer {index} ({layer.kind}) gives shape {shape} for one example: at "
                f"most {MAX_ACTIVATION} numbers"
            )
    if shape != (classes,):
        raise PayloadError(f"structure gives shape {shape} for one example: must be ({classes},)")


def _record(name: str, layer: nn.Module) -> _Record:
    kind = type(layer).__name__
    given = _fields(layer)
    if given is None:
        raise PlanError(
            f"student layer {name} ({kind}) has no description that can be sent; use {_KINDS}, "
            "with padding of zeros given in pixels, nothing in place, and Flatten from dimension 1"
        )
    record, fields = given
    return _checked(record, fields, f"student layer {name} ({kind})")


def _checked(record: type[_Model], fields: dict[str, Any], where: str) -> _Model:
    try:
        return record(**fields)
    except ValidationError as error:
        raise PlanError(f"{where}: {error.errors()[0]['msg']}: too large to be sent") from error


def _fields(layer: Any) -> tuple[type[_Record], dict[str, Any]] | None:
    for kind, plain in _PLAIN.items():
        if type(layer) is plain:
            return (_Plain, {"kind": kind}) if _is_default(layer) else None
    kind = type(layer)
    if kind is nn.Conv2d:
        return (_Conv, _conv_fields(layer)) if _is_plain_conv(layer) else None
    if kind is nn.Linear:
        sizes = {"inputs": layer.in_features, "outputs": layer.out_features}
        return _Linear, {**sizes, "bias": layer.bias is not None}
    if kind is nn.GroupNorm and layer.affine and layer.bias is not None:
        sizes = {"groups": layer.num_groups, "channels": layer.num_channels}
        return _GroupNorm, {**sizes, "eps": float(layer.eps)}
    if kind is nn.MaxPool2d and not layer.return_indices:
        pool = {"dilation": _pair(layer.dilation), "ceil": layer.ceil_mode}
        return _MaxPool, {**_pool_fields(layer), **pool}
    if kind is nn.AvgPool2d and layer.divisor_override is None:
        pool = {"ceil": layer.ceil_mode, "count_padding": layer.count_include_pad}
        return _AvgPool, {**_pool_fields(layer), **pool}
    if kind is nn.AdaptiveAvgPool2d and None not in _pair(layer.output_size):
        return _AdaptivePool, {"size": _pair(layer.output_size)}
    return None


def _is_default(layer: Any) -> bool:
    """Return whether an activation or Flatten has no option that the description lacks."""
    if type(layer) is nn.Flatten:
        return (layer.start_dim, layer.end_dim) == (1, -1)
    if getattr(layer, "approximate", "none") != "none":
        return False
    return not getattr(layer, "inplace", False)


def _is_plain_conv(layer: nn.Conv2d) -> bool:
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _conv_fields(layer: nn.Conv2d) -> dict[str, Any]:
    return {
        "inputs": layer.in_channels,
        "outputs": layer.out_channels,
        "kernel": layer.kernel_size,
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "groups": layer.groups,
        "bias": layer.bias is not None,
    }


def _pool_fields(layer: Any) -> dict[str, Any]:
    names = {"kernel": layer.kernel_size, "stride": layer.stride, "padding": layer.padding}
    return {name: _pair(value) for name, value in names.items()}


def _pair(value: Any) -> tuple[Any, Any]:
    return (value, value) if isinstance(value, int) or value is None else tuple(value)


def _module(r: Any) -> nn.Module:
    match r:
        case _Conv():
            return nn.Conv2d(
                r.inputs, r.outputs, r.kernel, r.stride, r.padding, r.dilation, r.groups, r.bias
            )
        case _Linear():
            return nn.Linear(r.inputs, r.outputs, r.bias)
        case _GroupNorm():
            return nn.GroupNorm(r.groups, r.channels, r.eps)
        case _MaxPool():
            return nn.MaxPool2d(r.kernel, r.stride, r.padding, r.dilation, False, r.ceil)
        case _AvgPool():
            return nn.AvgPool2d(r.kernel, r.stride, r.padding, r.ceil, r.count_padding)
        case _AdaptivePool():
            return nn.AdaptiveAvgPool2d(r.size)
        case _:
            return _PLAIN[r.kind]()
