"""Personal layers: which parameters of a student travel, and which stay on each device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import nn

from .errors import PayloadError, PlanError
from .update import Layout, Vector


@dataclass(frozen=True, eq=False)
class Split:
    """The parameters that are trained, in two parts.

    Guarantee: ``whole(shared(v), personal(v))`` is ``v``; without personal layers ``shared(v)`` and
    ``whole(v, [])`` are ``v``.

    Attributes:
        trained: Layout of what a device trains, and with unit ``example`` clips and noises.
        travels: Layout of what is broadcast and sent: without the personal parameters.
        inner: Whether a trained coordinate is personal, bool ``(trained.size,)``.
    """

    trained: Layout
    travels: Layout
    inner: NDArray[np.bool_]

    @cached_property
    def _inside(self) -> bool:
        """Whether there are personal parameters at all."""
        return bool(self.inner.any())

    def shared(self, vector: NDArray[np.floating]) -> Vector:
        """Return the part of ``vector``, ``(trained.size,)``, that travels, as float32."""
        if not self._inside:
            return vector.astype(np.float32, copy=False)
        return vector[~self.inner].astype(np.float32)

    def personal(self, vector: NDArray[np.floating]) -> Vector:
        """Return the part of ``vector``, ``(trained.size,)``, that stays, as float32."""
        return vector[self.inner].astype(np.float32)

    def whole(self, shared: Vector, personal: Vector) -> Vector:
        """Return both parts as one vector ``(trained.size,)``: ``shared`` itself if it is all."""
        if not self._inside:
            return shared
        vector = np.empty(self.trained.size, dtype=np.float32)
        vector[~self.inner], vector[self.inner] = shared, personal
        return vector

    def spread(self, shared: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return ``shared`` with zeros where a coordinate is personal, ``(trained.size,)``."""
        vector = np.zeros(self.trained.size)
        vector[~self.inner] = shared
        return vector

    def kept(self, values: Vector) -> Vector:
        """Return those of the personal parameters' ``values`` that the mask keeps.

        Raises:
            PayloadError: If there are not as many as the personal parameters have.
        """
        mask = self.trained.mask[~_travelling(self.trained, self.travels.names)]
        if values.shape != mask.shape:
            raise PayloadError(
                f"constants.personal has shape {values.shape}: must be {mask.shape}, the size of "
                "the personal layers"
            )
        return values[mask]


def split_of(layout: Layout, names: Sequence[str]) -> Split:
    """Return the split of ``layout`` in which the parameters of the layers ``names`` stay.

    Raises:
        PlanError: If a name is no layer or parameter of the student, or nothing is left to travel.
    """
    for name in names:
        if not any(_is_in(p, [name]) for p in layout.names):
            raise PlanError(
                f"federation.local.personal names {name!r}, which is no layer of the student: must "
                f"be among {', '.join(dict.fromkeys(n.rpartition('.')[0] for n in layout.names))} "
                f"or a parameter such as {layout.names[-1]}"
            )
    outer = [not _is_in(p, names) for p in layout.names]
    travels = _part(layout, outer)
    if not travels.size:
        raise PlanError(
            f"federation.local.personal={list(names)}: must leave a layer that travels, or nothing "
            "is learnt together"
        )
    flags = np.repeat(np.array(outer), layout.sizes)
    return Split(layout, travels, ~flags[layout.index])


def personal_values(model: nn.Module, names: Sequence[str]) -> Vector:
    """Return the parameters of ``model`` in the layers ``names``, flat, in order."""
    parts = [
        p.detach().reshape(-1).numpy() for n, p in model.named_parameters() if _is_in(n, names)
    ]
    return np.concatenate([np.zeros(0, dtype=np.float32), *parts])


def _is_in(parameter: str, names: Sequence[str]) -> bool:
    return any(parameter == name or parameter.startswith(f"{name}.") for name in names)


def _part(layout: Layout, outer: list[bool]) -> Layout:
    """Return the layout of those parameters that ``outer`` marks."""
    if all(outer):
        return layout
    chosen = [i for i, out in enumerate(outer) if out]
    names, shapes = [layout.names[i] for i in chosen], [layout.shapes[i] for i in chosen]
    kept = b""
    if layout.kept:
        flags = np.repeat(np.array(outer), layout.sizes)
        kept = np.packbits(layout.mask[flags]).tobytes()
    return Layout(tuple(names), tuple(shapes), kept)


def _travelling(layout: Layout, names: Sequence[str]) -> NDArray[np.bool_]:
    """Return for every coordinate, masked ones included, whether its parameter is in ``names``."""
    return np.repeat(np.array([n in names for n in layout.names]), layout.sizes)
