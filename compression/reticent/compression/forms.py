"""Which students have an integer form."""

from __future__ import annotations

from torch import nn

from reticent.core.errors import ArtifactError

from .convert import check_layers
from .fold import is_chain


def integer_problem(model: nn.Module) -> str | None:
    """Return why ``model`` has no integer form, or None if it has one; looks at its layers only."""
    if not is_chain(model):
        return (
            f"student {type(model).__name__}: only nn.Sequential students can be converted to "
            "int8; write the student as an nn.Sequential of Conv2d, Linear, GroupNorm, ReLU, "
            "MaxPool2d and Flatten"
        )
    try:
        check_layers(model)
    except ArtifactError as error:
        return str(error)
    return None
