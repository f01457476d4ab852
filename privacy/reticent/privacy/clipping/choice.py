"""Which way gradients of single examples are computed: the cheapest that is right."""

from __future__ import annotations

import logging
from functools import cache
from typing import Literal

from torch import nn

from reticent.core.errors import DataError

from .ghost import GhostGradients, chain_of
from .graph import GraphGradients, unsuited
from .hooks import HookedGradients
from .trial import misfit, require_unmixed

Method = Literal["hooks", "ghost", "graph"]
Shape = tuple[int, ...] | None
Gradients = HookedGradients | GhostGradients | GraphGradients

_log = logging.getLogger("reticent.privacy")


def method_of(model: nn.Module, shape: Shape) -> tuple[Method, str]:
    """Return the way for ``model``, and why it is no better one.

    The rule looks at the layers and at random inputs, never at data: ``ghost`` for a plain chain of
    known layers; ``graph`` for known layers that are joined in any other way, if a trial says so;
    ``hooks`` for anything else.

    Args:
        model: The student.
        shape: Of one example; None if it is not known, and then there is no trial and no ``graph``.
    """
    if chain_of(model) is not None:
        return "ghost", ""
    if shape is None:
        return "hooks", "the shape of its inputs is not given"
    reason = unsuited(model) or misfit(model, shape)
    return ("graph", "it is not a plain chain") if reason is None else ("hooks", reason)


def chosen(model: nn.Module, method: Method | None, shape: Shape) -> tuple[Method, Gradients]:
    """Return the way for ``model``, or the one asked for, and what computes the gradients.

    Raises:
        DataError: If the way that is asked for is not right for the student, or it mixes examples.
    """
    found, reason = method_of(model, shape) if method is None else (method, "")
    if found == "ghost":
        layers = chain_of(model)
        if layers is None:
            raise DataError('method="ghost": the student is not a plain chain of known layers')
        return found, GhostGradients(layers)
    if method == "graph":
        problem = unsuited(model) or (misfit(model, shape) if shape is not None else None)
        if problem:
            raise DataError(f'method="graph": {problem}')
    make = GraphGradients if found == "graph" else HookedGradients
    if shape is not None:
        require_unmixed(model, make, shape)
        if method is None and found == "hooks":
            _say(reason)
    return found, make(model)


@cache
def _say(reason: str) -> None:
    """Say once in a process why a student's gradients take longer."""
    _log.warning("gradients of single examples by Opacus' hooks, which is slower: %s", reason)
