"""What a quantizer is, and the numeric checks that all of them share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from reticent.core.errors import PayloadError
from reticent.core.update import Vector

Symbols = NDArray[np.uint8]
Blocks = tuple[int, ...]
Dependence = Literal["none", "independent", "dependent"]

LARGEST = 2.0**127
"""Largest magnitude a lossy quantizer accepts: its error then cannot overflow float32."""

LARGEST_NORMAL = 8.0
"""Standard deviations that no coordinate of noise is away: the chance is 1e-15 each."""

_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Coded:
    """What a quantizer hands to an entropy stage.

    Attributes:
        symbols: uint8, one-dimensional, each below the quantizer's ``alphabet``.
        side: Bytes that are sent as they are: scales, seeds, escaped values.
        flags: One byte of the header; every bit that a quantizer does not define is 0.
    """

    symbols: Symbols
    side: bytes
    flags: int = 0


class Quantizer(Protocol):
    """The first stage of a codec."""

    @property
    def code(self) -> int:
        """Number of this quantizer in a payload's header, 0 to 63; never reused."""
        ...

    @property
    def alphabet(self) -> int:
        """Number of symbol values: a power of 2 from 2 to 256."""
        ...

    @property
    def unbiased(self) -> bool:
        """Whether the decoded vector has the encoded one as its expectation."""
        ...

    @property
    def error(self) -> Dependence:
        """What the error depends on; see :attr:`Codec.error`."""
        ...

    @property
    def sums(self) -> bool:
        """Whether it commutes with modular sums; see :attr:`Codec.sums`."""
        ...

    @property
    def contracts(self) -> bool:
        """Whether the error is always shorter than the vector; see :attr:`Codec.contracts`."""
        ...

    def count(self, n: int) -> int:
        """Return how many symbols ``n`` coordinates become; no data decide it."""
        ...

    def expansion(self, n: int) -> float:
        """Return a factor by which decoded noise may be longer; see :meth:`Codec.expansion`."""
        ...

    def encode(
        self, vector: Vector, blocks: Blocks, generator: np.random.Generator, step: float | None
    ) -> Coded:
        """Quantize ``vector``, float32 ``(n,)``; may raise PayloadError."""
        ...

    def decode(self, coded: Coded, blocks: Blocks) -> Vector:
        """Return float32 ``(n,)``; raises PayloadError on anything ``encode`` cannot make."""
        ...


def peak_of(vector: Vector, largest: float = LARGEST) -> float:
    """Return the largest magnitude of ``vector`` (0 when empty).

    Raises:
        PayloadError: If a value is not finite or its magnitude is above ``largest``.
    """
    if not len(vector):
        return 0.0
    # NaN survives max and min, and fails every comparison.
    peak = float(max(vector.max(), -vector.min()))
    if not peak <= largest:
        raise PayloadError(
            f"vector has a value of magnitude {peak}: must be finite and at most {largest:.4g}"
        )
    return peak


def check_finite(vector: Vector) -> None:
    """Raise PayloadError if a value is not finite."""
    peak_of(vector, _FLOAT32_MAX)


def to_float32(values: NDArray[np.float64]) -> Vector:
    """Return ``values`` as float32; PayloadError if one does not fit or is not finite."""
    if len(values) and not max(values.max(), -values.min()) <= _FLOAT32_MAX:
        raise PayloadError("payload holds a value outside float32: must be finite")
    return values.astype(np.float32)


def no_flags(coded: Coded) -> None:
    """Raise PayloadError unless the header's flags are 0."""
    if coded.flags:
        raise PayloadError(f"payload has flags {coded.flags:#04x}: must be 0 for this codec")
