"""The codec itself: a quantizer and an entropy stage, in a checked frame."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from reticent.core.errors import PayloadError
from reticent.core.update import Vector

from .base import Blocks, Coded, Dependence, Quantizer
from .entropy import PLAIN, Entropy
from .frame import Frame, seal, unseal


@dataclass(frozen=True)
class Codec:
    """An update vector to bytes and back; build one with :func:`build_codec`.

    Attributes:
        names: The stages as they were named.
        quantizer: The first stage.
        entropy: The last stage; it writes symbols as they are when none was named.
    """

    names: tuple[str, ...]
    quantizer: Quantizer
    entropy: Entropy

    @property
    def unbiased(self) -> bool:
        """Whether the decoded vector has the encoded one as its expectation."""
        return self.quantizer.unbiased

    @property
    def error(self) -> Dependence:
        """What ``decode(encode(x)) - x`` depends on.

        ``none``: there is no error. ``independent``: it is uniform and independent of ``x``, given
        a public ``step``, for readers of the models, who see sums of decoded vectors and neither
        payloads nor dither seeds; not for the server. The exact statement and its conditions are in
        :mod:`reticent.compression.codec.dither`. ``dependent``: it depends on ``x`` (on its
        fractional part, its ranking or its largest value).

        A codec with a dependent error breaks a sum of noise shares. When each client adds only a
        share of the noise, what is released is the sum of ``Q(x_i + n_i)``. If the error of ``Q``
        depends on its input, that sum is not a function of the sum of ``x_i + n_i`` and independent
        randomness, so it is not a post-processing of the Gaussian mechanism, whose accounting then
        says nothing about it. A client that adds the full noise itself may use any codec.
        """
        return self.quantizer.error

    @property
    def sums(self) -> bool:
        """Whether, at one public ``step``, it commutes with modular sums.

        The integers that clients send can then be added in any modulus that holds their sum, and
        the sum decodes to the sum of the decoded vectors: ``step`` times the sum of the integers,
        less ``step`` times the sum of the dithers, which follow from their seeds. Entropy coding,
        scales of a client's own, rotations of its own, rankings and signs do not commute. Neither
        do integers that were escaped: the modulus must hold those too.
        """
        return self.quantizer.sums and self.entropy is PLAIN

    @property
    def contracts(self) -> bool:
        """Whether the error is never longer than the vector, so that error feedback converges.

        Stich et al. 2018, definition 2.1; Karimireddy et al. 2019, assumption A. What is unbiased
        without contracting needs no error feedback and diverges with it.
        """
        return self.quantizer.contracts

    def expansion(self, n: int) -> float:
        """Return a public factor: how much longer ``n`` coordinates of noise may be when decoded.

        At least 1, and what decides a bound on decoded updates: of normal values the decoded vector
        is never longer than twice this factor times the vector, save with a chance below 1e-9. Of
        ``randk`` it is n / k, whatever the values. An entropy stage changes nothing.
        """
        return self.quantizer.expansion(n)

    def encode(
        self,
        vector: Vector,
        blocks: Blocks,
        generator: np.random.Generator,
        step: float | None = None,
    ) -> bytes:
        """Return ``vector`` as a payload.

        Args:
            vector: float32 ``(n,)``, finite.
            blocks: Lengths of the parameters in ``vector``, summing to n.
            generator: Source of all randomness: the same state gives the same bytes. On a device it
                must be seeded by the operating system and be used for nothing that is disclosed.
            step: Public quantization step of the stages with one step (``dither4``,
                ``int4:shared``, not those with scales of their own); None takes it from the data,
                which gives up independence of the error.

        Raises:
            PayloadError: If the vector, its blocks or the step are not acceptable.
        """
        n = _total(blocks)
        if vector.dtype != np.float32 or vector.shape != (n,):
            raise PayloadError(
                f"vector has dtype {vector.dtype} and shape {vector.shape}: must be float32 "
                f"({n},), the sum of {len(blocks)} blocks"
            )
        coded = self.quantizer.encode(vector, blocks, generator, step)
        body = b""
        if len(coded.symbols):
            body = self.entropy.encode(coded.symbols, self.quantizer.alphabet)
        return seal(Frame(self._stages, coded.flags, n, coded.side, body))

    def decode(self, payload: bytes, blocks: Blocks) -> Vector:
        """Return the vector of ``payload``, float32 ``(n,)`` with n = sum(blocks), finite.

        Sizes are checked before anything is allocated; memory is proportional to n.

        Raises:
            PayloadError: On any bytes that this codec does not make for ``blocks``.
        """
        n = _total(blocks)
        most = 1024 + 4 * len(blocks) + 12 * n
        if not isinstance(payload, bytes) or len(payload) > most:
            size = len(payload) if isinstance(payload, bytes) else type(payload).__name__
            raise PayloadError(f"payload is {size}: must be at most {most} bytes for {n} values")
        frame = unseal(payload)
        if frame.stages != self._stages or frame.n != n:
            raise PayloadError(
                f"payload holds {frame.n} values of stages {frame.stages:#04x}: must hold {n} of "
                f"{self._stages:#04x} ({'+'.join(self.names)})"
            )
        symbols = self._symbols(frame.body, self.quantizer.count(n))
        return self.quantizer.decode(Coded(symbols, frame.side, frame.flags), blocks)

    @property
    def _stages(self) -> int:
        """One byte: the quantizer's number in bits 0-3 and 6-7, the entropy stage's in 4-5."""
        code = self.quantizer.code
        return code & 15 | self.entropy.code << 4 | code >> 4 << 6

    def _symbols(self, body: bytes, count: int) -> np.ndarray:
        if count:
            return self.entropy.decode(body, count, self.quantizer.alphabet)
        if body:
            raise PayloadError(f"payload has {len(body)} bytes of symbols: must have none")
        return np.zeros(0, dtype=np.uint8)


def _total(blocks: Blocks) -> int:
    n = sum(blocks)
    if min(blocks, default=0) < 0 or n >= 2**32:
        raise PayloadError(f"blocks={blocks}: must be at least 0 each and below 2**32 together")
    return n
