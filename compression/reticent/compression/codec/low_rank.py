"""Low-rank approximation of every parameter that is a matrix (Vogels et al. 2019, PowerSGD)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from reticent.core.errors import PayloadError
from reticent.core.norms import l2_norm
from reticent.core.update import Layout, Vector

from .base import Blocks, Coded, Dependence, check_finite, no_flags, to_float32
from .plain import floats_from

Wide = NDArray[np.float64]

_DEPENDENT = 1e-12
"""What is left of a vector, as a share of it, that is rounding."""


@dataclass(frozen=True)
class LowRank:
    """Each parameter as a matrix M (first axis by the rest) becomes P and M^T P, float32.

    P is an orthonormal basis of M Omega, Omega normal of ``rank`` columns: one power iteration from
    a random start (Vogels et al. 2019, algorithm 1, without its warm start, which would need state
    on both sides). What is decoded is P P^T M, a projection, so the error is never longer than M;
    it is biased and depends on the input. Vectors, and matrices that two factors would not make
    smaller, are sent as they are. Pruned coordinates count as zero and are not decoded.

    Guarantee: the bits do not depend on the number of threads. Products are ``einsum``'s, which
    calls no BLAS, and the basis is :func:`orthonormal`'s, which calls no LAPACK.
    """

    rank: int
    layout: Layout
    code: int = 19
    alphabet: int = 256
    unbiased: bool = False
    error: Dependence = "dependent"
    sums: bool = False
    contracts: bool = True

    def count(self, n: int) -> int:
        """Four symbols for each number of a factor."""
        self._check(n)
        return 4 * sum(self._numbers)

    def expansion(self, n: int) -> float:
        """A projection."""
        return 1.0

    def encode(
        self, vector: Vector, blocks: Blocks, generator: np.random.Generator, step: float | None
    ) -> Coded:
        """Return the factors; ``step`` is not used.

        Raises:
            PayloadError: If the blocks are not the layout's, or a factor does not fit float32.
        """
        check_finite(vector)
        self._check(len(vector))
        parts = np.split(vector.astype(np.float64), np.cumsum(self.layout.blocks)[:-1])
        numbers = [
            self._factors(self._matrix(i, part), generator) if self._factored(i) else part
            for i, part in zip(range(len(self._shapes)), parts, strict=False)
        ]
        flat = to_float32(np.concatenate([np.zeros(0), *numbers]))
        return Coded(flat.astype("<f4").view(np.uint8), b"")

    def decode(self, coded: Coded, blocks: Blocks) -> Vector:
        """Return the kept coordinates of the products, float32 ``(n,)``."""
        no_flags(coded)
        self._check(sum(blocks))
        if coded.side:
            raise PayloadError(f"payload has {len(coded.side)} side bytes: lowrank has none")
        flat = floats_from(coded.symbols.tobytes()).astype(np.float64)
        parts = np.split(flat, np.cumsum(self._numbers)[:-1])
        decoded = [
            self._product(i, part) if self._factored(i) else part
            for i, part in zip(range(len(self._shapes)), parts, strict=False)
        ]
        return to_float32(np.concatenate([np.zeros(0), *decoded]))

    def _check(self, n: int) -> None:
        if n != self.layout.size:
            raise PayloadError(f"vector has {n} values: the layout has {self.layout.size}")

    @cached_property
    def _shapes(self) -> list[tuple[int, int]]:
        firsts = [shape[0] if len(shape) > 1 else 1 for shape in self.layout.shapes]
        return [(f, n // max(1, f)) for f, n in zip(firsts, self.layout.sizes, strict=True)]

    @cached_property
    def _kept(self) -> list[NDArray[np.bool_]]:
        return np.split(self.layout.mask, np.cumsum(self.layout.sizes)[:-1])

    @cached_property
    def _numbers(self) -> list[int]:
        """How many numbers each parameter is sent as."""
        return [
            self.rank * sum(self._shapes[i]) if self._factored(i) else kept
            for i, kept in zip(range(len(self._shapes)), self.layout.blocks, strict=False)
        ]

    def _factored(self, i: int) -> bool:
        return self.rank * sum(self._shapes[i]) < self.layout.blocks[i]

    def _matrix(self, i: int, part: Wide) -> Wide:
        full = np.zeros(self.layout.sizes[i])
        full[self._kept[i]] = part
        return full.reshape(self._shapes[i])

    def _factors(self, matrix: Wide, generator: np.random.Generator) -> Wide:
        start = generator.standard_normal((matrix.shape[1], self.rank))
        # Factors lie here as rows, so that the innermost loops are along memory.
        basis = orthonormal(np.einsum("ij,kj->ki", matrix, np.ascontiguousarray(start.T)))
        image = np.einsum("ij,ki->kj", matrix, basis)
        return np.concatenate([basis.T.ravel(), image.T.ravel()])

    def _product(self, i: int, part: Wide) -> Wide:
        rows, columns = self._shapes[i]
        basis = part[: rows * self.rank].reshape(rows, self.rank)
        image = part[rows * self.rank :].reshape(columns, self.rank)
        product = np.einsum("ik,kj->ij", basis, np.ascontiguousarray(image.T))
        return product.ravel()[self._kept[i]]


def orthonormal(vectors: Wide) -> Wide:
    """Return an orthonormal basis of the rows of ``vectors``, float64 ``(k, n)``, as rows.

    Gram and Schmidt's, twice for each vector, which is enough for orthogonality to rounding (Giraud
    et al. 2005). Who depends on those before, to rounding, becomes zero.
    """
    basis = np.zeros_like(vectors)
    for k, vector in enumerate(vectors):
        rest, before = vector, basis[:k]
        for _ in range(2):
            rest = rest - np.einsum("k,kn->n", np.einsum("kn,n->k", before, rest), before)
        length = l2_norm(rest)
        if length > _DEPENDENT * l2_norm(vector):
            basis[k] = rest / length
    return basis
