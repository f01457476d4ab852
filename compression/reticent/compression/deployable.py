"""What a student becomes on a device: static or dynamic, from its data or from its files."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from reticent.core.decoding import parse_json
from reticent.core.errors import ArtifactError, PlanError
from reticent.core.plan import Quantize

from .convert import calibrate, convert, fake_quantized_model
from .dynamic import (
    DynamicGraph,
    DynamicModel,
    DynamicSpec,
    build_dynamic,
    dynamic_spec,
    rounded_copy,
)
from .fold import is_chain
from .integer import Graph, IntegerModel, IntegerSpec, build, parse_graph

Spec = IntegerSpec | DynamicSpec
Model = IntegerModel | DynamicModel
Form = Graph | DynamicGraph


def quantized(
    model: nn.Sequential, public_inputs: torch.Tensor, section: Quantize
) -> tuple[Spec, nn.Module]:
    """Return a folded student as data, and the float model that it is checked against.

    Of a static model that is one which rounds weights and activations, of a dynamic one a model
    that rounds weights. ``public_inputs`` set activation ranges and must never be private.

    Raises:
        ArtifactError: If a layer has no such form.
    """
    if section.kind == "dynamic":
        return dynamic_spec(model, section), rounded_copy(model, section)
    ranges = calibrate(model, public_inputs, section)
    return convert(model, ranges, section), fake_quantized_model(model, ranges, section)


def assemble(spec: Spec, engine: str = "qnnpack") -> Model:
    """Assemble a model from its data.

    Raises:
        ArtifactError: If the data are not those of a model, or the engine cannot be used.
    """
    return build_dynamic(spec, engine) if isinstance(spec, DynamicSpec) else build(spec, engine)


def parse_spec(text: bytes, arrays: Mapping[str, torch.Tensor]) -> Spec:
    """Return what ``model.json`` and the arrays beside it stand for.

    Raises:
        ArtifactError: If the text is not a graph.
    """
    graph = parse_form(text)
    if isinstance(graph, DynamicGraph):
        return DynamicSpec(graph, arrays)
    return IntegerSpec(graph, arrays)


def parse_form(text: bytes) -> Form:
    """Return the graph in a ``model.json``.

    Raises:
        ArtifactError: If it is not one.
    """
    if not _is_dynamic(text):
        return parse_graph(text)
    try:
        return TypeAdapter(DynamicGraph).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ArtifactError(f"model.json: {where}: {first['msg']}") from error


def require_dynamic_form(model: nn.Module, section: Quantize) -> None:
    """Check, before anything is trained, that a student to be quantized dynamically can be.

    Raises:
        PlanError: If it cannot.
    """
    if section.kind != "dynamic":
        return
    where = 'student.quantize.kind="dynamic"'
    if not is_chain(model):
        raise PlanError(f"{where}: the student must be an nn.Sequential; use another kind")
    try:
        dynamic_spec(model, section)
    except ArtifactError as error:
        raise PlanError(f"{where}: {error}") from error


def _is_dynamic(text: bytes) -> bool:
    try:
        data = parse_json(text)
    except ValueError:
        return False
    return isinstance(data, dict) and "activations" in data
