"""Which students have an integer form."""

from __future__ import annotations

from torch import nn

from reticent.core.errors import ArtifactError, PlanError
from reticent.core.plan import Quantize

from .convert import check_layers
from .dynamic import dynamic_spec
from .fold import is_chain


def integer_problem(model: nn.Module) -> str | None:
    """Return why ``model`` has no integer form, or None if it has one; looks at its layers only.

    Where it has a dynamic form, the text says how to ask for that.
    """
    if not is_chain(model):
        return (
            f"student {type(model).__name__}: only nn.Sequential students can be converted to "
            "int8; write the student as an nn.Sequential of Conv2d, Linear, GroupNorm, ReLU, "
            "MaxPool2d and Flatten"
        )
    try:
        check_layers(model)
    except ArtifactError as error:
        return f"{error}{_remedy(model)}"
    return None


def require_integer_form(model: nn.Module, section: Quantize) -> None:
    """Check, before anything is trained, that a student for few bits can have them.

    With 8 bits a student without an integer form is trained and measured as a float model; fewer
    would have been asked for in vain.

    Raises:
        PlanError: If it cannot.
    """
    if section.kind == "dynamic" or section.bits == 8:
        return
    problem = integer_problem(model)
    if problem is not None:
        raise PlanError(
            f"student.quantize.bits={section.bits}: must be 8 for a student that has no integer "
            f"form (with 8 it is trained, and measured without an artifact): {problem}"
        )


def _remedy(model: nn.Module) -> str:
    try:
        dynamic_spec(model, Quantize(kind="dynamic"))
    except ArtifactError:
        return ""
    return '; student.quantize.kind="dynamic" quantizes this student'
